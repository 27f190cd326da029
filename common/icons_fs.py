"""Icons-FS, the bundled few-shot data set of 32x32 drawings.

The drawings of a class lie in one picture, `assets/icons_fs/sheets/<class>.png`, ten a row, in the order of
`drawings.json`; `ink/<class>.png` says likewise which pixels were painted. A drawing is of the pool "base" or, in val
and novel classes, "episode" (supports and queries) or "web" (what a diffusion model may have seen of the class). Of
unseen classes all are of the pool "episode": no model here has seen their drawings, or any word for them.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

FOLDER = Path(__file__).parent.parent / "assets" / "icons_fs"
SIDE, COLUMNS = 32, 10


def load_splits():
    """{"base" | "val" | "novel" | "unseen_val" | "unseen": [class names]}"""
    return json.loads((FOLDER / "splits.json").read_text())


def load_drawings():
    """{class name: [facts of each drawing: set, icon, family, style, foreground, background, license, pool]}"""
    return json.loads((FOLDER / "drawings.json").read_text())


def load_class(name, count=None, kind="sheets"):
    """The first `count` drawings of a class, or all and spare ones, as a float tensor [count, 3, 32, 32] in [0, 1]. Of
    kind "ink": how much of each pixel is painted, [count, 1, 32, 32], zero for drawings of several colours."""
    sheet = TF.to_dtype(TF.to_image(Image.open(FOLDER / kind / f"{name}.png")), torch.float32, scale=True)
    tiles = sheet.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE)  # [C, rows, COLUMNS, SIDE, SIDE]
    return tiles.flatten(1, 2).movedim(1, 0)[:count]
