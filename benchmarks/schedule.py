"""How long a student should learn: accuracy against the views that it has seen, for students distilled on the supports,
on TINT images and on other real images, pretrained ones and from random weights, on the same episodes of Icons-FS.
Prints a Markdown table and draws a picture. Each length is a training of its own, with its own course of the learning
rate. Choose on classes that no result is reported of: `val` and `unseen_val`.

    python -m benchmarks.schedule --split unseen_val --num_episodes 6

Everything finished is kept below --output_dir: more episodes or lengths cost only what is new.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

from assets.training import save_plot
from benchmarks.students import episodes_parser, run_episodes
from common.cli import positive, positive_int, run
from common.report import with_interval

STARTS = {"pretrained": "", "random weights": "--distill.student conv4_64"}
SOURCES = ("supports", "tint", "real")


def arms(args):
    """{(start, source, views): the value of --methods}"""
    found = {}
    for start, weights in STARTS.items():
        rate = args.learning_rate[start != "pretrained"]
        own = f"--distill.learning_rate {rate} --distill.train_batch_size {args.batch_size} {weights}"
        for source in SOURCES:
            for views in args.num_views:
                steps = -(-views // args.batch_size)
                found[start, source, views] = (
                    f"{start[0]}_{source}_{views}={source} {own} --distill.max_train_steps {steps}"
                )
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
    parser = episodes_parser(__doc__, "unseen_val", 6, "outputs/schedule")
    add = parser.add_argument
    add("--num_views", type=positive_int, nargs="+", default=[2500, 5000, 15000, 50000], help="lengths of training")
    add("--batch_size", type=positive_int, default=25, help="views a step")
    add("--learning_rate", type=positive, nargs=2, default=[3e-4, 1e-3], help="pretrained, from random weights")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
