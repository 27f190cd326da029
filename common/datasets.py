"""Few-shot data sets: images of base, val and novel classes, and episodes drawn from them.

icons_fs      bundled; of val and novel classes the pool of drawings that no model has seen (see common/icons_fs.py)
cifar_fs      CIFAR-100, binary version (torchvision's is a pickle); split 64/16/20 by Bertinetto et al., 1805.08136
cub           CUB-200-2011 (Wah et al., 2011), DIR/images/<class>/; split 100/50/50 by Chen et al., 1904.04232
miniimagenet  64/16/20 classes of ImageNet (Vinyals et al., 1606.04080; split by Ravi and Larochelle, 2017), either as
              DIR/{train,val,test}/<class>/, or as DIR/images/ with DIR/{train,val,test}.csv (filename, label)
DIR           a folder of class folders with DIR/splits.json: {"base": [class names], "val": [...], "novel": [...]}

    python -m common.datasets --dataset icons_fs --output_dir outputs/demo

writes one episode as image folders: `support/<class>/` and, of the other images, `query/<class>/`.
"""

import csv
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from common import icons_fs
from common.cli import UserError, argument_parser, natural_int, positive_int, refuse_others, refusing, run
from common.images import as_picture, find_images, list_images, open_image
from common.records import check_settings, digest, keep_apart, read_json, settings_of, whole_folder, write_json

SPLITS = Path(__file__).parent.parent / "assets" / "splits"
MISSING = {
    "cifar_fs": "Download CIFAR-100's binary version (cifar-100-binary.tar.gz) from the University of Toronto, "
    "www.cs.toronto.edu/~kriz/cifar.html, and unpack it there, so that {0}/train.bin exists.",
    "cub": "Download CUB-200-2011 (CUB_200_2011.tgz) from Caltech, www.vision.caltech.edu/datasets/cub_200_2011, and "
    "unpack it there, so that {0}/images/001.Black_footed_Albatross exists.",
    "miniimagenet": "Make it of ImageNet's training images (image-net.org) with the lists of Ravi and Larochelle "
    "(github.com/twitter-research/meta-learning-lstm): {0}/train/<class>/*.jpg, {0}/val/..., {0}/test/..., or "
    "{0}/images/*.jpg with {0}/train.csv, val.csv and test.csv.",
}
DATASETS = ("icons_fs", *MISSING)


@dataclass(frozen=True)
class FewShotDataset:
    """The classes of one split.

    classes: {class name: references}, in the same order on every machine; a reference is a path, or a number as text.
    open: function of a class name and a reference to the image, PIL, RGB.
    """

    classes: dict
    open: Callable

    def fingerprint(self):
        """What tells these images from others: a hash of their names and files' sizes, for which none is opened."""
        return digest({name: [[r.name, r.stat().st_size] if isinstance(r, Path) else r for r in references]
                       for name, references in self.classes.items()})  # fmt: skip


def load_dataset(name, split, folder=None):
    """The split "base", "val", "novel" or another of a data set by name, or of a folder with splits.json. A UserError
    says what to do where data are missing or damaged."""
    if folder and name not in MISSING:
        raise UserError(f"--dataset_dir is for {', '.join(MISSING)}: leave it out.")
    if name == "icons_fs":
        names = classes_of(split, icons_fs.load_splits(), "Icons-FS")
        return load_icons_fs(names, ("base",) if split == "base" else ("episode",))
    if name not in MISSING:
        return load_split_folder(Path(name), split, Path(name) / "splits.json")
    folder = Path(folder or f"data/{name}")
    for unpacked in ("cifar-100-binary", "CUB_200_2011"):
        folder = folder / unpacked if (folder / unpacked).is_dir() else folder
    return {"cifar_fs": load_cifar_fs, "cub": load_cub, "miniimagenet": load_miniimagenet}[name](folder, split)


def classes_of(split, splits, owner):
    """The class names of a split, of {split: class names}."""
    if split not in splits:
        raise UserError(f"--split {split}: {owner} has {', '.join(splits)}.")
    return splits[split]


def missing(name, folder):
    return UserError(f"--dataset {name}: not found in {folder}. {MISSING[name].format(folder)}")


def load_web(name, folder=None):
    """Images of anything to mine from: those below a folder, or of Icons-FS those that mini-SD was trained on."""
    if folder:
        classes = {}
        for path in find_images(folder):
            classes.setdefault(str(path.parent.relative_to(folder)), []).append(path)
        return of_files(classes)
    if name == "icons_fs":
        return load_icons_fs([name for group in icons_fs.load_splits().values() for name in group], ("base", "web"))
    raise UserError(f"Images to mine from for {name}: give a folder of them with --web_dir.")


def load_icons_fs(names, pools):
    """The drawings of classes that belong to one of `pools`: see common/icons_fs.py."""
    classes, load = {}, cache(icons_fs.load_class)
    for name, facts in sorted(icons_fs.load_drawings().items()):
        references = [f"{i:03d}" for i, fact in enumerate(facts) if fact["pool"] in pools]
        if references and name in names:
            classes[name] = references
    return FewShotDataset(classes, lambda name, reference: as_picture(load(name)[int(reference)]))


def load_cifar_fs(folder, split):
    """All 600 images of a class: those of CIFAR-100's training part, then those of its test part."""
    *parts, names = (folder / file for file in ("train.bin", "test.bin", "fine_label_names.txt"))
    if not all(path.is_file() for path in (*parts, names)):
        raise missing("cifar_fs", folder)
    for path in parts:
        if not path.stat().st_size or path.stat().st_size % 3074:  # coarse label, fine label, 3 x 32 x 32 pixels
            raise UserError(f"{path} is damaged: its size is no multiple of 3074 bytes. Unpack it again.")
    records = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, 3074) for path in parts])
    names = names.read_text(errors="replace").split()
    wanted = classes_of(split, read_json(SPLITS / "cifar_fs.json"), "CIFAR-FS")
    labels, pixels = records[:, 1], records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    if labels.max() >= len(names) or not set(wanted) <= set(names):
        raise UserError(f"{folder / 'fine_label_names.txt'} lacks classes of CIFAR-100: unpack it again.")
    classes = {name: [f"{i:05d}" for i in np.flatnonzero(labels == names.index(name))] for name in sorted(wanted)}
    return FewShotDataset(classes, lambda name, reference: Image.fromarray(pixels[int(reference)].copy()))


def of_files(classes):
    return FewShotDataset(dict(sorted(classes.items())), lambda name, path: open_image(path))


def load_split_folder(folder, split, splits):
    """The class folders of `folder` that the file `splits` names."""
    if not folder.is_dir():
        raise UserError(f"--dataset {folder}: no such folder, and no known data set ({', '.join(DATASETS)}).")
    form = 'write {"base": [...], "val": [...], "novel": [...]} with class names.'
    if not splits.is_file():
        raise UserError(f"{splits} is missing: {form}")
    found = read_json(splits)
    groups = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(group, list) and set(map(type, group)) <= {str} for group in groups):
        raise UserError(f"{splits} holds something else: {form}")
    names, images = classes_of(split, found, splits), list_images(folder)
    absent = [name for name in names if name not in images]
    if not names or absent:
        raise UserError(f"{splits}: the split {split} has {len(names)} classes, of which {folder} lacks {absent[:5]}.")
    return of_files({name: images[name] for name in names})


def load_cub(folder, split):
    if not (folder / "images").is_dir():
        raise missing("cub", folder)
    return load_split_folder(folder / "images", split, SPLITS / "cub.json")


def load_miniimagenet(folder, split):
    part = classes_of(split, {"base": "train", "val": "val", "novel": "test"}, "miniImageNet")
    if (folder / part).is_dir():
        return of_files(list_images(folder / part))
    table = folder / f"{part}.csv"
    if not table.is_file() or not (folder / "images").is_dir():
        raise missing("miniimagenet", folder)
    classes = {}
    for filename, label in read_table(table):
        path = folder / "images" / filename
        if not path.is_file():
            raise UserError(f"{table} names {path}, which is missing: put it there, or remove the line.")
        classes.setdefault(label, []).append(path)
    return of_files({name: sorted(set(paths)) for name, paths in classes.items()})


def read_table(path):
    """The (file name, label) of each line of a CSV file."""
    should_be = f"{path} should be a CSV file with the columns filename and label ({{error}})."
    with refusing(should_be), path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if not {"filename", "label"} <= set(table.fieldnames or ()):
            raise ValueError(f"it has {table.fieldnames}")
        rows = [(row["filename"] or "", row["label"] or "") for row in table]
    for _, label in rows:
        if not label or label.startswith(".") or "/" in label:
            raise UserError(f"{path} has the label {label!r}, which can be no folder's name.")
    return rows


def draw_episode(dataset, num_ways, num_shots, seed, index):
    """Episode `index` of a data set, the same for everybody who asks with the same arguments: {class name: references
    in random order}. The first `num_shots` are the supports, the others queries: more never change an episode."""
    rng = np.random.default_rng([seed, index])
    if num_ways > len(dataset.classes):
        raise UserError(f"--num_ways {num_ways}: the split has {len(dataset.classes)} classes.")
    chosen = map(str, rng.choice(sorted(dataset.classes), num_ways, replace=False))
    episode = {name: [dataset.classes[name][i] for i in rng.permutation(len(dataset.classes[name]))] for name in chosen}
    for name, order in episode.items():
        if len(order) <= num_shots:
            raise UserError(f"--num_shots {num_shots}: {name} has {len(order)} images, supports and queries in all.")
    return episode


def write_images(dataset, chosen, folder):
    """Writes {class name: references} as image folders, which appear whole: files as they are, others as PNG."""
    with whole_folder(folder) as temporary:
        for name, references in chosen.items():
            (temporary / name).mkdir(parents=True, exist_ok=True)
            for reference in references:
                target = temporary / name / (reference.name if isinstance(reference, Path) else f"{reference}.png")
                while target.exists():  # of another folder of the class
                    target = target.with_stem(f"{target.stem}-{len(list(target.parent.iterdir()))}")
                if isinstance(reference, Path):
                    shutil.copyfile(reference, target)
                else:
                    dataset.open(name, reference).save(target)


def add_options(add, dataset=None):
    """The options that say which episodes are meant; without --dataset, `dataset` is."""
    add("--dataset", default=dataset, help=f"{', '.join(DATASETS)}, or a folder of class folders with splits.json")
    add("--dataset_dir", help="where the data set lies; default: data/<name>")
    add("--split", default="novel", help="the classes to draw from: base, val, novel, or what else the data set has")
    add("--num_ways", type=positive_int, default=5, help="classes in an episode")
    add("--num_shots", type=positive_int, default=5, help="support images a class")


def main(args):
    keep_apart(args)
    output_dir = Path(args.output_dir)
    dataset = load_dataset(args.dataset, args.split, args.dataset_dir)
    record, settings = output_dir / "episode.json", settings_of(args) | {"images": dataset.fingerprint()}
    if not check_settings(record, settings):
        refuse_others(output_dir / "support", output_dir / "query")
    episode = draw_episode(dataset, args.num_ways, args.num_shots, args.seed, args.episode)
    write_json(record, {"settings": settings})
    for part, chosen in (("query", slice(args.num_shots, None)), ("support", slice(args.num_shots))):
        if not (output_dir / part).is_dir():
            write_images(dataset, {name: order[chosen] for name, order in episode.items()}, output_dir / part)
    queries = sum(map(len, episode.values())) - args.num_ways * args.num_shots
    print(f"{output_dir}: {', '.join(episode)}; {args.num_shots} supports each, {queries} queries in all")


def parse_args():
    parser = argument_parser(__doc__, "outputs/demo")
    add_options(parser.add_argument, "icons_fs")
    parser.add_argument("--episode", type=natural_int, default=0, help="which episode; each number gives another")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args)
