"""How long a student should learn: accuracy against the views that it has seen, for students distilled on the supports,
on TINT images and on other real images, pretrained ones and from random weights, on the same episodes of Icons-FS.
Prints a Markdown table and draws a picture for each start. Each length is a training of its own, with its own course of
the learning rate. Choose on classes that no result is reported of: `val` and `unseen_val`.

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
    """{(start, learning rate, source, views): the value of --methods}"""
    lines = [("pretrained", rate) for rate in args.pretrained_rates] + [("random weights", rate) for rate in args.rates]
    found = {}
    for start, rate in lines:
        own = f"--distill.learning_rate {rate} --distill.train_batch_size {args.batch_size} {STARTS[start]}"
        for source in SOURCES:
            for views in args.num_views:
                steps = -(-views // args.batch_size)
                name = f"{start[0]}{rate:g}_{source}_{views}"
                found[start, rate, source, views] = f"{name}={source} {own} --distill.max_train_steps {steps}"
    return found


def main(args):
    chosen = arms(args)
    results = run_episodes(args, ["teacher", *chosen.values()])
    accuracy = {key: results["methods"][text.split("=")[0]] for key, text in chosen.items()}
    teacher = results["methods"]["teacher"]
    lines = {start: {"teacher": [(views, 100 * teacher["mean"]) for views in args.num_views]} for start in STARTS}
    print(f"| student, learning rate, distilled on | {' views | '.join(f'{n:,}' for n in args.num_views)} views |")
    print("|---|" + "---|" * len(args.num_views))
    for start, rate, source in dict.fromkeys(key[:3] for key in chosen):
        found = [accuracy[start, rate, source, views] for views in args.num_views]
        print(f"| {start}, {rate:g}, {source} | {' | '.join(map(with_interval, found))} |")
        lines[start][f"{source}, {rate:g}"] = [(views, 100 * x["mean"]) for views, x in zip(args.num_views, found)]
    print(f"\nTeacher: {with_interval(teacher)}")
    for start, drawn in lines.items():
        path = Path(args.output_dir) / f"schedule_{start.replace(' ', '_')}.svg"
        save_plot(path, f"views seen ({start})", "accuracy, %", drawn, logarithmic=True)


def parse_args(argv=None):
    parser = episodes_parser(__doc__, "unseen_val", 6, "outputs/schedule")
    add = parser.add_argument
    add("--num_views", type=positive_int, nargs="+", default=[2500, 10000, 40000], help="lengths of training")
    add("--batch_size", type=positive_int, default=25, help="views a step")
    add("--pretrained_rates", type=positive, nargs="*", default=[3e-4, 1e-3], help="learning rates, pretrained")
    add("--rates", type=positive, nargs="*", default=[1e-3], help="learning rates, from random weights")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
