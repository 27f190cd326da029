"""From files to a model's input: formats, folders and links, and the same pixels for every script."""

import json
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base

import distill
import evaluate
import export
import tint_invert
from common import models
from common.cli import UserError, note
from common.images import find_images, list_images, load_image, open_image
from common.shards import list_samples, open_samples
from tests import ROOT
from tests.conftest import launch


def photo(seed, width=400, height=300):
    """Colours that change slowly and a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    return Image.fromarray((np.asarray(coarse) * 0.9 + rng.uniform(0, 25, (height, width, 3))).astype(np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of three photographs, 400 x 300 and 301 x 402, and a splits.json that makes them novel."""
    root = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(("one", "three", "two")):
        (root / name).mkdir()
        for k in range(3):
            photo(3 * i + k, *((301, 402) if k == 1 else (400, 300))).save(root / name / f"{k}.png")
    (root / "splits.json").write_text(json.dumps({"base": ["one"], "val": ["two"], "novel": ["one", "three", "two"]}))
    return root


def pixels_of(path, size):
    """The central square of an image, cut and resized at once, as the C++ program does it (see tests/test_cpp.py)."""
    with Image.open(path) as image:
        left, top = ((side - min(image.size)) / 2 for side in image.size)
        box = left, top, image.width - left, image.height - top
        resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255


def test_every_script_gives_a_model_the_same_pixels(photos, tmp_path, monkeypatch):
    """Distillation (teacher and student), evaluation, episodes, export and inversion, of photographs not square."""
    seen, normalize = [], models.normalize

    def watch(model, images):
        seen.append(images)
        return normalize(model, images)

    monkeypatch.setattr(models, "normalize", watch)

    def expect(size, paths=None):
        """Among the images of this size that a model has seen is each of the files."""
        shown = torch.cat([x for x in seen if x.shape[-1] == size])
        for path in paths or sorted(photos.glob("*/*.png")):
            expected = pixels_of(path, size)
            assert any(torch.allclose(x, expected, atol=1e-6) for x in shown), (size, path)
        seen.clear()

    distill.main(distill.parse_args(["--support_dir", str(photos), "--supports_only", "--max_train_steps", "1",
                                     "--train_batch_size", "4", "--output_dir", f"{tmp_path}/student"]))  # fmt: skip
    support = list(seen)
    expect(64)  # the teacher's
    seen[:] = support
    expect(32)  # the student's own prototypes
    evaluate.main(evaluate.parse_args(["--data_dir", str(photos), "--model", f"a={tmp_path / 'student'}",
                                       "--output_dir", str(tmp_path / "folder")]))  # fmt: skip
    expect(32)
    evaluate.main(evaluate.parse_args([
        "--dataset", str(photos), "--num_ways", "3", "--num_shots", "1", "--num_queries", "2", "--num_episodes", "1",
        "--methods", "prototypes", "teacher", "--output_dir", str(tmp_path / "episodes"),
    ]))  # fmt: skip
    support = list(seen)
    expect(32)
    seen[:] = support
    expect(64)
    student = models.load_model(str(tmp_path / "student"))
    args = export.parse_args(["--model", str(tmp_path / "student"), "--data_dir", str(photos), "--query_dir",
                              str(photos)])  # fmt: skip
    seen += export.read_images(args, student, models.class_names(tmp_path / "student"))[:1]
    expect(32)
    seen += export.read_images(args, student, models.class_names(tmp_path / "student"))[1:2]
    expect(32)
    seen.append(torch.stack([tint_invert.load_support(path, 40) for path in sorted(photos.glob("*/*.png"))]))
    expect(40)


@pytest.mark.parametrize(
    "suffix", ["bmp", "tiff", "TIF", "gif", "heic", "avif", "jpg", "mpo", "webp", "jp2", "ppm", "tga"]
)
def test_formats_of_photographs_are_read(suffix, tmp_path):
    if suffix == "heic":
        pytest.importorskip("pillow_heif")
    image = photo(0, 64, 48)
    (tmp_path / "a").mkdir()
    lossy = {"quality": 95} if suffix in ("heic", "avif", "jpg", "mpo") else {}
    image.save(tmp_path / "a" / f"x.{suffix}", **lossy)
    (path,) = list_images(tmp_path)["a"]
    difference = np.abs(np.asarray(open_image(path), float) - np.asarray(image, float)).mean()
    assert difference < (0.01 if suffix in ("bmp", "tiff", "TIF", "ppm", "tga") else 12)


def test_an_orientation_counts_whatever_else_the_exif_data_hold(tmp_path):
    """A resolution of -1/0, which Pillow reads and cannot write; and data that cannot be read say nothing."""
    image = photo(1, 64, 48)

    def entry(tag, kind, count, value):
        return struct.pack("<HHI4s", tag, kind, count, value)

    def exif(*entries):
        head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries)
        return b"Exif\0\0" + head + struct.pack("<I", 0) + struct.pack("<ii", -1, 0)

    turn = entry(Base.Orientation, 3, 1, struct.pack("<HH", 6, 0))
    resolution = entry(Base.XResolution, 5, 1, struct.pack("<I", 8 + 2 + 24 + 4))
    for name, data in {"turned": exif(turn, resolution), "broken": b"Exif\0\0II*\0\xff\xff", "none": b""}.items():
        image.save(tmp_path / f"{name}.png", exif=data)
    assert open_image(tmp_path / "turned.png").size == (48, 64)
    np.testing.assert_array_equal(open_image(tmp_path / "turned.png"), image.transpose(Image.Transpose.ROTATE_270))
    for name in ("broken", "none"):
        np.testing.assert_array_equal(open_image(tmp_path / f"{name}.png"), image)


def test_folders_links_and_odd_names_are_followed_and_the_rest_is_counted(tmp_path, capfd):
    note.cache_clear()
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (photos / "a" / "deep" / "er", photos / "b" / "x.png", elsewhere):
        folder.mkdir(parents=True)
    images = [photos / "a" / "1.png", photos / "a" / "deep" / "1.png", photos / "a" / "deep" / "er" / "2.JPG",
              photos / "b" / "x.png" / "3.png", elsewhere / "4.png"]  # fmt: skip
    for i, path in enumerate(images):
        photo(i, 20, 20).save(path)
    odd = os.fsdecode(os.fsencode(photos / "b") + b"/caf\xe9.png")
    photo(9, 20, 20).save(odd)
    (photos / "b" / "linked").symlink_to(elsewhere)
    (photos / "b" / "again").symlink_to(elsewhere)
    (photos / "a" / "loop").symlink_to(photos / "a")
    (photos / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "a" / "self.png").symlink_to("self.png")
    for name in ("clip.mov", "other.MOV", ".DS_Store", "notes"):
        (photos / "a" / name).write_bytes(b"")
    found = list_images(photos)
    assert found["a"] == images[:3]
    assert [path.name.encode(errors="surrogateescape") for path in found["b"]] == [b"4.png", b"caf\xe9.png", b"3.png"]
    assert len(find_images(photos)) == 6
    error = capfd.readouterr().err
    assert error == f"{photos}: left out 2 .mov, 2 links to nothing, 1 without extension\n"
    photo(9, 20, 20).save(photos / "loose.png")
    (photos / "readme.txt").write_text("no image")
    assert list_images(photos) == found
    assert "1 images of no class's folder, 2 links to nothing" in capfd.readouterr().err
    (photos / "loose.png").unlink()
    (photos / "c\nd").mkdir()
    with pytest.raises(UserError, match="a class needs a name that can be printed"):
        list_images(photos)


def test_a_student_learns_from_linked_and_oddly_named_photos(photos, tmp_path):
    """Each file counts once, and its name, which is no UTF-8, is in the way of nothing."""
    (tmp_path / "support").mkdir()
    for name in ("one", "two"):
        (tmp_path / "support" / name).symlink_to(photos / name)
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "linked").symlink_to(photos)
    photo(1).save(os.fsdecode(os.fsencode(tmp_path / "more" / "deep") + b"/caf\xe9.bmp"))
    _, error = launch("distill.py", "--support_dir", tmp_path / "support", "--unlabeled_dir", tmp_path / "more",
                      "--max_train_steps", 1, "--train_batch_size", 4, "--output_dir", tmp_path / "out")  # fmt: skip
    assert json.loads((tmp_path / "out" / "distill.json").read_text())["images"] == [6, 10]
    assert f"{tmp_path / 'more'}: left out 1 .json\n" in error
    command = ["--model", str(tmp_path / "out"), "--data_dir", str(tmp_path / "test")]
    for right, wrong in ("one", "two"), ("two", "one"):
        target = tmp_path / "test" / wrong / os.fsdecode(b"caf\xe9.png")
        target.parent.mkdir(parents=True)
        target.write_bytes((photos / right / "0.png").read_bytes())
    evaluate.main(evaluate.parse_args([*command, "--output_dir", str(tmp_path / "evaluation")]))
    assert (tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8").count("caf\\udce9.png") == 2


def test_what_scripts_draw_to_look_at_is_no_image(run_dir, capfd):
    note.cache_clear()
    assert {path.name for path in run_dir.glob("*/grid.png")} and len(find_images(run_dir / "generated")) == 12
    assert "left out 1 .json, 1 .jsonl, 1 overviews" in capfd.readouterr().err
    with pytest.raises(UserError, match="holds no image"):
        list_images(run_dir / "inversion")


def test_a_missing_default_input_names_the_command_that_makes_it(tmp_path):
    for script, folder, command in (
        ("distill.py", "outputs/demo/support", "python -m common.datasets"),
        ("tint_invert.py", "outputs/demo/support", "python -m common.datasets"),
        ("evaluate.py", "outputs/demo/query", "python -m common.datasets"),
    ):
        _, error = launch(ROOT / script, cwd=tmp_path, code=2)
        assert folder in error and f"`{command}` makes it" in error


def test_what_cannot_be_read_is_named(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tiff")
    (tmp_path / "page.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")  # would start a program
    for name in ("float.tiff", "page.png"):
        with pytest.raises(UserError, match=f"{name} cannot be read as an image"):
            load_image(tmp_path / name)


def test_a_foreign_metadata_file_is_in_the_way_of_nothing(photos, tmp_path):
    """Its rows may be of any kind; an image's class is its folder."""
    for path in photos.glob("*/0.png"):
        target = tmp_path / path.relative_to(photos)
        target.parent.mkdir()
        target.write_bytes(path.read_bytes())
    rows = [{"file_name": "one/0.png", "label": "cat", "text": "a photo"}, {"text": "no name"}, ["a"], 3, None,
            {"file_name": ["one/0.png"]}, {"file_name": None, "label": "one"}]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [row for row, _ in open_samples(tmp_path)]
    assert [row["label"] for row in found] == ["one", "three", "two"] and found[0]["text"] == "a photo"
    assert list(list_samples(tmp_path, ["one", "three", "two"])) == ["one", "three", "two"]
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(UserError, match="are wanted"):
        list_samples(tmp_path, ["one", "three", "two"])
