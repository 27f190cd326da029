"""Measures what settings of tint_generate.py make of episodes of Icons-FS, with mini-SD. Prints a Markdown table.

    python -m benchmarks.generation_quality --split val --num_episodes 4 --settings "all steps" "default: 4 steps"

Of every episode the supports are inverted once, and each setting generates from the same noise. Measured in the feature
space of the teacher, specialised on the supports, and averaged over episodes: how often it agrees with the label, the
cosine distance to the nearest support, that of two images of a class; and the peak signal-to-noise ratio to the images
of the first setting.
"""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import torch

import tint_generate
import tint_invert
from benchmarks import write_supports
from benchmarks.flops import generation
from common import datasets, models
from common.cli import HelpFormatter, natural_int, positive_int, run
from common.generated import embed, specificity_and_diversity
from common.images import load_folder

ALL = "--num_inference_steps 16"
SETTINGS = {
    "all steps": ALL,
    "default: 4 steps": "",
    "8 steps": "--num_inference_steps 8",
    "6 steps": "--num_inference_steps 6",
    "3 steps": "--num_inference_steps 3",
    "null-text not faded": "--null_text_fade 0",
    "null-text gone at alpha 0.5": f"{ALL} --null_text_fade 2",
    "no null-text": f"{ALL} --null_text_fade 1000000",
    "guidance 2": f"{ALL} --guidance_scale 2",
    "guidance 4": f"{ALL} --guidance_scale 4",
    "guidance 3, 4, 5": f"{ALL} --guidance_scale 3 4 5",
    "img2img": f"{ALL} --method img2img",
    "textual inversion": f"{ALL} --method textual_inversion",
    "plain null-text": f"{ALL} --method null_text",
}


def main(args):
    torch.set_num_threads(args.num_threads)
    model, dataset = models.load_model(args.teacher), datasets.load_dataset("icons_fs", args.split)
    found = {}
    for index in range(args.num_episodes):
        folder = Path(args.output_dir) / args.split / f"{args.seed}-{index:03d}"
        if not (folder / "support").is_dir():
            write_supports(dataset, 5, 5, args.seed, index, folder / "support")
        inversions = {"inversion": [], "plain": ["--prompt", "an icon", "--max_train_steps", "0"]}
        supports, labels, classes, _ = load_folder(folder / "support", models.input_size(model)[0])
        teacher = models.PrototypeClassifier(model, supports, labels)
        with redirect_stdout(sys.stderr):
            for name, options in inversions.items():
                options += ["--support_dir", str(folder / "support"), "--output_dir", str(folder / name)]
                tint_invert.main(tint_invert.parse_args([*options, "--seed", str(index)]))
        support = teacher.embed(supports).detach(), labels
        for name in args.settings:
            made = folder / name.replace(" ", "_")
            source = folder / ("plain" if "null_text" in SETTINGS[name].split() else "inversion")
            options = ["--inversion_dir", str(source), "--output_dir", str(made), "--seed", str(index)]
            options += ["--num_images_per_class", str(args.num_images_per_class), "--alpha", *args.alpha]
            with redirect_stdout(sys.stderr):
                tint_generate.main(tint_generate.parse_args([*options, *SETTINGS[name].split()]))
            f, answers, labels, alphas = embed(made, teacher, classes, 64)
            images, yardstick = (load_folder(folder / n.replace(" ", "_"))[0] for n in (name, args.settings[0]))
            similarity = tint_invert.psnr(images, yardstick).clamp(max=99)
            for alpha in set(alphas):
                at = torch.tensor([a == alpha for a in alphas])
                values = specificity_and_diversity(f[at], answers[at], labels[at], *support)
                found.setdefault((name, alpha), []).append(values | {"psnr": similarity[at].mean().item()})
    print(f"| | TFLOP | alpha | images | teacher agrees | nearest support | pairwise | dB to {args.settings[0]} |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, alpha), rows in sorted(found.items(), key=lambda x: (args.settings.index(x[0][0]), x[0][1] or 0)):
        options = tint_generate.parse_args(SETTINGS[name].split())
        count = sum(row["images"] for row in rows)
        agreement = sum(row["images"] * row["agreement"]["mean"] for row in rows) / count
        near, pairwise, psnr = (
            sum(row[k] for row in rows) / len(rows) for k in ("nearest_support", "pairwise", "psnr")
        )
        print(f"| {name} | {generation(16, alpha, options):.1f} | {alpha} | {count} | {agreement:.1%} "
              f"| {near:.3f} | {pairwise:.3f} | {psnr:.1f} |")  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--split", default="val", help="the classes to draw from")
    add("--num_episodes", type=positive_int, default=4)
    add("--num_images_per_class", type=positive_int, default=60)
    add("--alpha", nargs="+", default=["0.6", "0.8", "1.0"])
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    add("--teacher", default="assets/teacher")
    add("--output_dir", default="outputs/generation_quality")
    add("--num_threads", type=positive_int, default=2)
    add("--seed", type=natural_int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
