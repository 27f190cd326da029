"""Measures classifiers with honest statistics: on a folder of images, or over few-shot episodes.

On a folder: students, ONNX files, and backbones (a teacher, or a student before distillation), which classify by cosine
prototypes of --support_dir; accuracy, confusion, calibration and paired differences on the same images.

    accelerate launch evaluate.py --data_dir outputs/demo/query --support_dir outputs/demo/support \\
        --model teacher=assets/teacher tint=outputs/demo/student onnx=outputs/demo/export/student_fp32.onnx

Over episodes: each draws classes, supports and queries, and runs the scripts of this project for each arm; arms share
what they have in common. Finished work is kept: more episodes, queries or arms cost only what is new.

    accelerate launch evaluate.py --dataset icons_fs --num_episodes 30 --num_shots 5 \\
        --methods teacher prototypes supports tint "free=tint --generate.alpha 1" --output_dir outputs/benchmark

On generated images: how specific and how diverse they are in the teacher's feature space, at each alpha.

    python evaluate.py --generated_dir outputs/demo/generated --support_dir outputs/demo/support \\
        --data_dir outputs/demo/query --output_dir outputs/demo/evaluation_generated

Planning: the cheapest numbers of episodes and queries for a wanted precision (theorem 1 of 2406.03146), or a benchmark
that begins with a pilot and stops when its intervals are narrow enough (Stein, 1945).

    python evaluate.py --plan --pilot outputs/benchmark/results.json --half_width 0.01
    python evaluate.py --dataset icons_fs --methods tint textual_inversion --compare tint textual_inversion \\
        --num_episodes 10 --half_width 0.005 --output_dir outputs/difference
"""

import common.passive  # noqa: F401  (before torch is loaded)

from itertools import pairwise
from pathlib import Path

import torch
from accelerate.utils import tqdm
from torch.utils.data import DataLoader

import distill
import tint_generate
import tint_invert
from common import datasets, episodes, generated, models, planning, statistics
from common.cli import UserError, argument_parser, named_paths, non_negative, positive, positive_int, run, share
from common.images import count_supports, list_images, load_image, with_labels
from common.memory import announce
from common.processes import start
from common.records import provenance, refuse_other_results, write_json
from common.report import data_uri, generated_table, points, with_interval, write_report
from common.runtimes import OPENED_BY, open_exported
from common.shards import require_finished

STAGES = {"invert": tint_invert, "generate": tint_generate, "distill": distill}  # that the arms of an episode run
OPTIONS = ("model", "data_dir", "support_dir", "teacher_image_size", "batch_size", "seed")  # that count on a folder
PLANNING = ("compare", "half_width", "budget_seconds", "episode_seconds", "query_seconds", "max_queries")
READS = {  # what each kind of measurement reads beside the options that all scripts share
    "pilot": (*PLANNING, "plan", "pilot", "method"),
    "plan": (*PLANNING, "plan", "accuracy", "disagreement", "episode_variance", "num_ways"),
    "dataset": (*episodes.OPTIONS, "batch_size", "half_width", "compare", "method"),
    "generated_dir": (*generated.OPTIONS, "batch_size"),
    "data_dir": OPTIONS,
}
KINDS = {"dataset": "benchmark", "generated_dir": "generated", "data_dir": "accuracy"}  # of their results


def load_classifier(path, classes, args, device):
    """What classifies images [B, 3, H, W] in [0, 1]: (function to logits, class names, input side, kind).

    The kind is "head" where the model knows the folder's classes, and "prototypes" (of --support_dir) where it knows
    none of them, as a backbone does, or where they are asked for by prototypes:PATH. One that knows some is refused.
    """
    path, by_prototypes = path.removeprefix("prototypes:"), path.startswith("prototypes:")
    if Path(path).suffix in OPENED_BY:
        if by_prototypes:
            raise UserError(f"prototypes:{path}: a file of export.py has no features to make prototypes of.")
        model = open_exported(path, device)
        require(classes, model.classes, path, args.data_dir)
        return model, model.classes, models.input_size(model)[0], "head"
    names = models.class_names(path) or []
    by_prototypes = by_prototypes or not set(classes) & set(names)
    if not by_prototypes:
        hint = f" Remove their folders, or say prototypes:{path} to classify by prototypes of --support_dir."
        require(classes, names, path, args.data_dir, hint)
    elif not args.support_dir:
        raise UserError(f"{path} does not know the classes of {args.data_dir}: give --support_dir, for prototypes.")
    model = models.load_model(path, image_size=args.teacher_image_size if by_prototypes else None).to(device)
    announce([model], {f"{path} (--batch_size)": models.answering_bytes(model, args.batch_size)}, device)
    if not by_prototypes:
        return models.with_head(model), names, models.input_size(model)[0], "head"
    classifier, names = models.of_supports(model, args.support_dir, batch_size=args.batch_size)
    require(classes, names, args.support_dir, args.data_dir)
    return classifier, names, models.input_size(model)[0], "prototypes"


def require(classes, names, owner, data_dir, hint=""):
    """A UserError where `owner`, which knows the classes `names`, lacks some of the folder's."""
    if not set(classes) <= set(names):
        raise UserError(f"{owner} lacks classes of {data_dir}: {sorted(set(classes) - set(names))}.{hint}")


@torch.no_grad()
def predict(classifier, num_classes, paths, size, args, accelerator):
    """The predicted output index and its probability for each image, [N] and [N], the same on every process."""

    def load(positions):
        return torch.tensor(positions), torch.stack([load_image(paths[i], size) for i in positions])

    loader = accelerator.prepare(DataLoader(range(len(paths)), args.batch_size, collate_fn=load))
    predictions, confidences = torch.empty(len(paths), dtype=torch.long), torch.empty(len(paths))
    for positions, images in tqdm(loader, desc="evaluating"):
        with accelerator.autocast():
            logits = classifier(images)
        if logits.shape[1:] != (num_classes,):
            raise UserError(f"a model gives {logits.shape[1]} answers and names {num_classes} classes: it is damaged.")
        if not logits.isfinite().all():
            raise UserError("a model answers NaN: it is broken, or needs --mixed_precision no.")
        confidence, prediction = logits.float().softmax(-1).max(-1)
        found = accelerator.gather_for_metrics((positions, prediction, confidence))
        predictions[found[0].cpu()], confidences[found[0].cpu()] = found[1].cpu(), found[2].cpu()
    return predictions, confidences


def calibration(confidences, correct, bins=10):
    """Expected calibration error over equal bins of confidence (Guo et al., 1706.04599, equation 3), and the bins."""
    edges, rows = torch.linspace(0, 1, bins + 1), []
    which = torch.bucketize(confidences, edges[1:-1])
    for b, (low, high) in enumerate(pairwise(edges.tolist())):
        inside = which == b
        sure, right = (x[inside].float().mean().item() if inside.any() else None for x in (confidences, correct))
        rows.append({"low": low, "high": high, "count": int(inside.sum()), "confidence": sure, "accuracy": right})
    gaps = [row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows if row["count"]]
    return sum(gaps) / len(correct), rows


def summarise(predictions, confidences, labels, classes, names, paths, num_worst=12):
    """Accuracy with its Wilson interval over images, all and per class; confusion (rows: truth); calibration; the wrong
    answers given with most confidence.

    Args:
        predictions: indices into `names`, the model's classes. labels: indices into `classes`, the folder's.
    """
    truth = torch.tensor([names.index(c) for c in classes])[labels]
    correct = predictions == truth
    confusion = torch.zeros(len(classes), len(names), dtype=torch.long)
    confusion.index_put_((labels, predictions), torch.tensor(1), accumulate=True)
    ece, bins = calibration(confidences, correct)
    wrong = [i for i in confidences.argsort(descending=True).tolist() if not correct[i]]
    return statistics.accuracy(correct) | {
        "per_class": {c: statistics.accuracy(correct[labels == i]) for i, c in enumerate(classes)},
        "confusion": {"rows": list(classes), "columns": list(names), "counts": confusion.tolist()},
        "ece": ece,
        "calibration": bins,
        "worst": [
            {"file": "/".join(paths[i].parts[-2:]), "truth": classes[labels[i]], "answer": names[predictions[i]],
             "confidence": confidences[i].item(), "image": data_uri(load_image(paths[i]))}
            for i in wrong[:num_worst]
        ],
        "correct": correct.int().tolist(),
    }  # fmt: skip


def evaluate_folder(args, accelerator):
    """Accuracy of each --model on the images of --data_dir, for results.json."""
    require_finished(args.data_dir)
    by_class = list_images(args.data_dir)
    classes, (paths, labels) = list(by_class), with_labels(by_class)
    known = count_supports(paths, args.data_dir, args.support_dir)
    methods = {}
    for name, path in named_paths(args.model).items():
        classifier, names, size, kind = load_classifier(path, classes, args, accelerator.device)
        answers = predict(classifier, len(names), paths, size, args, accelerator)
        methods[name] = {"classifier": kind} | summarise(*answers, labels, classes, names, paths)
        del classifier  # before the next is there
    pairs = []
    for a, b in statistics.pairs_of(methods):
        mean, *interval = statistics.paired_difference(methods[a]["correct"], methods[b]["correct"])
        pairs.append({"a": a, "b": b, "mean": mean, "ci95": interval})
    results = {"kind": "accuracy", "data_dir": str(args.data_dir), "num_images": len(paths), "classes": classes}
    results |= {"num_supports_among_images": known, "methods": methods, "paired_differences": pairs}
    return results | provenance(args, OPTIONS)


def in_words(results):
    """The lines that say what results.json holds."""
    if results["kind"] == "generated":
        return ["{:24}{:>7}{:>8}{:>22}{:>17}{:>10}".format(*row) for row in generated_table(results)]
    methods, pairs = results["methods"], results["paired_differences"]
    width = max(map(len, methods))
    lines = [
        f"{name:{width}}  {with_interval(found)} %" + (f"  by {found['classifier']}" if "classifier" in found else "")
        for name, found in methods.items()
    ]
    return lines + [f"{p['a']} - {p['b']}: {points(p['mean'], *p['ci95'])} points" for p in pairs]


def main(args):
    kind = next((kind for kind in READS if vars(args)[kind]), "data_dir")
    shared = vars(argument_parser("", "").parse_args([]))
    for name, default in vars(parse_args([])).items():
        if vars(args)[name] != default and name not in (*shared, *READS[kind]):
            raise UserError(f"a measurement by --{kind} does not read --{name}: leave it out.")
    if args.compare and (args.method or args.compare[0] == args.compare[1]):
        raise UserError("--compare wants two different methods, and no --method beside it.")
    if kind in ("pilot", "plan"):
        planning.print_plan(args)
        return
    if (args.compare or args.method) and args.half_width is None:
        raise UserError("--compare and --method say what --half_width or --plan is for: give one of these.")
    if kind == "data_dir":
        args.data_dir, args.model = args.data_dir or "outputs/demo/query", args.model or ["outputs/demo/student"]
    refuse_other_results(Path(args.output_dir) / "results.json", KINDS[kind])
    rank = episodes.leave_group() if args.dataset else 0
    accelerator = start(args)
    if args.dataset:
        results = episodes.evaluate_episodes(args, STAGES, accelerator, rank)
    else:
        results = (generated.evaluate_generated if args.generated_dir else evaluate_folder)(args, accelerator)
    if results and accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        write_json(output_dir / "results.json", results)
        write_report(output_dir / "report.html", results)
        accelerator.log({f"accuracy/{name}": found["mean"] for name, found in results.get("methods", {}).items()})
        print(*in_words(results), f"see {output_dir / 'report.html'}", sep="\n")
    accelerator.end_training()


def number_or_all(text):
    return None if text == "all" else positive_int(text)


def parse_args(argv=None):
    parser = argument_parser(__doc__, "outputs/demo/evaluation")
    add = parser.add_argument
    add("--teacher_image_size", type=positive_int, help="input side of what classifies by prototypes; default: its own")
    add("--batch_size", type=positive_int, default=64, help="images classified together")
    add = parser.add_argument_group("models on a folder").add_argument
    add("--model", nargs="+", metavar="[NAME=]PATH", help="model folders, timm names or files of export.py (default: "
        "outputs/demo/student); by prototypes of --support_dir if it knows none, or prototypes:PATH")  # fmt: skip
    add("--data_dir", help="the images to measure on: one folder per class; default: outputs/demo/query")
    add("--support_dir", help="support images, for models that do not know the classes")
    add = parser.add_argument_group("generated images").add_argument
    add("--generated_dir", nargs="+", metavar="[NAME=]DIR", help="what tint_generate.py wrote, to measure against "
        "--support_dir with --teacher; real images of the classes, --data_dir, are the yardstick")  # fmt: skip
    add = parser.add_argument_group("methods over episodes").add_argument
    datasets.add_options(add)
    add("--num_queries", type=number_or_all, default=15, metavar="N|all", help="queries a class; all: all other images")
    add("--num_episodes", type=positive_int, default=10, help="episodes; finished ones are kept")
    add("--methods", nargs="+", default=["teacher", "prototypes", "supports", "tint"], metavar="[NAME=]METHOD",
        help=f"{', '.join(episodes.METHODS)}; in quotes with options of the scripts that it runs, as "
        '"free=tint --generate.alpha 1"')  # fmt: skip
    add("--pretrained_model_name_or_path", default="assets/mini-sd", help="Stable Diffusion model: folder or hub name")
    add("--teacher", default="assets/teacher", help="timm backbone: model folder, timm name or hf-hub:name")
    add("--student", default="assets/student", help="model folder to start from, or timm name for random weights")
    add("--num_real", type=positive_int, default=40, help="images of each class held back from the queries for real")
    add("--num_unlabeled", type=positive_int, default=100, help="images, times --num_ways, for base and mined")
    add("--web_dir", help="images of anything to mine from; default of icons_fs: those of it that mini-SD learned from")
    for script, module in STAGES.items():
        add(f"--{script}", default="", metavar='"OPTIONS"', help=f"options of {module.__name__}.py, for all methods")
    add = parser.add_argument_group("planning").add_argument
    add("--plan", action="store_true", help="print the cheapest numbers of episodes and queries")
    add("--pilot", help="results.json of a few episodes")
    add("--method", help="the method to plan for; default: the pilot's last; in a benchmark: each of --methods")
    add("--compare", nargs=2, metavar="METHOD", help="plan for the paired difference, the first minus the second")
    add("--accuracy", type=float, help="without a pilot: the accuracy, or for a difference the difference, expected")
    add("--disagreement", type=share, help="for a difference: share of queries that only one of the two gets right")
    add("--episode_variance", type=non_negative, help="variance s2 of the accuracy, or the difference, over episodes")
    add("--episode_seconds", type=non_negative, help="cost of an episode without queries; default: the pilot's")
    add("--query_seconds", type=non_negative, help="cost of a query; default: the pilot's")
    add("--half_width", type=positive, help="wanted half-width of the 95%% interval, as 0.01 for one point; with "
        "--dataset: --num_episodes are a pilot, after which as many are run as that takes")  # fmt: skip
    add("--budget_seconds", type=positive, help="time to spend")
    add("--max_queries", type=positive_int, help="queries that an episode can have, of all its classes together")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args)
