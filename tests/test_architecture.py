"""The house: no room leans on the floor above it, and every program runs from where a user starts it."""

import ast
import contextlib
import io
import os
import runpy
import sys

import pytest
import yaml

from tests import ROOT
from tests.launcher import FORKS

SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
ABOVE = SCRIPTS | {"assets", "benchmarks", "tests"}


def imports(source):
    """The first names of all modules that a source imports, at its top or inside a function, by name or as text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module", "__import__", "run_module", "run_path",
        ):  # fmt: skip
            yield from (str(getattr(x, "value", "")).partition(".")[0] for x in node.args)


@pytest.mark.parametrize("source", ["import distill", "def f():\n    from evaluate import embed",
                                    "import importlib\nimportlib.import_module('tint_invert')"])  # fmt: skip
def test_the_test_sees_an_import(source):
    assert ABOVE & set(imports(source))


def test_no_file_of_common_imports_a_script():
    files = sorted((ROOT / "common").rglob("*.py"))
    assert len(files) > 10 and {"distill", "evaluate", "tint_invert"} <= SCRIPTS
    for path in files:
        assert not ABOVE & set(imports(path.read_text())), path


def test_scripts_and_what_they_share_stay_short_enough_to_read():
    """What a change adds to them it takes away elsewhere: the bound is to fall, and never to rise."""
    lines = {path: len(path.read_text().splitlines()) for path in (*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py"))}
    assert max(count for path, count in lines.items() if path.parent == ROOT) <= 450
    assert sum(lines.values()) <= 7047


def test_what_others_need_to_carry_on_is_there():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 50
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "MIT" and "2406.03146" in citation["references"][0]["url"]
    jobs = [yaml.safe_load(path.read_text())["jobs"] for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    assert any(step.get("run") == ".ci/run" for job in jobs for test in job.values() for step in test["steps"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format"}


def show_help(folder, cwd):
    """Shows --help of each program of a folder, as `python FILE` and `python -m MODULE` do, from another folder."""
    os.chdir(cwd)
    elsewhere = [path for path in sys.path if path not in ("", str(ROOT))]
    for file in sorted(path for path in folder.glob("*.py") if "__main__" in path.read_text()):
        module = f"{folder.name}.{file.stem}"
        for start, run, name in ((folder, runpy.run_path, str(file)), (ROOT, runpy.run_module, module)):
            for own in [key for key in sys.modules if key.partition(".")[0] in {"common", *ABOVE}]:
                del sys.modules[own]
            sys.path[:], sys.argv, text = [str(start), *elsewhere], [str(file), "--help"], io.StringIO()
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
                run(name, run_name="__main__")
            assert "usage:" in text.getvalue(), file


@pytest.mark.parametrize("folder", ["benchmarks", "assets"])
def test_programs_run_as_a_file_and_as_a_module(folder, tmp_path):
    process = FORKS.Process(target=show_help, args=(ROOT / folder, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0
