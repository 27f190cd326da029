"""Generated images: in class folders with metadata.jsonl, or in WebDataset shards, tar files of many images each."""

import io
import json
from pathlib import Path

from common.cli import UserError, optional, refusing
from common.images import list_images, open_image, square
from common.records import read_json_lines, whole_file

ROWS = ".rows"  # the folder of metadata of the chunks that an unfinished tint_generate.py has made


def write_shard(path, rows, images):
    """Writes a shard: of each row <label>/<index>.json, and, unless its `file_name` is None, the bytes of its image."""
    writer = optional("webdataset", "A tar shard").TarWriter
    with whole_file(path) as temporary, temporary.open("wb") as file, writer(file, mtime=0) as shard:
        for row, image in zip(rows, images):
            sample = {"__key__": f"{row['label']}/{row['index']:05d}", "json": row}
            if row["file_name"]:
                sample[Path(row["file_name"]).suffix[1:]] = image
            shard.write(sample)


def shards_of(folder):
    """The shards in a folder, by the numbers that are their names: other archives are somebody's."""
    return sorted(path for path in Path(folder).glob("*.tar") if path.stem.isdigit() and path.is_file())


def require_finished(folder):
    """Raises a UserError where tint_generate.py has begun in a folder, and has not finished."""
    begun = shards_of(folder) or Path(folder, "generation.json").is_file()
    if (begun and not Path(folder, "metadata.jsonl").is_file()) or Path(folder, ROWS).is_dir():
        raise UserError(f"{folder}: tint_generate.py has not finished. Start it again.")


def list_samples(folder, classes):
    """The files of a folder of either kind, which must be of `classes`: {class name: paths}, shards as those of ""."""
    require_finished(folder)
    shards = shards_of(folder)
    if not shards:
        return list_images(folder, classes)
    rows = read_json_lines(Path(folder, "metadata.jsonl"))
    found = {str(row.get("label")) if isinstance(row, dict) else "?" for row in rows}
    if found != set(classes):
        raise UserError(f"{folder} has images of {sorted(found)}, and {sorted(classes)} are wanted.")
    return {"": shards}


def open_samples(folder, size=None, wanted=None):
    """The rows of metadata and PIL images of a folder of either kind, one after the other, without what was dropped: of
    `wanted` file names or all, as they are or as central squares of side `size`. Images that metadata.jsonl does not
    know have rows of `file_name` and `label`."""
    folder = Path(folder)
    shards = shards_of(folder)
    for row, source in read_shards(folder, shards) if shards else read_folder(folder):
        if wanted is None or row["file_name"] in wanted:
            image = open_image(source, folder / row["file_name"])
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
            yield known.get(name, {}) | {"file_name": name, "label": label}, path


def read_shards(folder, shards):
    dataset, missing = optional("webdataset", "A tar shard").WebDataset, read_metadata(folder)
    urls, empty = [str(shard.resolve()) for shard in shards], True  # in other paths it finds schemes
    with refusing(f"{folder} holds a damaged shard ({{error}}): generate again elsewhere."):
        for sample in dataset(urls, shardshuffle=False, nodesplitter=iter):
            row = json.loads(sample["json"])
            if row["file_name"]:
                missing.pop(row["file_name"], None)
                empty = False
                yield row, io.BytesIO(sample[Path(row["file_name"]).suffix[1:]])
    if missing:  # of a shard that is not there, or was cut off between two images
        raise UserError(f"{folder}: shards lack {len(missing)} images, as {min(missing)}: generate again elsewhere.")
    if empty:  # all were dropped
        raise UserError(f"{folder} holds no image.")
