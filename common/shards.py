"""Generated images: in class folders with metadata.jsonl, or in WebDataset shards, tar files of many images each."""

import io
import json
from pathlib import Path

from common.cli import UserError
from common.images import list_images, open_image, square
from common.records import read_json_lines, whole_file


def load_webdataset():
    try:
        import webdataset
    except ImportError as error:
        raise UserError("Tar shards need the package webdataset (pip install webdataset).") from error
    return webdataset


def write_shard(path, rows, images):
    """Writes a shard: of each row <label>/<index>.json, and its image unless its `file_name` is None.

    Args:
        images: of each row the bytes of an image file.
    """
    webdataset = load_webdataset()
    with whole_file(path) as temporary, temporary.open("wb") as file:
        with webdataset.TarWriter(file, mtime=0) as shard:
            for row, image in zip(rows, images):
                sample = {"__key__": f"{row['label']}/{row['index']:05d}", "json": row}
                if row["file_name"]:
                    sample[Path(row["file_name"]).suffix[1:]] = image
                shard.write(sample)


def list_samples(folder, classes):
    """The files that hold the images of a folder of either kind: {class name: paths}, shards as those of "".

    Raises:
        UserError: neither kind of folder, an unfinished one, or its classes are not `classes`.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        return list_images(folder, classes)
    if not (folder / "metadata.jsonl").is_file():
        raise UserError(f"{folder} has no metadata.jsonl: tint_generate.py has not finished. Start it again.")
    rows = read_json_lines(folder / "metadata.jsonl")
    found = {str(row.get("label")) if isinstance(row, dict) else "?" for row in rows}
    if found != set(classes):
        raise UserError(f"{folder} has images of {sorted(found)}, and {sorted(classes)} are wanted.")
    return {"": shards}


def open_samples(folder, size=None, wanted=None):
    """The rows of metadata and PIL images of a folder of either kind, one after the other, without what was dropped.

    Images that metadata.jsonl does not know have rows of `file_name` and `label`.

    Args:
        size: side of the central square that all become; None keeps them as they are. wanted: file names; default: all.
    Raises:
        UserError: neither kind of folder, or an image or shard cannot be read.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("*.tar"))
    for row, source in read_shards(folder, shards) if shards else read_folder(folder):
        if wanted is None or row["file_name"] in wanted:
            image = open_image(source)
            yield row, square(image, size) if size else image


def read_metadata(folder):
    """{file name: row} of metadata.jsonl, which may be missing, or somebody else's, with rows of any kind."""
    path = folder / "metadata.jsonl"
    rows = [row for row in read_json_lines(path) if isinstance(row, dict)] if path.is_file() else []
    return {row["file_name"]: row for row in rows if isinstance(row.get("file_name"), str)}


def read_folder(folder):
    known = read_metadata(folder)
    for label, paths in list_images(folder).items():
        for path in paths:
            name = path.relative_to(folder).as_posix()
            yield known.get(name, {}) | {"file_name": name, "label": label}, path  # the folder is the label


def read_shards(folder, shards):
    webdataset, missing = load_webdataset(), read_metadata(folder)
    urls = [str(shard.resolve()) for shard in shards]  # in other paths it finds schemes
    try:
        for sample in webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=iter):
            row = json.loads(sample["json"])
            if row["file_name"]:
                missing.pop(row["file_name"], None)
                yield row, io.BytesIO(sample[Path(row["file_name"]).suffix[1:]])
    except Exception as error:  # tarfile, webdataset and json each raise their own kinds
        raise UserError(f"{folder} holds a damaged shard ({error}): generate again elsewhere.") from error
    if missing:  # of a shard that is not there, or was cut off between two images
        raise UserError(
            f"The shards of {folder} lack {len(missing)} images, as {min(missing)}: generate again elsewhere."
        )
