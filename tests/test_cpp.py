"""The C++ program and the package that it runs: it reads images as Python does, answers the same, and says what is
wrong. Both are compiled once."""

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from common import models
from common.cli import UserError
from common.images import load_image
from common.preprocessing import WithPreprocessing
from common.runtimes import open_exported
from common.runtimes.aotinductor import AotInductor, build_package
from tests.conftest import ROOT
from tests.pictures import save_pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    stb = [Path(folder) / "stb_image.h" for folder in ("/usr/include/stb", "/usr/include", "/usr/local/include")]
    ready = shutil.which("cmake") and shutil.which("g++") and any(map(Path.is_file, stb))
    if not ready and not os.environ.get("CI"):  # there the build below fails instead
        pytest.skip("needs cmake, a C++ compiler and stb (Debian: apt-get install cmake g++ libstb-dev)")
    folder = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", ROOT / "cpp", "-B", folder, prefix], ["cmake", "--build", folder]):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, result.stdout
        assert "warning" not in result.stdout
    return folder / "classify"


@pytest.fixture(scope="module")
def student(run_dir):
    return models.load_model(str(run_dir / "student"))


def compiled(student, batch_size, folder, max_batch_size=256):
    path = folder / "student.pt2"
    classes = student.pretrained_cfg["label_names"]
    build_package(WithPreprocessing(student).eval(), classes, batch_size, CPU, path, max_batch_size)
    assert list(folder.iterdir()) == [path]
    return path


@pytest.fixture(scope="module")
def package(student, tmp_path_factory):
    return compiled(student, None, tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def package_of_three(student, tmp_path_factory):
    """A package that takes three images and no other number."""
    return compiled(student, 3, tmp_path_factory.mktemp("package_of_three"))


def changed(package, path, **changes):
    """Writes a copy of a package with other metadata; None removes an entry."""
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("metadata.json"):
                entries = json.loads(data) | changes
                data = json.dumps({key: value for key, value in entries.items() if value is not None})
            copy.writestr(name, data)
    return path


def call(program, *arguments, code=0):
    """Runs the program; what it printed to stdout and stderr."""
    result = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout, result.stderr


def answers(program, package, paths, *options):
    """[{class: probability}] of the files, which the program must name in their order."""
    lines = [line.split("\t") for line in call(program, package, *paths, *options)[0].splitlines()]
    assert [line[0] for line in lines] == list(map(str, paths))
    return [dict(zip(line[1::2], map(float, line[2::2]))) for line in lines]


def test_answers_as_python_does_on_every_kind_of_image(
    program, package, package_of_three, student, run_dir, tmp_path, monkeypatch
):
    """PNG to the last printed digit; JPEG decoders differ by a few grey levels (3 at most, 0.1 on average)."""
    pictures = save_pictures(tmp_path)
    assert len(pictures) >= 100
    paths = [*sorted((run_dir / "support").rglob("*.png")), *pictures]  # more than one batch of them
    images = torch.stack([load_image(path, 32) for path in paths])
    with torch.inference_mode():
        expected = student(models.normalize(student, images)).softmax(-1)
    assert set(expected.argmax(-1).tolist()) == {0, 1}
    assert expected[8:, 0].std() > 0.05  # the pictures do not look alike to the student
    classes = student.pretrained_cfg["label_names"]
    found = answers(program, package, paths, "--top", 2)
    for path, row, probabilities in zip(paths, found, expected.tolist()):
        tolerance = 1e-5 if path.suffix == ".png" else 5e-3
        assert row == pytest.approx(dict(zip(classes, probabilities)), abs=tolerance), path.name
        assert list(row.values()) == sorted(row.values(), reverse=True), path.name
    assert answers(program, package, paths[:3], "--top", 1, "--threads", 1) == [
        dict([next(iter(row.items()))]) for row in found[:3]
    ]
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")  # else a batch not filled up would be read beyond its end
    for row, other in zip(answers(program, package_of_three, paths[:5]), found):
        assert row == pytest.approx(other, abs=2e-6)


def test_benchmark_prints_a_table(program, package):
    out, _ = call(program, package, "--benchmark", "--batch_sizes", 1, 3, "--threads", 1)
    title, blank, head, line, *rows = out.splitlines()
    assert re.fullmatch(r"Latency on cpu, 1 threads of \d+ cores", title) and not blank
    assert head == "| batch | calls | median ms | p90 ms | p99 ms | images/s |"
    assert line == "|" + "---|" * 6
    numbers = [[float(cell) for cell in row.strip("| ").split(" | ")] for row in rows]
    assert [row[0] for row in numbers] == [1, 3]
    for batch, calls, median, p90, p99, rate in numbers:
        assert 0 < median <= p90 <= p99 and rate == pytest.approx(1e3 * batch / median, rel=0.02)
        assert calls >= 200 or calls * p99 > 1000  # two seconds, most of them in calls


def test_mistakes_get_one_line_and_exit_code_2(program, package, run_dir, tmp_path):
    picture = next((run_dir / "support").rglob("*.png"))
    half, noise, bad_bit = (tmp_path / name for name in ("half.jpg", "noise.png", "bad_bit.png"))
    Image.open(picture).convert("RGB").save(half)
    half.write_bytes(half.read_bytes()[:-50])
    noise.write_bytes(b"noise" * 20)
    data = bytearray(picture.read_bytes())
    data[len(data) // 2] ^= 1
    bad_bit.write_bytes(data)
    webp = tmp_path / "picture.webp"
    Image.open(picture).save(webp)
    lacking = changed(package, tmp_path / "lacking.pt2", input_size=None)
    cases = [
        ([tmp_path / "none.pt2", picture], "none.pt2: no such file"),
        ([picture, picture], f"{picture.name} is no package"),
        ([lacking, picture], "lacking.pt2 is no package of export.py for this machine and libtorch (its metadata lack"),
        ([package, picture, "--device", "cuda"], "student.pt2 was compiled for cpu, not cuda"),
        ([package, picture, "--device", "tpu"], "--device takes cpu or cuda"),
        ([package, picture, "--top", 0], "--top takes a number"),
        ([package, picture, "--tops", 2], "--tops: no such option"),
        ([package, "--benchmark", "--batch_sizes", 257], "--batch_sizes 257: "),
    ]
    if not torch.cuda.is_available():
        cuda = changed(package, tmp_path / "cuda.pt2", AOTI_DEVICE_KEY="cuda")
        cases.append(([cuda, picture], "cuda.pt2 was compiled for CUDA, and there is no GPU here"))
    for arguments, message in cases:
        out, err = call(program, *arguments, code=2)
        assert not out and err.startswith("error: ") and message in err and err.count("\n") == 1, err
    out, err = call(program, package, half, noise, picture, tmp_path / "none.png", bad_bit, webp, tmp_path, code=2)
    assert out.startswith(f"{picture}\t") and out.count("\n") == 1  # good ones are answered
    missing = [f"error: {path}: no such file" for path in (tmp_path / "none.png", tmp_path)]
    bad = [f"error: {path} cannot be read as an image" for path in (half, noise, bad_bit, webp)]
    found = [line.partition(" (")[0] for line in err.splitlines()]
    assert found == [*bad[:2], missing[0], *bad[2:], missing[1]]
    assert "give a package" in call(program, package, code=2)[1]
    assert call(program, "--help")[0].startswith("usage:")


def test_a_package_in_python(package, package_of_three, student, tmp_path):
    classifier = AotInductor(package, CPU)
    (tmp_path / "one").mkdir()
    of_one = compiled(student, None, tmp_path / "one", max_batch_size=1)
    for count, path in ((1, package), (300, package), (7, package_of_three), (3, of_one)):
        images = torch.randint(256, (count, 3, 32, 32)) / 255
        with torch.inference_mode():
            expected = student(models.normalize(student, images)).log_softmax(-1)
        torch.testing.assert_close(AotInductor(path, CPU)(images), expected, atol=1e-4, rtol=1e-4)
    pixels = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = WithPreprocessing(student)(pixels)
    torch.testing.assert_close(classifier.run(pixels), expected, atol=1e-5, rtol=1e-5)
    assert classifier.classes == student.pretrained_cfg["label_names"]
    noise = tmp_path / "noise.pt2"
    noise.write_bytes(b"noise" * 20)
    for path, device, message in (
        (tmp_path / "none.pt2", CPU, "no such file"),
        (noise, CPU, "is no package"),
        (package, torch.device("cuda", 0), "compiled for cpu, not cuda"),
    ):
        with pytest.raises(UserError, match=message):
            open_exported(path, device)
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
            build_package(WithPreprocessing(student), classifier.classes, None, CPU, tmp_path / "student.pt2")
    assert not list(tmp_path.glob("*student*"))
