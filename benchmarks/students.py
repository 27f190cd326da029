"""Students distilled on what each method gives them, pretrained ones and from random weights, on the same episodes of
Icons-FS. Prints a Markdown table: accuracy, and TINT minus each, paired, with 95% intervals.

    python -m benchmarks.students --split unseen --num_shots 5 --num_episodes 30

Everything finished is kept below --output_dir, by evaluate.py: started again, it goes on, and more episodes cost only
what is new.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

from common.cli import HelpFormatter, UserError, positive_int, run
from common.records import read_json
from common.report import points, with_interval

ROOT = Path(__file__).parent.parent
METHODS = {
    "supports": "supports",
    "strong": "supports, strongly augmented",
    "null_text": "null-text alone",
    "textual_inversion": "textual inversion alone",
    "unnamed": "the same, not started from the class's name",
    "tint": "TINT",
    "base": "images of base classes, labelled by the teacher",
    "mined": "images mined from what mini-SD learned from",
    "real": "other real images of the classes",
}
SAME_METHOD = {  # options beside those of the method that it is
    "strong": ("supports", "--distill.min_crop 0.3 --distill.mixup 0.5 --distill.cutmix 1"),
    "unnamed": ("textual_inversion", "--invert.initializer_token 'house tree key book clock camera'"),
}


def arms(args):
    """The values of --methods."""
    found = ["teacher", "prototypes"]
    for start, rate, weights in (("", args.learning_rate, ""), ("scratch_", "1e-3", "--distill.student conv4_64")):
        steps = args.max_train_steps[start != ""]
        for name in args.methods:
            method, extra = SAME_METHOD.get(name, (name, ""))
            own = "3e-4" if name == "strong" and not start else rate  # a larger one undoes what it was trained for
            options = f"--distill.learning_rate {own} --distill.max_train_steps {steps} {weights} {extra}"
            found.append(f"{start}{name}={method} {options}")
    return found


def command(args, methods):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.num_processes)),
        *("evaluate.py", "--dataset", "icons_fs", "--split", args.split, "--num_queries", "all"),
        *("--num_ways", str(args.num_ways), "--num_shots", str(args.num_shots)),
        *("--num_episodes", str(args.num_episodes), "--output_dir", args.output_dir, "--num_real", str(args.num_real)),
        *("--num_unlabeled", str(args.num_images), "--generate", f"--num_images_per_class {args.num_images}"),
        *(("--web_dir", args.web_dir) if args.web_dir else ()),
        *("--distill", args.distill, "--methods", *methods),
    ]


def run_episodes(args, methods):
    """results.json of evaluate.py on episodes of Icons-FS, in processes among which the cores are shared out."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.num_processes))}
    if code := subprocess.run(command(args, methods), cwd=ROOT, env=environment).returncode:
        sys.exit(code)  # evaluate.py has said why
    return read_json(ROOT / args.output_dir / "results.json")


def table(results):
    """Markdown of results.json."""
    differences = {}
    for pair in results["paired_differences"]:
        low, high = pair["ci95"]
        differences[pair["a"], pair["b"]] = pair["mean"], low, high
        differences[pair["b"], pair["a"]] = -pair["mean"], -high, -low
    methods = results["methods"]
    lines = [
        "| the student is distilled on | pretrained | *TINT minus it* | from random weights | *TINT minus it* |",
        "|---|---|---|---|---|",
        f"| nothing: its own prototypes | {with_interval(methods['prototypes'])} | "
        f"{points(*differences['tint', 'prototypes'])} | | |",
    ]
    for name, words in METHODS.items():
        if name not in methods:
            continue
        cells = []
        for start in ("", "scratch_"):
            pair = differences.get((f"{start}tint", start + name))
            cells += [with_interval(methods[start + name]), points(*pair) if pair else ""]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Teacher: {with_interval(methods['teacher'])}"])


def main(args):
    if "tint" not in args.methods:
        raise UserError("--methods lacks tint, which the others are compared with: name it too.")
    print(table(run_episodes(args, arms(args))))


def episodes_parser(description, split, num_episodes, output_dir):
    """A parser with the options that `run_episodes` reads, of which these are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--split", default=split, help="the classes to draw from: val, novel, unseen_val or unseen")
    add("--num_ways", type=positive_int, default=5, help="classes in an episode")
    add("--num_shots", type=positive_int, default=5, help="support images a class")
    add("--num_episodes", type=positive_int, default=num_episodes, help="episodes")
    add("--num_real", type=positive_int, default=20, help="images of each class held back from the queries for real")
    add("--num_images", type=positive_int, default=60, help="generated or unlabelled images a class")
    add("--web_dir", help="images to mine from; default: the drawings of Icons-FS that mini-SD learned from")
    add("--distill", default="--num_views 2500 --train_batch_size 25", help="options of distill.py for all")
    add("--num_processes", type=positive_int, default=2, help="processes, among which the cores are shared out")
    add("--output_dir", default=output_dir, help="folder to write to")
    return parser


def parse_args(argv=None):
    parser = episodes_parser(__doc__, "unseen", 30, "outputs/students")
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="what students are distilled on; with tint")
    add("--max_train_steps", type=positive_int, nargs=2, default=[100, 400], help="pretrained, from random weights")
    add("--learning_rate", default="1e-3", help="of pretrained students, but for strong supports, 3e-4")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
