"""How long a student should learn: accuracy against the views that it has seen, for students distilled on the supports,
on TINT images and on other real images, pretrained ones and from random weights, on the same episodes of Icons-FS.
Prints a Markdown table and draws a picture. Each length is a training of its own, with its own course of the learning
rate. Choose on classes that no result is reported of: `val` and `unseen_val`.

    python -m benchmarks.schedule --split unseen_val --num_episodes 6

Everything finished is kept below --output_dir: more episodes or lengths cost only what is new.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

from assets.training import save_plot
from benchmarks.students import run_episodes
from common.cli import HelpFormatter, positive, positive_int, run
from common.report import with_interval

STARTS = {"pretrained": "", "random weights": "--distill.student conv4_64"}
SOURCES = ("supports", "tint", "real")


def arms(args):
    """{(start, source, views): the value of --methods}"""
    found = {}
    for start, weights in STARTS.items():
        rate = args.learning_rate[start != "pretrained"]
        for source in SOURCES:
            for views in args.num_views:
                steps = f"--distill.learning_rate {rate} --distill.max_train_steps {-(-views // args.batch_size)}"
                found[start, source, views] = f"{start[0]}_{source}_{views}={source} {steps} {weights}"
    return found


def main(args):
    chosen = arms(args)
    results = run_episodes(args, ["teacher", *chosen.values()])
    accuracy = {key: results["methods"][text.split("=")[0]] for key, text in chosen.items()}
    print("| views | " + " | ".join(f"{source}, {start}" for start in STARTS for source in SOURCES) + " |")
    print("|---|" + "---|" * len(STARTS) * len(SOURCES))
    for views in args.num_views:
        cells = (with_interval(accuracy[start, source, views]) for start in STARTS for source in SOURCES)
        print(f"| {views:,} | {' | '.join(cells)} |")
    lines = {
        f"{source}, {start}": [(views, 100 * accuracy[start, source, views]["mean"]) for views in args.num_views]
        for start in STARTS for source in SOURCES
    }  # fmt: skip
    lines["teacher"] = [(v, 100 * results["methods"]["teacher"]["mean"]) for v in args.num_views]
    save_plot(Path(args.output_dir) / "schedule.svg", "views seen", "accuracy, %", lines, logarithmic=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--split", default="unseen_val", help="the classes to draw from")
    add("--num_ways", type=positive_int, default=5, help="classes in an episode")
    add("--num_shots", type=positive_int, default=5, help="support images a class")
    add("--num_episodes", type=positive_int, default=6, help="episodes")
    add("--num_real", type=positive_int, default=20, help="images of each class held back from the queries for real")
    add("--num_images", type=positive_int, default=60, help="generated images a class")
    add("--num_views", type=positive_int, nargs="+", default=[2500, 5000, 15000, 50000], help="lengths of training")
    add("--batch_size", type=positive_int, default=25, help="views a step")
    add("--learning_rate", type=positive, nargs=2, default=[3e-4, 1e-3], help="pretrained, from random weights")
    add("--distill", default="--num_views 2500 --train_batch_size 25", help="options of distill.py for all")
    add("--num_processes", type=positive_int, default=2, help="processes, among which the cores are shared out")
    add("--output_dir", default="outputs/schedule", help="folder to write to")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
