"""README and docs: their links lead somewhere, the files, functions and options that they name exist, and the README's
commands and code for the CPU run as they stand, on photos in the folders that it names."""

import itertools
import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from common import models
from common.images import load_image
from tests import ROOT
from tests.conftest import launch

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "assets" / "README.md"]
README = (ROOT / "README.md").read_text()
STAGES = {"invert": "tint_invert.py", "generate": "tint_generate.py", "distill": "distill.py", "export": "export.py"}
SCRIPTS = ("demo.py", "evaluate.py", *STAGES.values())
OURS = ("assets/", "benchmarks/", "common/", "cpp/", "docs/", "tests/")


def blocks(page, language):
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What a link to a heading of the page can name after the #, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text):
    """The commands of a shell block, each a list of words; what stands in quotes is one word."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def options_of_scripts(words):
    """(script or module, option) for each option of our own scripts in a command, inside quoted words too."""
    script = None
    for before, word in zip(["", *words], words):
        if script is None:
            module = before == "-m" and word.startswith(tuple(folder.replace("/", ".") for folder in OURS))
            if module or re.fullmatch(r"\w+\.py", word):
                script = word
            elif " " in word:  # bash -c '...'
                yield from options_of_scripts(shlex.split(word))
        elif word == "&&":
            script = None
        elif re.fullmatch(r"--\w+", word):
            yield script, word
        elif before[2:] in STAGES:  # --distill "--num_views 5000"
            yield from ((STAGES[before[2:]], option) for option in re.findall(r"--\w+", word))
        else:  # "free=tint --generate.alpha 1"
            yield from ((STAGES[stage], f"--{option}") for stage, option in re.findall(r"--(\w+)\.(\w+)", word))


@cache
def options(script):
    """The options that a script's help names."""
    out, _ = launch(*([script] if script.endswith(".py") else ["-m", script]), "--help")
    return set(re.findall(r"(?<![\w-])--\w+", out))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page):
    text = prose(page.read_text())
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(file.read_text()), f"{page}: {target}"
    for name in re.findall(r"`([\w./-]+)`", text):
        if name.startswith(OURS) or re.fullmatch(r"\w+\.py", name):
            places = [ROOT / name, page.parent / name, ROOT / f"{name}.py", ROOT / "common" / name]
            assert any(map(Path.exists, places)), f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_exist(page):
    text = page.read_text()
    inline = re.findall(r"`([^`]+)`", prose(text))
    shell = [words for block in blocks(text, "sh") for words in commands(block)]
    for words in [*shell, *(shlex.split(code) for code in inline if " --" in code)]:
        for script, option in options_of_scripts(words):
            assert option in options(script), f"{page}: {script} has no {option}"
    known = set().union(*map(options, SCRIPTS), *shell)
    for option in (code.split()[0] for code in inline if re.match(r"--\w+( |$)", code)):
        assert option in known, f"{page}: nothing has {option}"


def test_the_test_finds_options():
    found = options_of_scripts(shlex.split(
        "accelerate launch --num_processes 2 evaluate.py --methods 'a=tint --invert.prompt x' --distill '--mixup 1'"
    ))  # fmt: skip
    assert list(found) == [("evaluate.py", "--methods"), ("tint_invert.py", "--prompt"), ("evaluate.py", "--distill"),
                           ("distill.py", "--mixup")]  # fmt: skip
    assert {"--mixup", "--help"} < options("distill.py") and "--num_ways" in options("benchmarks.students")


def test_the_readme_is_for_the_first_hour():
    assert len(README.splitlines()) <= 200


def test_equations_stand_where_the_docs_say():
    rows = re.findall(r"^\| .* \| (`.*`) in `(.*)` \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert len(rows) > 15
    for names, file in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), f"{name} in {file}"


def photograph(path, kind, rng):
    """Writes a picture that is not square, of a bar or of a cross on some background."""
    image = Image.fromarray(rng.integers(120, 200, (300, 400, 3), np.uint8))
    draw, (x, y) = ImageDraw.Draw(image), rng.integers(-40, 40, 2) + (200, 150)
    draw.line((x - 80, y, x + 80, y + 20), (140, 60, 20), 30)
    if kind == "windmill":
        draw.line((x, y - 90, x + 10, y + 90), (140, 60, 20), 30)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_the_readme_for_the_cpu_runs_as_it_stands(tmp_path):
    for entry in [*ROOT.glob("*.py"), ROOT / "assets", ROOT / "common"]:
        (tmp_path / entry.name).symlink_to(entry)
    rng = np.random.default_rng(0)
    for folder, kind, number in (("photos", 412, 2), ("test_photos", 533, 2)):
        for name in ("hammer", "windmill"):
            assert f"{folder}/{name}/" in README
            for i in range(number):
                photograph(tmp_path / folder / name / f"IMG_{kind + i:04d}.jpg", name, rng)
    photograph(tmp_path / "photo.jpg", "windmill", rng)

    shell = [commands(block) for block in blocks(README, "sh")]
    for_cpu = [words for block in shell if all(words[0] == "python" for words in block) for words in block]
    assert {words[1] for words in for_cpu} == set(SCRIPTS)
    for _, *words in for_cpu:
        launch(*words, cwd=tmp_path, timeout=1800)
    for name in re.findall(r"^\| `(outputs/.*?)` \|", README, re.MULTILINE):
        assert list(tmp_path.glob(name.replace("<class>", "*"))), name

    transparent = np.zeros((40, 60, 4), np.uint8)  # black, where it is not seen
    transparent[10:30, 5:55] = 140, 60, 20, 255
    Image.fromarray(transparent).save(tmp_path / "photo.png")
    student = models.with_head(models.load_model(str(tmp_path / "outputs" / "student")))
    python = blocks(README, "python")
    assert len(python) == 2
    for name, code in itertools.product(("photo.jpg", "photo.png"), python):
        assert "photo.jpg" in code
        (tmp_path / "block.py").write_text(code.replace("photo.jpg", name))
        out, _ = launch("block.py", cwd=tmp_path)
        with torch.inference_mode():
            expected = student(load_image(tmp_path / name, 32)[None]).softmax(-1)[0]
        answer, probability = out.split()
        assert answer == ("hammer", "windmill")[expected.argmax()]
        assert float(probability) == pytest.approx(expected.max().item(), abs=0.02)
