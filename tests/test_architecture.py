"""The house: no room leans on the floor above it, and every program runs from where a user starts it."""

import ast

import pytest

from tests import ROOT

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
