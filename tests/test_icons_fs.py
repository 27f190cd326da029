"""The bundled data: complete, split without overlap, and episodes that everybody draws alike."""

import json

from PIL import Image

from common import icons_fs
from tests.conftest import ROOT

PERMISSIVE = {"MIT", "Apache-2.0", "CC-BY-4.0", "ISC", "CC0-1.0", "OFL-1.1", "Unlicense", "BSD-3-Clause", "WTFPL"}


def test_every_drawing_has_its_picture_and_its_licence():
    drawings, splits = icons_fs.load_drawings(), icons_fs.load_splits()
    names = [name for split in splits.values() for name in split]
    assert sorted(drawings) == sorted(names) and len(names) == len(set(names))
    for name, facts in drawings.items():
        rows = -(-len(facts) // icons_fs.COLUMNS)
        assert Image.open(icons_fs.FOLDER / "sheets" / f"{name}.png").size == (10 * 32, rows * 32)
        last = icons_fs.load_class(name, len(facts))[-1]
        assert last.shape == (3, 32, 32) and last.std() > 0.01
    licenses = {fact["license"] for facts in drawings.values() for fact in facts}
    assert licenses <= PERMISSIVE
    attribution = (icons_fs.FOLDER / "ATTRIBUTION.md").read_text()
    assert all(f"`{fact['set']}`" in attribution for facts in drawings.values() for fact in facts)


def test_assets_hold_no_pickles():
    suffixes = {p.suffix for p in (ROOT / "assets").rglob("*") if p.is_file()}
    assert not suffixes & {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npy", ".npz"}
    for config in (ROOT / "assets").glob("*/config.json"):
        assert json.loads(config.read_text())["architecture"]
