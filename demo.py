"""The whole path on one 5-way 5-shot episode of Icons-FS: the five scripts, one after the other, and what came of it.

    python demo.py

Finished stages are kept: an interrupted demo goes on where it stopped. Delete outputs/demo to run it anew.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common.cli import HelpFormatter, natural_int, run
from common.records import check_settings, read_json, write_json

LAUNCH = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
STAGES = [
    ("episode", "-m common.datasets --output_dir {root} --seed {seed}"),
    ("invert", "{launch} tint_invert.py --support_dir {root}/support --output_dir {root}/inversion --seed {seed}"),
    ("generate", "{launch} tint_generate.py --inversion_dir {root}/inversion --output_dir {root}/generated"
                 " --num_images_per_class 100 --seed {seed}"),
    ("distill", "{launch} distill.py --support_dir {root}/support --output_dir {root}/student_supports --seed {seed}"
                " --supports_only"),
    ("distill", "{launch} distill.py --support_dir {root}/support --output_dir {root}/student --seed {seed}"
                " --train_dir {root}/generated"),
    ("evaluate", "{launch} evaluate.py --data_dir {root}/query --support_dir {root}/support"
                 " --output_dir {root}/evaluation --model teacher=assets/teacher student_before=assets/student"
                 " student_supports={root}/student_supports student_tint={root}/student --seed {seed}"),
    ("export", "{launch} export.py --model {root}/student --output_dir {root}/export --query_dir {root}/query"
               " --benchmark --teacher assets/teacher --seed {seed}"),
]  # fmt: skip
TITLES = {
    "teacher": "teacher (cosine prototypes)",
    "student_before": "student before distillation",
    "student_supports": "student distilled on the supports alone",
    "student_tint": "student distilled on TINT images",
}


def summarise(root, wall_seconds):
    """The numbers of summary.json, from what the scripts wrote."""
    inversions = [json.loads(path.read_text()) for path in sorted(root.glob("inversion/*/inversion.json"))]
    evaluation = json.loads((root / "evaluation" / "results.json").read_text())
    export = json.loads((root / "export" / "benchmark.json").read_text())
    latency = {(row["model"], row["runtime"]): row["median_ms"] for row in export["latency"] if row["batch_size"] == 1}
    return {
        "wall_seconds": wall_seconds,
        "accuracy": {n: {k: m[k] for k in ("mean", "ci95")} for n, m in evaluation["methods"].items()},
        "paired_differences": evaluation["paired_differences"],
        "reconstruction_psnr_db": {
            kind: statistics.mean(value for facts in inversions for value in facts["reconstruction_psnr_db"][kind])
            for kind in ("ddim", "null_text", "vae")
        },
        "onnx_max_abs_diff": export["fidelity"]["onnxruntime fp32"]["max_abs_diff"],
        "latency_ms": {
            "teacher": latency["teacher", "torch"],
            "student_torch": latency["student", "torch"],
            "student_onnx": latency["student", "onnxruntime"],
        },
    }


def main(args):
    root, here = Path(args.output_dir).resolve(), Path(__file__).parent
    root.mkdir(parents=True, exist_ok=True)
    record = root / "wall_seconds.json"  # of each command that is done
    check_settings(record, {"seed": args.seed})
    done = read_json(record)["commands"] if record.is_file() else {}
    environment = dict(os.environ)
    if not sys.stderr.isatty():
        environment["TQDM_MININTERVAL"] = "20"  # a log needs no moving bar
    for number, (stage, template) in enumerate(STAGES):
        command = template.format(launch=LAUNCH, root=shlex.quote(str(root)), seed=args.seed)
        if str(number) in done:
            continue
        print(f"--- {stage}: python {command}", flush=True)
        before = time.time()
        code = subprocess.run([sys.executable, *shlex.split(command)], cwd=here, env=environment).returncode
        if code:
            sys.exit(code)  # the script has said why
        done[str(number)] = round(time.time() - before, 1)
        write_json(record, {"settings": {"seed": args.seed}, "commands": done})

    wall_seconds = {}
    for number, (stage, _) in enumerate(STAGES):
        wall_seconds[stage] = round(wall_seconds.get(stage, 0) + done[str(number)], 1)
    summary = summarise(root, wall_seconds)
    write_json(root / "summary.json", summary)
    print(f"\naccuracy on the other images of the episode's classes, 95% interval ({sum(wall_seconds.values()):.0f} s)")
    for name, title in TITLES.items():
        mean, (low, high) = (summary["accuracy"][name][k] for k in ("mean", "ci95"))
        print(f"  {title:42} {mean:6.1%}  [{low:.1%}, {high:.1%}]")
    for pair in summary["paired_differences"]:
        if (pair["a"], pair["b"]) == ("student_tint", "student_supports"):
            low, high = (100 * x for x in pair["ci95"])
            print(f"  TINT minus supports alone, paired: {100 * pair['mean']:+.1f} points [{low:+.1f}, {high:+.1f}]")
    psnr, latency = summary["reconstruction_psnr_db"], summary["latency_ms"]
    print(f"reconstruction: VAE {psnr['vae']:.1f} dB, null-text {psnr['null_text']:.1f}, DDIM {psnr['ddim']:.1f}")
    print(
        f"latency of one image: teacher {latency['teacher']:.2f} ms, student {latency['student_torch']:.2f} ms in "
        f"PyTorch and {latency['student_onnx']:.2f} ms in ONNX Runtime"
    )
    root = args.output_dir
    print(f"pictures: {root}/generated/grid.png, {root}/inversion/*/reconstruction.png, {root}/evaluation/report.html")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output_dir", default="outputs/demo", help="folder to write to")
    parser.add_argument("--seed", type=natural_int, default=0, help="seed of the episode and of everything random")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
