"""Image folders (`DIR/<class>/*.png|jpg|webp`, the layout of torchvision's ImageFolder), loading, and picture grids."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

from common.cli import UserError
from common.records import whole_file

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp"}


def list_images(folder, classes=None):
    """{class name: [paths of its images]} of a folder of class folders, sorted by name.

    Args:
        classes: the classes that the folder must have, and their order; default all that it has.
    Raises:
        UserError: no such folder, no class folders, other classes, or a class folder without an image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. It should hold one folder of images per class.")
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise UserError(f"{folder} holds no class folders. It should hold one folder of images per class.")
    if classes is not None and set(found) != set(classes):
        raise UserError(
            f"The class folders of {folder} are not the wanted classes: "
            f"missing {sorted(set(classes) - set(found))}, unknown {sorted(set(found) - set(classes))}."
        )
    images = {
        name: sorted(
            p for p in (folder / name).iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")
        )
        for name in classes or found
    }
    for name, paths in images.items():
        if not paths:
            raise UserError(f"{folder / name} holds no image ({', '.join(sorted(EXTENSIONS))}): add some or remove it.")
    return images


def find_images(folder):
    """The paths of all images below a folder, sorted.

    Raises:
        UserError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. It should hold images.")
    hidden = [part for part in folder.parts if part.startswith(".")]
    paths = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in EXTENSIONS and [part for part in p.parts if part.startswith(".")] == hidden
    )
    if not paths:
        raise UserError(f"{folder} holds no image ({', '.join(sorted(EXTENSIONS))}).")
    return paths


def open_image(path, size=None):
    """The image as an RGB PIL image: the central square, upright as its EXIF data say, transparent parts white, 16-bit
    grey scaled to 8; resized with antialiasing to `size` x `size` if given.

    Raises:
        UserError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): replace or remove it.") from error
    return ImageOps.fit(image, [size or min(image.size)] * 2, Image.Resampling.BICUBIC)


def as_tensor(image, size=None):
    """A PIL image as a float tensor [3, size, size] in [0, 1]: its central square, resized with antialiasing."""
    image = ImageOps.fit(image.convert("RGB"), [size or min(image.size)] * 2, Image.Resampling.BICUBIC)
    return TF.to_dtype(TF.to_image(image), torch.float32, scale=True)


def load_image(path, size=None):
    """`open_image` as a float tensor [3, size, size] in [0, 1]."""
    return as_tensor(open_image(path, size))


def load_folder(folder, size=None, classes=None):
    """All images of a folder of class folders.

    Args:
        size: side of the square that all are resized to; None keeps sizes, which must then be equal.
        classes: the classes that the folder must have, and their order; default sorted by name.
    Returns:
        images [N, 3, size, size] in [0, 1], labels [N] (indices into classes), classes, paths [N]
    Raises:
        UserError: as `list_images` and `open_image`.
    """
    by_class = list_images(folder, classes)
    paths = [path for group in by_class.values() for path in group]
    labels = torch.tensor([label for label, group in enumerate(by_class.values()) for _ in group])
    return torch.stack([load_image(path, size) for path in paths]), labels, list(by_class), paths


def as_picture(image):
    """A tensor [3, H, W] in [0, 1] as a PIL image."""
    return TF.to_pil_image(image.mul(255).round().clamp(0, 255).byte())


def encode_image(image, image_format="png"):
    """The bytes of a PNG or lossless WebP file of a tensor [3, H, W] in [0, 1]."""
    buffer = io.BytesIO()
    as_picture(image).save(buffer, image_format, lossless=True)
    return buffer.getvalue()


def save_image(image, path):
    """Writes a tensor [3, H, W] in [0, 1] as a PNG or lossless WebP file, as the name says."""
    with whole_file(path) as temporary:
        temporary.write_bytes(encode_image(image, Path(path).suffix[1:]))


def save_grid(rows, path, side=64):
    """Writes rows of images, each a list of tensors [3, H, W] in [0, 1], as one PNG; short rows end in white.

    Args:
        side: the side in pixels at which each image is shown; enlarged by repetition, so that pixels stay pixels.
    """
    columns = max(map(len, rows))
    tiles = []
    for row in rows:
        for image in row:
            method = TF.InterpolationMode.NEAREST if image.shape[-1] <= side else TF.InterpolationMode.BICUBIC
            tiles.append(TF.resize(image.float().cpu(), [side, side], method, antialias=True).clamp(0, 1))
        tiles += [torch.ones(3, side, side)] * (columns - len(row))
    save_image(make_grid(torch.stack(tiles), nrow=columns, padding=2, pad_value=1.0), path)
