"""Measures on episodes what inversion into mini-SD gives, and draws the curve of textual inversion.

    python -m assets.measure_inversion --split val --num_episodes 2 --output_dir outputs/measure_inversion

Textual inversion: the loss on fixed noise and timesteps, beside that of the word which the vocabulary has best, found
by trying every one. Null-text inversion: the reconstruction. Writes <split>.json and <split>.svg, the curve.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import numpy as np
import torch

import tint_invert
from assets.training import save_plot
from benchmarks import write_supports
from common import datasets, diffusion
from common.images import load_folder
from common.processes import generator
from common.records import read_json, write_json


@torch.no_grad()
def best_words(settings):
    """For each class that was inverted: the existing word of least loss on the fixed noise, and that loss.

    Every word is tried on a quarter of the noise, and the best ten on all of it.

    Args:
        settings: the Namespace of tint_invert.py with which it was done.
    """
    pipe = diffusion.load_stable_diffusion(settings.pretrained_model_name_or_path, "cpu")
    words = {pipe.tokenizer.decode([i]).strip() for i in range(len(pipe.tokenizer))}
    words = sorted(w for w in words if len(pipe.tokenizer(w, add_special_tokens=False).input_ids) == 1)
    prompts = diffusion.encode_prompts(pipe, [settings.prompt.replace("{}", word) for word in words])
    images, labels, names, _ = load_folder(settings.support_dir, pipe.unet.config.sample_size * pipe.vae_scale_factor)

    def losses(candidates, z0, t, noise):
        return {
            i: tint_invert.diffusion_loss(pipe, z0, t, noise, prompts[i].expand(len(t), -1, -1)).mean().item()
            for i in candidates
        }

    found = {}
    for label, name in enumerate(names):
        rng = generator(settings.seed, name, "validation")
        latents = diffusion.encode_images(pipe.vae, images[labels == label])
        draw = latents, pipe.scheduler, settings.validation_samples, settings.min_timestep, rng
        indices, *noisy = tint_invert.draw_noisy_latents(*draw)
        draw = latents[indices], *noisy
        quick = losses(range(len(words)), *(x[::4] for x in draw))
        thorough = losses(sorted(quick, key=quick.get)[:10], *draw)
        best = min(thorough, key=thorough.get)
        found[name] = (words[best], thorough[best])
    return found


def main(args):
    torch.set_num_threads(args.num_threads)
    dataset, root = datasets.load_dataset("icons_fs", args.split), Path(args.output_dir)
    curves, reconstruction = [], []
    for index in range(args.num_episodes):
        folder = root / args.split / f"{index:03d}"
        if not (folder / "support").is_dir():
            write_supports(dataset, args.num_ways, args.num_shots, args.seed, index, folder / "support")
        settings = tint_invert.parse_args(["--support_dir", str(folder / "support"), "--output_dir",
                                           str(folder / "inversion"), "--validation_samples", "64",
                                           "--seed", str(index), *args.invert])  # fmt: skip
        tint_invert.main(settings)
        best = best_words(settings)
        for name, (word, loss) in best.items():
            facts = read_json(folder / "inversion" / name / "inversion.json")
            curves.append({"episode": index, "class": name, "best_word": word, "best_word_loss": loss,
                           "initializer_token": facts["initializer_token"],
                           "curve": facts["textual_inversion_loss"]})  # fmt: skip
            reconstruction.append(facts["reconstruction_psnr_db"])
    report(root, args, curves, reconstruction)


def report(root, args, curves, reconstruction):
    """Prints and writes what was measured."""
    # The loss of the vectors that would be kept, which are the best so far; a class that has stopped keeps its own.
    steps = max(([step for step, _ in c["curve"]] for c in curves), key=len)
    losses = [np.minimum.accumulate([loss for _, loss in c["curve"]]) for c in curves]
    losses = np.array([np.pad(x, (0, len(steps) - len(x)), mode="edge") for x in losses])
    best = np.array([c["best_word_loss"] for c in curves])
    psnr = {k: float(np.mean([x for facts in reconstruction for x in facts[k]])) for k in reconstruction[0]}
    print("reconstruction", psnr)
    print(f"loss at steps {steps}: {losses.mean(0).round(4)}; stopped after "
          f"{np.mean([c['curve'][-1][0] for c in curves]):.0f}; best word {best.mean():.4f}; below it "
          f"at the end in {(losses[:, -1] < best).sum()} of {len(best)} classes")  # fmt: skip
    best_line = [(steps[0], best.mean()), (steps[-1], best.mean())]
    save_plot(root / f"{args.split}.svg", "step", "loss on fixed noise and timesteps",
              {"learned word": list(zip(steps, losses.mean(0))), "best existing word": best_line})  # fmt: skip
    write_json(root / f"{args.split}.json", {
        "settings": vars(args), "reconstruction_psnr_db": psnr, "textual_inversion": curves,
        "mean_curve": [[s, float(x)] for s, x in zip(steps, losses.mean(0))], "mean_best_word_loss": float(best.mean()),
    })  # fmt: skip


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", default="outputs/measure_inversion")
    add("--split", default="val")
    add("--num_episodes", type=int, default=2)
    add("--num_ways", type=int, default=5)
    add("--num_shots", type=int, default=5)
    add("--num_threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--invert", nargs=argparse.REMAINDER, default=[], help="options of tint_invert.py; they end the command line")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
