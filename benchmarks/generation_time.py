"""Times generation with mini-SD against the reference's way of working. Prints JSON.

    python -m benchmarks.generation_time

The reference makes one image at a time, in 25 steps, each with a pass of the UNet for the prompt and one for the
null-text. Ours is tint_generate.py at its defaults, files included. Both are run in turns.
"""

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import torch

import tint_generate
import tint_invert
from benchmarks import write_supports
from benchmarks.inversion_time import MODEL, seconds
from common import datasets, diffusion
from common.cli import HelpFormatter, positive_int, run


@torch.no_grad()
def reference_image(pipe, schedule, z, prompt_embeds, null_embeds, guidance_scale):
    """One image [1, 3, H, W]: z [1, C, h, w], prompt_embeds [1, L, D], null_embeds [T, L, D]."""
    for i in range(len(schedule.timesteps)):
        eps_cond = diffusion.predict_noise(pipe.unet, schedule, z, i, prompt_embeds)
        eps_uncond = diffusion.predict_noise(pipe.unet, schedule, z, i, null_embeds[i : i + 1])
        eps = diffusion.guide(eps_uncond, eps_cond, guidance_scale)
        z = diffusion.ddim_step(z, eps, schedule.abar[i], schedule.abar[i + 1])
    return diffusion.decode_latents(pipe, z)


def main(args):
    torch.set_num_threads(args.num_threads)
    reference = tint_invert.parse_args(["--preset", "reference", "--pretrained_model_name_or_path", MODEL])
    pipe = diffusion.load_stable_diffusion(MODEL, "cpu")
    schedule = diffusion.make_schedule(pipe.scheduler, reference.num_inference_steps)
    channels, side = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    prompt = diffusion.encode_prompts(pipe, ["an icon of a tree"]).detach()
    null = diffusion.encode_prompts(pipe, [""]).detach().expand(reference.num_inference_steps, -1, -1)

    def one_by_one():
        for _ in range(args.num_reference_images):
            z = torch.randn(1, channels, side, side)
            reference_image(pipe, schedule, z, prompt, null, reference.guidance_scale)

    measured = {"reference": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        dataset, support = datasets.load_dataset("icons_fs", "val"), Path(folder) / "support"
        write_supports(dataset, 5, 5, 0, 0, support)
        tint_invert.main(tint_invert.parse_args(["--support_dir", str(support), "--output_dir", f"{folder}/inversion"]))
        one_by_one()  # warm up
        for turn in range(args.num_turns):
            measured["reference"].append(seconds(one_by_one) / args.num_reference_images)
            options = ["--inversion_dir", f"{folder}/inversion", "--output_dir", f"{folder}/{turn}"]
            options += ["--num_images_per_class", str(args.num_images_per_class), "--no-agreement"]
            ours = tint_generate.parse_args(options)
            measured["ours"].append(seconds(partial(tint_generate.main, ours)) / (5 * args.num_images_per_class))
    mean = {name: sum(values) / len(values) for name, values in measured.items()}
    print(json.dumps({
        "reference_images_per_second": 1 / mean["reference"], "images_per_second": 1 / mean["ours"],
        "times_faster": mean["reference"] / mean["ours"], "seconds_an_image_in_turns": measured,
    }, indent=2))  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--num_images_per_class", type=positive_int, default=100)
    add("--num_reference_images", type=positive_int, default=20)
    add("--num_turns", type=positive_int, default=3)
    add("--num_threads", type=positive_int, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
