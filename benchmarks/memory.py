"""What fits into a GPU's memory: the largest batches at Stable Diffusion 1.5's shapes. Prints a Markdown table.

    python -m benchmarks.memory

The networks are built from their public configurations, of fake tensors, which have shapes and no numbers, and the
project's own functions run on them; classifiers are counted at work. Counted are the weights, and the activations at
the peak, as in common/memory.py. A card has a tenth and a GiB less to give than it says: CUDA itself, scratch memory of
its libraries, and gaps.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import distill
from benchmarks.flops import stable_diffusion_1_5
from common import diffusion, models
from common.cli import HelpFormatter, positive_int, run
from common.memory import bytes_of

GIB = 2**30


def diffusion_rows(pipe, resolution):
    """(settings, bytes that are there all the time, bytes for one more) of inversion and generation."""
    for precision in ("no", "fp16"):
        torch.set_default_dtype(diffusion.WEIGHT_DTYPE[precision])  # fake parameters cannot be converted
        pipe.unet = stable_diffusion_1_5("cpu").unet
        torch.set_default_dtype(torch.float32)
        weights = bytes_of(pipe.unet, pipe.vae, pipe.text_encoder)
        for option in ("", "--gradient_checkpointing"):
            if option:
                pipe.unet.enable_gradient_checkpointing()
            one = diffusion.bytes_of_a_latent(pipe, resolution, trained=True)
            pipe.unet.disable_gradient_checkpointing()
            name = f"`tint_invert.py --mixed_precision {precision}`: `--null_text_batch_size`"
            yield f"the same with `{option}`" if option else name, weights, one
        one = 2 * diffusion.bytes_of_a_latent(pipe, resolution)
        yield f"`tint_generate.py --mixed_precision {precision}`: `--batch_size`", weights, one


def distillation_row(teacher, student):
    """The same of a teacher and a student, in full precision."""
    args = distill.parse_args([])
    modules, parts = distill.needs(teacher, student, 1, student.num_classes, args)
    one = max(parts.values()) / args.train_batch_size
    return "`distill.py --mixed_precision no`: `--train_batch_size`", bytes_of(*modules), one


def main(args):
    torch.set_num_threads(args.num_threads)
    distilling = distillation_row(*(models.load_model(name, pretrained=False) for name in (args.teacher, args.student)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        pipe = stable_diffusion_1_5("cpu")
        rows = [*diffusion_rows(pipe, args.resolution), distilling]
    alone = diffusion.decoding_bytes(pipe, args.resolution)
    several = diffusion.decoding_bytes(pipe, args.resolution, math.inf)
    cards = "".join(f" {gigabytes} GB |" for gigabytes in args.gigabytes)
    print(f"| settings: largest batch | GiB of weights | GiB for each |{cards}")
    print("|---|---|---|" + "---|" * len(args.gigabytes))
    for name, weights, one in rows:
        free = [0.9 * gigabytes * 1e9 - GIB - weights for gigabytes in args.gigabytes]
        decoded = [x // alone if "generate" in name and x < several else math.inf for x in free]
        fits = "".join(f" {max(0, int(min(x // one, most)))} |" for x, most in zip(free, decoded))
        print(f"| {name} | {weights / GIB:.2f} | {one / GIB:.3f} |{fits}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--gigabytes", type=positive_int, nargs="+", default=[8, 12, 24, 80], help="memory of the cards")
    add("--resolution", type=positive_int, default=512, help="side of the images")
    add("--teacher", default="vit_small_patch14_dinov2")
    add("--student", default="mobilenetv4_conv_small")
    add("--num_threads", type=positive_int, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
