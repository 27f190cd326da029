"""Writes the drawings that mini-SD learned from as images, a folder for each name: what `evaluate.py --web_dir` mines.

python -m assets.write_seen --icon_web outputs/icon_web.safetensors --output_dir outputs/seen
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

from assets.training import seen_drawings
from common.images import as_picture


def main(args):
    drawings = seen_drawings(args.icon_web)
    for i, (image, label) in enumerate(zip(drawings.images, drawings.labels.tolist())):
        folder = args.output_dir / drawings.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        as_picture(image).save(folder / f"{i}.png")
    print(f"{len(drawings)} drawings of {len(drawings.classes)} names in {args.output_dir}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--icon_web", type=Path, required=True, help="file of assets/build_icon_web.py")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/seen"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
