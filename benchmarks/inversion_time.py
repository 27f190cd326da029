"""Times the inversion of five classes of five images into mini-SD against the reference's way of working. Prints JSON.

    python -m benchmarks.inversion_time

The reference works on one image at a time: 5000 steps of textual inversion a class, each of which encodes its image
anew, then DDIM and null-text inversion of every image at the paper's settings. A share of that is run, before and after
ours, and multiplied up; ours, the defaults of tint_invert.py, is run whole.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import torch
from tqdm.auto import tqdm

import tint_invert
from benchmarks import write_supports
from common import datasets, diffusion
from common.cli import HelpFormatter, positive_int, run
from common.images import load_folder

MODEL = "assets/mini-sd"


def seconds(function):
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


def reference_seconds_per_class(support_dir, num_steps, num_images):
    """Seconds a class, in parts, multiplied up from `num_steps` steps of textual inversion and `num_images` images."""
    args = tint_invert.parse_args(["--preset", "reference", "--pretrained_model_name_or_path", MODEL])
    pipe = diffusion.load_stable_diffusion(MODEL, "cpu")
    schedule = diffusion.make_schedule(pipe.scheduler, args.num_inference_steps)
    images, _, names, _ = load_folder(support_dir, 32)
    words, first_id, vectors, _ = tint_invert.add_new_words(pipe, names[:1], args)
    vectors, rng = vectors[0].requires_grad_(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([vectors], lr=args.learning_rate)
    text = args.prompt.replace("{}", words[0])
    ids = diffusion.token_ids(pipe, [text])

    def textual_inversion():
        for step in range(num_steps):
            z0 = diffusion.encode_images(pipe.vae, images[step % 5][None])
            draw = tint_invert.draw_noisy_latents(z0, pipe.scheduler, 1, args.min_timestep, rng)
            loss = tint_invert.class_losses(pipe, first_id, vectors, ids, [z0], [draw]).sum()
            vectors.grad = tint_invert.gradient(loss, vectors)
            optimizer.step()

    def invert_image(image):
        z0 = diffusion.encode_images(pipe.vae, image[None])
        with torch.no_grad():
            prompt_embeds, empty = diffusion.encode_prompts(pipe, [text, ""]).split(1)
        trajectory = tint_invert.ddim_inversion(pipe.unet, schedule, z0, prompt_embeds)
        hidden = tqdm(disable=True)
        tint_invert.null_text_inversion(pipe.unet, schedule, trajectory, prompt_embeds, empty, args, hidden)

    invert_image(images[0])  # warm
    return {
        "textual_inversion": seconds(textual_inversion) * args.max_train_steps / num_steps,
        "null_text_inversion": sum(seconds(lambda k=k: invert_image(images[k])) for k in range(num_images))
        * 5
        / num_images,
    }


def main(args):
    torch.set_num_threads(args.num_threads)
    with tempfile.TemporaryDirectory() as folder:
        dataset = datasets.load_dataset("icons_fs", "val")
        supports = Path(folder) / "support"
        write_supports(dataset, 5, 5, 0, 0, supports)
        sample = supports, args.num_steps, args.num_images
        reference = [reference_seconds_per_class(*sample)]
        options = ["--support_dir", str(supports), "--output_dir", f"{folder}/inversion"]
        with redirect_stdout(sys.stderr):
            ours = seconds(lambda: tint_invert.main(tint_invert.parse_args(options))) / 5
        reference.append(reference_seconds_per_class(*sample))
    parts = {name: sum(run[name] for run in reference) / len(reference) for name in reference[0]}
    print(json.dumps({
        "reference_seconds_per_class": sum(parts.values()), "of_which": parts,
        "reference_measured_twice": [sum(run.values()) for run in reference],
        "seconds_per_class": ours, "times_faster": sum(parts.values()) / ours,
    }, indent=2))  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--num_steps", type=positive_int, default=300, help="the reference's steps that are run")
    add("--num_images", type=positive_int, default=2, help="the images that are inverted its way")
    add("--num_threads", type=positive_int, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
