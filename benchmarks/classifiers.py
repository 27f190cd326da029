"""What classifiers cost: parameters, operations of one image, and latency, measured in turns. Prints a Markdown table.

    python -m benchmarks.classifiers assets/teacher assets/student resnet12 mobilenetv4_conv_small

Without a head, as features for prototypes. An operation is a multiplication or an addition (PyTorch's FlopCounterMode).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import torch

from common import models
from common.cli import HelpFormatter, positive_int, run


@torch.no_grad()
def cost(model, batch_sizes):
    """Parameters, operations an image, and a function that runs each batch size."""
    images = torch.rand(max(batch_sizes), 3, *models.input_size(model))
    return sum(p.numel() for p in model.parameters()), models.count_flops(model), images


@torch.no_grad()
def seconds(model, images):
    before = time.perf_counter()
    models.features(model, images)
    return time.perf_counter() - before


def main(args):
    torch.set_num_threads(args.num_threads)
    found = {name: models.load_model(name, pretrained="/" in name, num_classes=0) for name in args.models}
    facts = {name: cost(model, args.batch_sizes) for name, model in found.items()}
    times = {(name, size): [] for name in found for size in args.batch_sizes}
    for turn in range(args.num_turns + 3):  # three to warm up
        for name, size in times:
            elapsed = seconds(found[name], facts[name][2][:size])
            if turn >= 3:
                times[name, size].append(elapsed)
    print("| | input | parameters | MFLOP an image |", *(f"ms, batch of {size} |" for size in args.batch_sizes))
    print("|---|---|---|---|" + "---|" * len(args.batch_sizes))
    for name, model in found.items():
        parameters, operations, _ = facts[name]
        latency = " | ".join(f"{1000 * statistics.median(times[name, size]):.2f}" for size in args.batch_sizes)
        height, width = models.input_size(model)
        print(f"| {name} | {height}x{width} | {parameters:,} | {operations / 1e6:.1f} | {latency} |")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", help="model folders, or timm names for random weights")
    add("--batch_sizes", type=positive_int, nargs="+", default=[1, 32])
    add("--num_turns", type=positive_int, default=50)
    add("--num_threads", type=positive_int, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
