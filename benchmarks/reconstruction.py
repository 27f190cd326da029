"""Reconstruction and its cost under several settings of DDIM and null-text inversion, on the same images of Icons-FS.

    python -m benchmarks.reconstruction --split val --num_episodes 2

Each episode inverts five classes of five images into mini-SD, the words being those of the class names, at Stable
Diffusion's guidance. Prints, for each setting, the PSNR, its difference from the first (the paper's) with a 95%
interval over episodes, and the TFLOP that an image would take at Stable Diffusion 1.5's size; writes all to
--output_dir.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import numpy as np
import scipy.stats
import torch

import tint_invert
from benchmarks import flops, write_supports
from common import datasets
from common.cli import HelpFormatter, UserError, natural_int, positive_int, run
from common.records import write_json

SETTINGS = {  # options of tint_invert.py
    "paper": "--preset reference",
    "default": "",
    "no fixed-point step": "--fixed_point_steps 0",
    "no step of Adam": "--null_text_steps 0",
    "nearer": "--null_text_tolerance 3e-4",
    "from half way, nearer": "--null_text_start 0.5 --null_text_tolerance 3e-4",
    "from the empty prompt, nearer": "--null_text_start 0 --null_text_tolerance 3e-4",
    "12 DDIM steps": "--num_inference_steps 12",
}
SHARED = "--guidance_scale 7.5 --max_train_steps 0 --validation_samples 1"


def main(args):
    if args.num_episodes < 2:
        raise UserError("--num_episodes 1: an interval over episodes needs two.")
    torch.set_num_threads(args.num_threads)
    dataset, root, found = datasets.load_dataset("icons_fs", args.split), Path(args.output_dir), {}
    for index in range(args.num_episodes):
        folder = root / args.split / f"{args.seed}-{index:03d}"
        supports = folder / "support"
        if not supports.is_dir():
            write_supports(dataset, 5, flops.SHOTS, args.seed, index, supports)
        for name in args.settings:
            output_dir = folder / name.replace(" ", "_")
            options = f"--pretrained_model_name_or_path '{flops.DEFAULTS}' {SETTINGS[name]} {SHARED}"
            settings = tint_invert.parse_args(shlex.split(options))
            records = flops.invert_into_mini_sd(settings, supports, output_dir)
            psnr = {k: np.mean([r["reconstruction_psnr_db"][k] for r in records]) for k in ("vae", "null_text")}
            steps = np.mean([record["null_text_steps"] for record in records])
            levels = np.mean([*flops.guided_levels(output_dir, settings)])
            found.setdefault(name, []).append((psnr["null_text"], psnr["vae"], steps, levels, settings))
    table = {}
    for name, rows in found.items():
        psnr, vae, steps, levels = (np.array([row[i] for row in rows]) for i in range(4))
        iterations = {"textual_inversion_steps": 0, "validations": 0, "null_text_steps": steps.mean()}
        iterations["guided_levels"] = levels.mean()
        cost = {k: v for k, v in flops.inversion(rows[0][-1], iterations).items() if "null-text" in k or "DDIM" in k}
        difference = psnr - np.array([row[0] for row in found[args.settings[0]]])
        half = scipy.stats.t.ppf(0.975, len(rows) - 1) * difference.std(ddof=1) / len(rows) ** 0.5
        table[name] = {
            "psnr_db": psnr.mean(), "vae_psnr_db": vae.mean(), "minus_first_db": difference.mean(),
            "half_width_db": half, "tflop_per_image": sum(cost.values()) / flops.SHOTS, "per_episode_db": psnr.tolist(),
        }  # fmt: skip
        print(f"{name:34} {psnr.mean():.2f} dB of {vae.mean():.2f}, minus {args.settings[0]} {difference.mean():+.2f} "
              f"+- {half:.2f}, {sum(cost.values()) / flops.SHOTS:.0f} TFLOP an image", flush=True)  # fmt: skip
    write_json(root / f"{args.split}.json", {"settings": vars(args), "results": table})


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--output_dir", default="outputs/reconstruction")
    add("--split", default="val", help="the classes to draw from")
    add("--num_episodes", type=positive_int, default=2, help="at least 2")
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="the first is compared to")
    add("--num_threads", type=positive_int, default=2)
    add("--seed", type=natural_int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
