"""How many images a class are worth generating: accuracy of students distilled on 10 to 1000 TINT images a class,
pretrained ones and from random weights, on the same episodes of Icons-FS, against their number and against what they
and their inversion cost at Stable Diffusion 1.5's size. Prints a Markdown table and draws two pictures. Choose on
classes that no result is reported of: `val` and `unseen_val`.

    python -m benchmarks.images_per_class --split unseen_val --num_episodes 6

Everything finished is kept below --output_dir: more episodes or numbers cost only what is new.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import tint_generate
from assets.training import save_plot
from benchmarks.flops import generation
from benchmarks.students import episodes_parser, run_episodes
from common.cli import positive, positive_int, run
from common.report import points, with_interval

STARTS = {  # from random weights each view is new: of 2,500 that come round, many images would never be seen
    "pretrained": "--distill.max_train_steps 100",
    "random weights": "--distill.student conv4_64 --distill.max_train_steps 400 --distill.num_views 0",
}


def main(args):
    """Images of 0 are the supports alone."""
    arms = {(start, n): f"{start[0]}{n}" for start in STARTS for n in (0, *args.num_images_per_class)}
    methods = [
        f"{name}={f'tint --generate.num_images_per_class {n}' if n else 'supports'} {STARTS[start]}"
        for (start, n), name in arms.items()
    ]
    results = run_episodes(args, methods)
    accuracy = {key: results["methods"][name] for key, name in arms.items()}
    pairs = {(pair["a"], pair["b"]): (pair["mean"], *pair["ci95"]) for pair in results["paired_differences"]}
    each = generation(16, 1.0, tint_generate.parse_args([]))
    cost = {n: round(args.inversion_tflop + n * each) if n else 0 for n in (0, *args.num_images_per_class)}
    print(
        "| images a class | TFLOP | pretrained | *minus the fewer before* | from random weights | *minus the fewer* |"
    )
    print("|---|---|---|---|---|---|")
    numbers = [*cost]
    for before, n in zip([None, *numbers], numbers):
        cells = []
        for start in STARTS:
            pair = pairs.get((arms[start, n], arms.get((start, before))))
            cells += [with_interval(accuracy[start, n]), points(*pair) if pair else ""]
        print(f"| {n or 'supports alone'} | {cost[n]:,} | {' | '.join(cells)} |")
    for x, label in ((lambda n: n, "images a class"), (cost.get, "TFLOP a class")):
        lines = {start: [(x(n), 100 * accuracy[start, n]["mean"]) for n in numbers[1:]] for start in STARTS}
        save_plot(Path(args.output_dir) / f"{label.split()[0]}.svg", label, "accuracy, %", lines, logarithmic=True)


def parse_args(argv=None):
    parser = episodes_parser(__doc__, "unseen_val", 6, "outputs/images_per_class")
    add = parser.add_argument
    add("--num_images_per_class", type=positive_int, nargs="+", default=[10, 30, 100, 300, 1000])
    add("--inversion_tflop", type=positive, default=711.0, help="of a class, by benchmarks.flops")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
