"""Each data set from a small folder in its real layout, what is said where it is missing or damaged, and episodes."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from common import icons_fs
from common.cli import UserError
from common.datasets import SPLITS, draw_episode, load_dataset, write_images
from tests.conftest import launch


def make_images(folder, count, suffix=".jpg"):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (6, 5), (40 * i, 10, 10)).save(folder / f"{i:02d}{suffix}")


def make_cifar(folder):
    """CIFAR-100's binary version with three images of a class: two in the training part, one in the test part."""
    folder.mkdir(parents=True)
    names = sorted(name for part in json.loads((SPLITS / "cifar_fs.json").read_text()).values() for name in part)
    (folder / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    rng = np.random.default_rng(0)
    for file, labels in (("train.bin", [*range(100)] * 2), ("test.bin", range(100))):
        records = rng.integers(0, 256, (len(labels), 3074), dtype=np.uint8)
        records[:, 1] = labels
        records.tofile(folder / file)
    return names


def test_split_files_hold_disjoint_classes():
    for name, sizes in (("cifar_fs", (64, 16, 20)), ("cub", (100, 50, 50))):
        splits = json.loads((SPLITS / f"{name}.json").read_text())
        assert tuple(len(splits[part]) for part in ("base", "val", "novel")) == sizes
        assert len({c for part in splits.values() for c in part}) == sum(sizes)


def test_cifar_fs_is_the_binary_version(tmp_path):
    names = make_cifar(tmp_path / "cifar-100-binary")
    dataset = load_dataset("cifar_fs", "novel", tmp_path)
    assert len(dataset.classes) == 20 and all(len(references) == 3 for references in dataset.classes.values())
    name = min(dataset.classes)
    label = names.index(name)
    raw = (tmp_path / "cifar-100-binary" / "test.bin").read_bytes()[label * 3074 : (label + 1) * 3074]
    assert raw[1] == label
    pixels = np.asarray(dataset.open(name, dataset.classes[name][2]))  # red plane first, row by row
    assert pixels.shape == (32, 32, 3) and pixels[0, 5, 0] == raw[2 + 5] and pixels[3, 1, 2] == raw[2 + 2048 + 97]

    (tmp_path / "cifar-100-binary" / "test.bin").write_bytes(b"short")
    with pytest.raises(UserError, match=r"test.bin is damaged"):
        load_dataset("cifar_fs", "novel", tmp_path)


def test_cub_is_its_own_folder(tmp_path):
    splits = json.loads((SPLITS / "cub.json").read_text())
    for name in (name for part in splits.values() for name in part):
        make_images(tmp_path / "CUB_200_2011" / "images" / name, 2)
    for part, count in (("base", 100), ("val", 50), ("novel", 50)):
        dataset = load_dataset("cub", part, tmp_path)
        assert list(dataset.classes) == sorted(splits[part]) and len(dataset.classes) == count
    name = min(splits["novel"])
    assert dataset.open(name, dataset.classes[name][1]).getpixel((1, 1))[0] == pytest.approx(40, abs=3)
    (tmp_path / "CUB_200_2011" / "images" / name).rename(tmp_path / "gone")
    with pytest.raises(UserError, match=name):
        load_dataset("cub", "novel", tmp_path)


def test_miniimagenet_has_two_layouts(tmp_path):
    for part in ("train", "val", "test"):
        for wnid in ("n01", "n02"):
            make_images(tmp_path / "folders" / part / f"{wnid}{part}", 3)
    make_images(tmp_path / "csv" / "images", 6)
    for part in ("train", "val", "test"):
        rows = [f"{i:02d}.jpg,n{i % 2}{part}" for i in (*range(6), 0, 1)]  # a line that is there twice counts once
        (tmp_path / "csv" / f"{part}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")
    for layout, classes in (("folders", ["n01test", "n02test"]), ("csv", ["n0test", "n1test"])):
        dataset = load_dataset("miniimagenet", "novel", tmp_path / layout)
        assert list(dataset.classes) == classes and [len(r) for r in dataset.classes.values()] == [3, 3]
        assert dataset.open(classes[0], dataset.classes[classes[0]][0]).size == (6, 5)

    (tmp_path / "csv" / "images" / "03.jpg").unlink()
    with pytest.raises(UserError, match=r"val.csv names .*03.jpg, which is missing"):
        load_dataset("miniimagenet", "val", tmp_path / "csv")
    (tmp_path / "csv" / "test.csv").write_text("file,class\n")
    with pytest.raises(UserError, match="columns filename and label"):
        load_dataset("miniimagenet", "novel", tmp_path / "csv")
    for label in ("../n0", "a/b", "..", ""):
        (tmp_path / "csv" / "test.csv").write_text(f"filename,label\n00.jpg,{label}\n")
        with pytest.raises(UserError, match="which can be no folder's name"):
            load_dataset("miniimagenet", "novel", tmp_path / "csv")
    (tmp_path / "csv" / "test.csv").write_bytes(b"filename,label\n\xff\xfe00.jpg,n0\n")
    with pytest.raises(UserError, match="should be a CSV file"):
        load_dataset("miniimagenet", "novel", tmp_path / "csv")


def test_a_folder_with_splits(tmp_path):
    for name in "abc":
        make_images(tmp_path / name, 4, ".png")
    with pytest.raises(UserError, match=r"splits.json is missing: write"):
        load_dataset(str(tmp_path), "novel")
    (tmp_path / "splits.json").write_text(json.dumps({"base": ["a"], "val": ["c", "d"], "novel": ["b", "c"]}))
    assert list(load_dataset(str(tmp_path), "novel").classes) == ["b", "c"]
    with pytest.raises(UserError, match=r"lacks \['d'\]"):
        load_dataset(str(tmp_path), "val")
    with pytest.raises(UserError, match="no known data set"):
        load_dataset(str(tmp_path / "none"), "val")
    for damaged in ([], ["b"], {"novel": "abc"}, {"novel": [["a"]]}):
        (tmp_path / "splits.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"splits.json holds something else: write"):
            load_dataset(str(tmp_path), "novel")


def test_a_split_that_a_data_set_lacks_is_told_from_those_it_has(tmp_path):
    make_cifar(tmp_path / "cifar")
    make_images(tmp_path / "mini" / "train" / "n01", 1)
    make_images(tmp_path / "own" / "a", 1)
    (tmp_path / "own" / "splits.json").write_text(json.dumps({"base": [], "far": ["a"]}))
    assert list(load_dataset(str(tmp_path / "own"), "far").classes) == ["a"]
    for name, folder, has in (
        ("icons_fs", None, ", ".join(icons_fs.load_splits())),
        ("cifar_fs", tmp_path / "cifar", "base, val, novel"),
        ("miniimagenet", tmp_path / "mini", "base, val, novel"),
        (str(tmp_path / "own"), None, "base, far"),
    ):
        for split in ("web", "test", ""):
            with pytest.raises(UserError, match=f"--split {split}: .* has {has}"):
                load_dataset(name, split, folder)
    _, error = launch("-m", "common.datasets", "--split", "tests", "--output_dir", tmp_path / "out", code=2)
    assert "--split tests: Icons-FS has base, val, novel" in error and not (tmp_path / "out").exists()


def test_missing_data_says_what_to_get_and_where_to_put_it(tmp_path):
    for name, words in (
        ("cifar_fs", ("cifar-100-binary.tar.gz", "toronto.edu", "train.bin")),
        ("cub", ("CUB_200_2011.tgz", "caltech.edu", "001.Black_footed_Albatross")),
        ("miniimagenet", ("image-net.org", "train.csv")),
    ):
        _, error = launch("evaluate.py", "--dataset", name, "--dataset_dir", tmp_path / name, "--methods", "teacher",
                          "--output_dir", tmp_path / "out", code=2)  # fmt: skip
        assert all(word in error for word in (*words, str(tmp_path / name))), error


def test_episodes_are_the_same_for_all_and_supports_are_no_queries(tmp_path):
    dataset = load_dataset("icons_fs", "novel")
    first, again, other = (draw_episode(dataset, 5, 5, 0, index) for index in (3, 3, 4))
    assert first == again != other
    assert draw_episode(dataset, 5, 2, 0, 3) == first  # fewer shots: the same images, of which more are queries
    assert all(sorted(order) == sorted(dataset.classes[name]) for name, order in first.items())
    launch("-m", "common.datasets", "--episode", 3, "--output_dir", tmp_path)
    for name, order in first.items():
        written = [{p.stem for p in (tmp_path / part / name).iterdir()} for part in ("support", "query")]
        assert written == [set(order[:5]), set(order[5:])]
    with pytest.raises(UserError, match="--num_ways 99"):
        draw_episode(dataset, 99, 5, 0, 0)
    with pytest.raises(UserError, match="--num_shots 5000"):
        draw_episode(dataset, 5, 5000, 0, 0)


def test_another_folder_than_the_named_data_set_is_refused(tmp_path):
    for name in ("icons_fs", tmp_path):
        with pytest.raises(UserError, match="--dataset_dir is for cifar_fs, cub, miniimagenet"):
            load_dataset(str(name), "novel", str(tmp_path / "elsewhere"))


def test_an_episode_of_other_images_is_not_taken_for_the_same(tmp_path):
    for name in ("a", "b", "c"):
        make_images(tmp_path / "data" / name, 3)
    command = ("-m", "common.datasets", "--dataset", tmp_path / "data", "--num_ways", 2, "--num_shots", 1,
               "--output_dir", tmp_path / "episode")  # fmt: skip
    for classes, code in ((["a", "b"], 0), (["a", "b"], 0), (["a", "c"], 2)):
        (tmp_path / "data" / "splits.json").write_text(json.dumps({"novel": classes}))
        _, error = launch(*command, code=code)
    assert "with other settings or images (images" in error
    assert sorted(path.name for path in (tmp_path / "episode" / "query").iterdir()) == ["a", "b"]


def test_files_are_copied_as_they_are(tmp_path):
    make_images(tmp_path / "data" / "train" / "n01", 2)
    dataset = load_dataset("miniimagenet", "base", tmp_path / "data")
    write_images(dataset, dataset.classes, tmp_path / "support")
    copies = sorted((tmp_path / "support" / "n01").iterdir())
    assert [c.read_bytes() for c in copies] == [p.read_bytes() for p in dataset.classes["n01"]]


def test_files_of_one_name_are_all_copied(tmp_path):
    """Whatever the others are called, in whatever order they come."""
    paths = [tmp_path / name for name in ("a-2.png", "a.png", "sub/a.png", "sub/deep/a.png", "z.png")]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]))
    for number, order in enumerate(itertools.permutations(paths)):
        write_images(None, {"n": order}, tmp_path / f"copy{number}")
        copied = {path.read_bytes() for path in (tmp_path / f"copy{number}" / "n").iterdir()}
        assert copied == {bytes([k]) for k in range(len(paths))}
