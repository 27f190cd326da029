"""Draws samples of mini-SD for every word and asks the teacher what they show.

    python -m assets.measure_diffusion --model assets/mini-sd --teacher assets/teacher

The teacher answers by cosine prototypes of real drawings, among the classes of the word's split: for the base classes
those it was trained on, for val and novel classes those of episodes, which the diffusion model has never seen.
Writes samples_<split>.png, a row of samples for each word after a real drawing, and samples.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from assets.train_diffusion import article
from assets.training import Drawings, use_threads
from common import models
from common.images import save_grid
from common.processes import best_device
from common.records import write_json
from common.statistics import wilson_interval


def main(args):
    use_threads(args.num_threads)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    device, results = best_device(), {}
    pipe, teacher = pipe.to(device), models.load_model(args.teacher).to(device)
    for split in ("base", "val", "novel"):
        drawings = Drawings(["base", "episode"], [split])
        classifier = models.PrototypeClassifier(teacher, drawings.images.to(device), drawings.labels.to(device))
        rows, agreement = [], {}
        for label, name in enumerate(drawings.classes):
            seeds = [torch.Generator().manual_seed(args.seed * 1000 + i) for i in range(args.num_samples)]
            prompts = [f"an icon of {article(name.replace('-', ' '))}"] * args.num_samples
            images = pipe(prompts, num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
                          generator=seeds, output_type="np").images  # fmt: skip
            images = torch.from_numpy(images).movedim(-1, 1)
            with torch.no_grad():
                agreement[name] = int((classifier(images.to(device)).argmax(1) == label).sum())
            rows.append([drawings.images[drawings.labels == label][0], *images[: args.shown]])
        named, total = sum(agreement.values()), args.num_samples * len(agreement)
        results[split] = {"named": named / total, "ci95": wilson_interval(named, total), "per_class": agreement}
        half = -(-len(rows) // 4)
        rows = [[image for row in rows[i::half] for image in row] for i in range(half)]  # four words side by side
        save_grid(rows, output_dir / f"samples_{split}.png", side=32)
        print(
            split,
            f"{results[split]['named']:.3f}",
            {k: v for k, v in agreement.items() if v < np.ceil(args.num_samples / 2)},
        )
    write_json(output_dir / "samples.json", {"settings": vars(args), "splits": results})


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="assets/mini-sd")
    add("--output_dir", default="outputs/measure_diffusion")
    add("--teacher", default="assets/teacher")
    add("--num_samples", type=int, default=16, help="samples of each word")
    add("--shown", type=int, default=6, help="of them in the picture")
    add("--num_inference_steps", type=int, default=25)
    add("--guidance_scale", type=float, default=3.0)
    add("--num_threads", type=int, default=2)
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
