"""Image folders (`DIR/<class>/*.png|jpg|webp`, the layout of torchvision's ImageFolder), loading, and picture grids."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as TF

from common.cli import UserError
from common.records import whole_file

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp"}
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # has Greek, Cyrillic, ...


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


def shortened(words, font, width):
    """The words, without so much of their middle as it takes to be no wider than `width` pixels."""
    shown, kept = words, len(words)
    while font.getlength(shown) > width and kept > 2:
        kept -= 1
        shown = f"{words[: kept - kept // 2]}…{words[len(words) - kept // 2 :]}"
    return shown


def save_grid(rows, path, lines=(), columns=(), side=None):
    """Writes rows of images, each a list of tensors [3, size, size] in [0, 1], as one PNG with words beside and above.

    Args:
        lines: the words left of each row. columns: those above the images, each above equally many.
        side: the side in pixels at which each image is shown; by default small images are enlarged to about 128, by
            repetition, so that pixels stay pixels, and large ones are reduced to 192.
    """
    size, count = rows[0][0].shape[-1], max(map(len, rows))
    side = side or min(size * max(1, 128 // size), 192)
    span = count // len(columns) if columns else count
    font = ImageFont.truetype(FONT, max(12, side // 6))
    left = round(max((font.getlength(words) + font.size for words in lines), default=0))
    top = round(1.5 * font.size) if columns else 0

    def place(i, j):
        return left + i * (side + 2) + i // span * font.size, top + j * (side + 2)

    picture = Image.new("RGB", [side + end for end in place(count - 1, len(rows) - 1)], "white")
    draw = ImageDraw.Draw(picture)
    for j, words in enumerate(lines):
        draw.text((left - font.size // 2, place(0, j)[1] + side // 2), words, "black", font, anchor="rm")
    for i, words in enumerate(columns):
        shown = shortened(words, font, span * (side + 2))
        draw.text((place(i * span, 0)[0], top // 2), shown, "black", font, anchor="lm")
    for j, row in enumerate(rows):
        for i, image in enumerate(row):
            method = Image.Resampling.NEAREST if size <= side else Image.Resampling.BICUBIC
            picture.paste(as_picture(image.float().cpu()).resize((side, side), method), place(i, j))
    with whole_file(path) as temporary:
        picture.save(temporary, "png")
