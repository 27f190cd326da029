"""Students of several sizes, to choose one for a device: accuracy beside the latency of one image on one core,
in fp32 and int8 (ONNX Runtime). Prints a Markdown table.

    python -m benchmarks.student_sizes --split unseen_val --num_episodes 2 --more outputs/efficientnet_lite0

Each episode of Icons-FS inverts its supports and generates images once, on which every student is distilled, from
random weights or those of a folder; export.py then measures it on the episode's other images. What is finished is kept
below --output_dir. The latency of timm's students at 224 pixels, the size of most photos in use, stands beside.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import numpy as np

from benchmarks import write_supports
from common import datasets, models
from common.cli import HelpFormatter, natural_int, positive_int, run
from common.records import check_settings, read_json, write_json
from common.report import with_interval
from common.statistics import benchmark_accuracy

ROOT = Path(__file__).parent.parent
STUDENTS = {  # and the side of the images that they see
    "conv4_32": 32, "conv4_64": 32, "mobilenetv3_small_050": 64, "mobilenetv4_conv_small": 64,
    "tf_efficientnet_lite0": 64, "resnet10t": 64,
}  # fmt: skip
PRECISIONS = "fp32", "int8"


def students(args):
    return STUDENTS | {str(Path(folder).resolve()): 64 for folder in args.more}


def folder_of(name):
    """The name of a student's folder; of one that starts from weights, these tell it from others."""
    weights = models.weights_of(name)
    return f"{Path(name).name}-{weights}" if weights else name


def script(name, folder, *options, done):
    """Runs a script into a folder, unless `done`, a file there, tells that it has been."""
    if not (folder / done).is_file():
        command = [sys.executable, f"{name}.py", "--output_dir", folder, *options]
        if code := subprocess.run(list(map(str, command)), cwd=ROOT, stdout=sys.stderr).returncode:
            sys.exit(code)  # the script has said why


def export(folder, student, *options):
    """Exports the student in a folder. Returns what benchmark.json says."""
    measured = "--precision", *PRECISIONS, "--runtime", "onnxruntime", "--benchmark", "--num_threads", 1
    script("export", folder, "--model", student, *measured, *options, done="benchmark.md")
    return read_json(folder / "benchmark.json")


def distilled(folder, name, size, *options):
    chosen = "--student", name, "--student_image_size", size, "--learning_rate", 1e-3
    script("distill", folder, *chosen, *options, done="distill.json")
    return folder


def run_episode(folder, dataset, index, args):
    """{student: what export.py says} of an episode."""
    support, query, generated = folder / "support", folder / "query", folder / "generated"
    order = datasets.draw_episode(dataset, 5, 5, args.seed, index)
    if not support.is_dir():
        datasets.write_images(dataset, {name: drawn[5:] for name, drawn in order.items()}, query)
        write_supports(dataset, 5, 5, args.seed, index, support)
    seed = "--seed", index
    script("tint_invert", folder / "inversion", "--support_dir", support, *seed, done=f"{max(order)}/inversion.json")
    made = "--inversion_dir", folder / "inversion", "--num_images_per_class", args.num_images, "--no-agreement"
    script("tint_generate", generated, *made, *seed, done="grid.png")
    found = {}
    for name, size in students(args).items():
        trained = "--support_dir", support, "--train_dir", generated, "--max_train_steps", args.max_train_steps, *seed
        student = distilled(folder / folder_of(name), name, size, *trained)
        images = "--data_dir", generated, "--query_dir", query, "--support_dir", support
        found[name] = export(folder / f"{folder_of(name)}-export", student, *images)
    return found


def latency_at(size, name, root):
    """export.py's word on the student `name` of hardly any training, at another size of images."""
    folder, support = root / f"{size}" / folder_of(name), root / "000" / "support"
    student = distilled(folder, name, size, "--support_dir", support, "--supports_only", "--max_train_steps", 2)
    return export(root / f"{size}" / f"{folder.name}-export", student, "--support_dir", support)


def cells(results, precision):
    """Of several results of export.py: mean accuracy in percent with its 95% interval over episodes, the mean of the
    median milliseconds of one image, and the file's megabytes."""
    found = [result["fidelity"][f"onnxruntime {precision}"].get("accuracy") for result in results]
    times = [row["median_ms"] for result in results for row in result["latency"] if row["precision"] == precision]
    known = ""
    if all(found):
        counts = np.array([accuracy["count"] for accuracy in found])
        hits = np.array([accuracy["mean"] for accuracy in found]) * counts
        known = with_interval(benchmark_accuracy(hits.round(), counts))
    return known, f"{np.mean(times):.2f}", f"{results[0]['bytes'][f'student_{precision}.onnx'] / 1e6:.2f}"


def main(args):
    os.environ["OMP_NUM_THREADS"] = str(args.num_threads)
    dataset, root = datasets.load_dataset("icons_fs", args.split), (ROOT / args.output_dir).resolve()
    settings = {name: vars(args)[name] for name in ("split", "num_images", "max_train_steps", "seed")}
    if not check_settings(root / "settings.json", settings):
        write_json(root / "settings.json", {"settings": settings})
    episodes = [run_episode(root / f"{k:03d}", dataset, k, args) for k in range(args.num_episodes)]
    print("| student | parameters | side | MFLOP | accuracy, fp32 | int8 | ms, fp32 | int8 | MB, fp32 | int8 "
          "| ms at 224 pixels, fp32 | int8 |\n|---|" + "---|" * 11)  # fmt: skip
    for name, size in students(args).items():
        results = [episode[name] for episode in episodes]
        parts = zip(*(cells(results, precision) for precision in PRECISIONS))
        large = [latency_at(224, name, root)] if size > 32 else []
        slow = [cells(large, precision)[1] if large else "" for precision in PRECISIONS]
        parameters = sum(p.numel() for p in models.load_model(root / "000" / folder_of(name)).parameters())
        facts = f"{parameters:,}", str(size), f"{results[0]['flops']['student'] / 1e6:.0f}"
        print("|", " | ".join([Path(name).name, *facts, *(cell for part in parts for cell in part), *slow]), "|")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--split", default="unseen_val", help="the classes to draw from")
    add("--num_episodes", type=positive_int, default=4, help="5-way 5-shot episodes")
    add("--num_images", type=positive_int, default=60, help="generated images a class")
    add("--max_train_steps", type=positive_int, default=400, help="steps of 50 views from random weights")
    add("--more", nargs="+", default=[], help="folders of more students, of 64 pixels, that start from their weights")
    add("--num_threads", type=positive_int, default=2, help="threads of all but the latencies")
    add("--output_dir", default="outputs/student_sizes", help="folder to write to")
    add("--seed", type=natural_int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
