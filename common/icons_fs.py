"""Icons-FS, the bundled few-shot data set of 32x32 drawings, and its episodes.

    python -m common.icons_fs --output_dir outputs/demo

writes one episode as image folders: `support/<class>/*.png`, and the other drawings of its classes as
`query/<class>/*.png`. The drawings of a class lie in one picture, `assets/icons_fs/sheets/<class>.png`, ten a row, in
the order of `drawings.json`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from common.cli import UserError, argument_parser, positive_int, run
from common.images import save_image

FOLDER = Path(__file__).parent.parent / "assets" / "icons_fs"
SIDE, COLUMNS = 32, 10


def load_splits():
    """{"base" | "val" | "novel": [class names]}"""
    return json.loads((FOLDER / "splits.json").read_text())


def load_drawings():
    """{class name: [facts of each drawing: set, icon, style, foreground, background, license]}"""
    return json.loads((FOLDER / "drawings.json").read_text())


def load_class(name, count):
    """The first `count` drawings of a class as a float tensor [count, 3, 32, 32] in [0, 1]."""
    sheet = TF.to_dtype(TF.to_image(Image.open(FOLDER / "sheets" / f"{name}.png")), torch.float32, scale=True)
    tiles = sheet.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE)  # [3, rows, COLUMNS, SIDE, SIDE]
    return tiles.flatten(1, 2).movedim(1, 0)[:count]


def draw_episode(split, num_ways, num_shots, seed, index):
    """Episode `index` of a split: the same for everybody who asks with the same arguments.

    Returns:
        {class name: order}, `order` a permutation of the class's drawings: the first `num_shots` are the supports,
        the others queries.
    """
    rng = np.random.default_rng([seed, index])
    names, drawings = load_splits()[split], load_drawings()
    if num_ways > len(names):
        raise UserError(f"--num_ways {num_ways}: the split {split} has {len(names)} classes.")
    chosen = rng.choice(sorted(names), num_ways, replace=False)
    return {str(name): rng.permutation(len(drawings[name])).tolist() for name in chosen}


def parse_args():
    parser = argument_parser(__doc__, "outputs/demo")
    add = parser.add_argument
    add("--split", choices=["base", "val", "novel"], default="novel", help="the classes to draw from")
    add("--num_ways", type=positive_int, default=5, help="classes in the episode")
    add("--num_shots", type=positive_int, default=5, help="support images a class")
    add("--episode", type=int, default=0, help="which episode; each number gives another")
    return parser.parse_args()


def main(args):
    output_dir, temporary = Path(args.output_dir), Path(args.output_dir) / ".episode.tmp"
    if (output_dir / "support").exists():
        raise UserError(f"{output_dir} already holds an episode: give another --output_dir, or delete it.")
    for leftover in (temporary, output_dir / "query"):  # of an interrupted run
        shutil.rmtree(leftover, ignore_errors=True)
    episode = draw_episode(args.split, args.num_ways, args.num_shots, args.seed, args.episode)
    for name, order in episode.items():
        drawings = load_class(name, len(order))
        for place, drawing in enumerate(order):
            part = "support" if place < args.num_shots else "query"
            save_image(drawings[drawing], temporary / part / name / f"{drawing:03d}.png")
    for part in ("query", "support"):
        (temporary / part).replace(output_dir / part)
    temporary.rmdir()
    queries = sum(map(len, episode.values())) - args.num_ways * args.num_shots
    print(f"{output_dir}: {', '.join(episode)}; {args.num_shots} supports each, {queries} queries in all")


if __name__ == "__main__":
    run(main, parse_args)
