"""Image folders (`DIR/<class>/`, as torchvision's ImageFolder), the way from a file to a model's input, and grids."""

import io
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.v2 import functional as TF

from common.cli import UserError, note, refusing, require_folder
from common.records import whole_file

with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

# Of what Pillow reads, what photographs and drawings are stored in: other formats are no images, or start programs.
FORMATS = ["AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD", "QOI",
           "SGI", "TGA", "TIFF", "WEBP"]  # fmt: skip
EXTENSIONS = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
Image.MAX_IMAGE_PIXELS = 1 << 28  # phones take 200 million; of twice as many Pillow makes an error
FORMATS = [name for name in FORMATS if name in Image.OPEN]  # AVIF and HEIF, where they are built in or installed
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # has Greek, Cyrillic, ...
HINTS = dict.fromkeys((".heic", ".heif", ".hif"), " (to read them: pip install pillow-heif)")


def list_files(folder, entered):
    """The files below a folder in the order of their names, those in hidden folders and hidden ones left out. Links are
    followed, and a folder that several lead to is entered once: `entered` is the set of those that were."""
    if folder.resolve() not in entered:
        entered.add(folder.resolve())
        for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
            yield from list_files(path, entered) if path.is_dir() else [path]


def is_overview(path):
    """Whether a picture shows what these scripts have made, beside the record of that."""
    records = {"grid": "generation.json", "reconstruction": "inversion.json"}
    record = records.get(path.stem.partition("_")[0])
    return record is not None and path.with_name(record).is_file()


def images_below(folders, root):
    """The image files below each of the folders, none of which may be without; a line says how many other files there
    are in `root`, and of which kinds. Those beside the folders are of no class."""
    found, others = [], Counter()
    loose = [] if root in folders else [path for path in root.iterdir() if path.is_file() and path.name[0] != "."]
    if stray := sum(path.suffix.lower() in EXTENSIONS and not is_overview(path) for path in loose):
        others["images of no class's folder"] = stray
    for folder in folders:
        images = []
        for path in list_files(folder, set()):
            suffix = path.suffix.lower()
            if not path.is_file():
                others["links to nothing"] += 1
            elif is_overview(path):
                others["overviews of these scripts"] += 1
            elif suffix in EXTENSIONS:
                images.append(path)
            else:
                others[(suffix or "without extension") + HINTS.get(suffix, "")] += 1
        found.append(images)
    if others:
        note(f"{root}: left out {', '.join(f'{count} {kind}' for kind, count in sorted(others.items()))}")
    for folder, images in zip(folders, found):
        if not images:
            raise UserError(f"{folder} holds no image ({', '.join(sorted(EXTENSIONS))}): add some, or move it away.")
    return found


def list_images(folder, classes=None):
    """{class name: [paths of its images, in folders below it too]} of a folder of class folders, sorted by name; or of
    one that must have these `classes`, in their order. Each has an image at least."""
    folder = require_folder(folder, "It should hold one folder of images per class.")
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise UserError(f"{folder} holds no class folders. It should hold one folder of images per class.")
    for name in found:
        if not name.isprintable():  # and with that also: not UTF-8
            raise UserError(f"{folder} has a class folder {name!r}: a class needs a name that can be printed.")
    if classes is not None and set(found) != set(classes):
        raise UserError(
            f"The class folders of {folder} are not the wanted classes: "
            f"missing {sorted(set(classes) - set(found))}, unknown {sorted(set(found) - set(classes))}."
        )
    names = list(classes or found)
    return dict(zip(names, images_below([folder / name for name in names], folder)))


def find_images(folder):
    """The paths of all images below a folder, at least one, in the order of their names."""
    folder = require_folder(folder, "It should hold images.")
    return images_below([folder], folder)[0]


def copies(paths, originals):
    """{path: original} of the paths to files whose bytes are those of an original's file."""
    paths = list(paths)
    sizes = {path.stat().st_size for path in paths}
    known = {path.read_bytes(): path for path in originals if path.stat().st_size in sizes}
    return {path: known[content] for path in paths if (content := path.read_bytes()) in known}


def count_supports(paths, folder, support_dir):
    """How many of the test images in a folder are supports, which is also said."""
    supports = [path for group in list_images(support_dir).values() for path in group] if support_dir else []
    if known := len(copies(paths, supports)):
        note(f"{known} of {len(paths)} images of {folder} are supports, which models know by heart")
    return known


def require_unseen(queries, trained_on):
    """Raises a UserError where a test image is, to the byte, one that is trained on."""
    for query, twin in copies(queries, trained_on).items():
        raise UserError(f"{query} is the same image as {twin}: what was trained on cannot test. Move one away.")


def open_image(path, name=None):
    """The image as an RGB PIL image: upright as its EXIF data say, transparent parts white, 16-bit grey scaled to 8. A
    UserError names a file that cannot be read as an image, by `name` where `path` is an open file."""
    with refusing(f"{name or path} cannot be read as an image ({{error}}): replace it, or move it away."):
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            with suppress(Exception):  # data that cannot be read say nothing
                image.getexif()
            for name in ("exif", "Raw profile type exif"):
                image.info.pop(name, None)  # read by now; else they are written back when the image turns: it may fail
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")


def square(image, size=None):
    """The central square of a PIL image, resized at once, with antialiasing, to `size` x `size` if given."""
    return ImageOps.fit(image.convert("RGB"), [size or min(image.size)] * 2, Image.Resampling.BICUBIC)


def as_tensor(image, size=None):
    """`square` as a float tensor [3, size, size] in [0, 1]: the one way to a model's input, and the C++ program's."""
    return TF.to_dtype(TF.to_image(square(image, size)), torch.float32, scale=True)


def load_image(path, size=None):
    """`open_image` as a float tensor [3, size, size] in [0, 1]."""
    return as_tensor(open_image(path), size)


def load_folder(folder, size=None, classes=None):
    """Images [N, 3, size, size] in [0, 1] of a folder (equal ones, without `size`), labels [N], classes, paths [N]."""
    by_class = list_images(folder, classes)
    paths, labels = with_labels(by_class)
    return torch.stack([load_image(path, size) for path in paths]), labels, list(by_class), paths


def with_labels(by_class):
    """{class name: items} as a list of items [N] and their labels, a tensor [N] of numbers of classes."""
    pairs = [(item, label) for label, group in enumerate(by_class.values()) for item in group]
    return [item for item, _ in pairs], torch.tensor([label for _, label in pairs])


def as_picture(image):
    """A tensor [3, H, W] in [0, 1] as a PIL image."""
    return TF.to_pil_image(image.mul(255).round().clamp(0, 255).byte())


def encode_image(image, image_format):
    """The bytes of a PNG or lossless WebP file of a tensor [3, H, W] in [0, 1]."""
    buffer = io.BytesIO()
    as_picture(image).save(buffer, image_format, lossless=True)
    return buffer.getvalue()


def shortened(words, font, width):
    """The words, without so much of their middle as it takes to be no wider than `width` pixels."""
    words = " ".join(words.splitlines())  # a file's name may hold several
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
    method = Image.Resampling.NEAREST if size <= side else Image.Resampling.BICUBIC
    font = ImageFont.truetype(FONT, max(12, side // 6))
    left = round(max((font.getlength(words) + font.size for words in lines), default=0))
    top = round(1.5 * font.size) if columns else 0

    def place(i, j):
        return left + i * (side + 2) + i // span * font.size, top + j * (side + 2)

    picture = Image.new("RGB", [side + end for end in place(count - 1, len(rows) - 1)], "white")
    write = partial(ImageDraw.Draw(picture).text, fill="black", font=font)
    for j, words in enumerate(lines):
        write((left - font.size // 2, place(0, j)[1] + side // 2), words, anchor="rm")
    for i, words in enumerate(columns):
        write((place(i * span, 0)[0], top // 2), shortened(words, font, span * (side + 2)), anchor="lm")
    for j, row in enumerate(rows):
        for i, image in enumerate(row):
            picture.paste(as_picture(image.float().cpu()).resize((side, side), method), place(i, j))
    with whole_file(path) as temporary:
        picture.save(temporary, "png")


def psnr(images, references):
    """Peak signal-to-noise ratio in dB of each image [B, 3, H, W] in [0, 1]."""
    return -10 * ((images - references) ** 2).mean((1, 2, 3)).log10()
