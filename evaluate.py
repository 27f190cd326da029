"""Measures classifiers on the same images: accuracy with 95% intervals, per class, and paired differences.

A model is a student's folder, an ONNX file, or a backbone (a teacher, or a student before distillation), which
classifies by cosine prototypes of --support_dir. NAME=PATH names it in the results.

    accelerate launch evaluate.py --data_dir outputs/demo/query --support_dir outputs/demo/support \\
        --model teacher=assets/teacher tint=outputs/demo/student onnx=outputs/demo/export/student_fp32.onnx
"""

import html
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from common import models
from common.cli import UserError, argument_parser, positive_int, run, settings_of, start, whole_file, write_json
from common.images import list_images, load_folder, load_image
from common.onnx_model import OnnxClassifier
from common.statistics import paired_difference, wilson_interval


class Images(Dataset):
    """(position, image [3, size, size] in [0, 1]) of a list of files."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return i, load_image(self.paths[i], self.size)


def load_classifier(path, classes, args, device):
    """What classifies images [B, 3, H, W] in [0, 1]: (function to logits, class names, input side, kind).

    The kind is "head" where the model was trained on the folder's classes, else "prototypes" (of --support_dir).
    """
    if path.endswith(".onnx"):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file.")
        model = OnnxClassifier(path, device)
        require(classes, model.classes, path, args.data_dir)
        return model, model.classes, models.input_size(model)[0], "head"
    names = models.class_names(path)
    if names and set(classes) <= set(names):
        model = models.load_model(path).to(device)
        size = models.input_size(model)[0]
        return lambda images: model(models.normalize(model, images)), names, size, "head"
    if not args.support_dir:
        raise UserError(
            f"{path} does not know the classes of {args.data_dir}: give --support_dir, to classify by prototypes."
        )
    model = models.load_model(path, image_size=args.teacher_image_size).to(device)
    size = models.input_size(model)[0]
    supports, labels, names, _ = load_folder(args.support_dir, size)
    require(classes, names, args.support_dir, args.data_dir)
    return models.PrototypeClassifier(model, supports.to(device), labels), names, size, "prototypes"


def require(classes, names, owner, data_dir):
    if not set(classes) <= set(names):
        raise UserError(f"{owner} lacks classes of {data_dir}: {sorted(set(classes) - set(names))}.")


@torch.no_grad()
def predict(classifier, paths, size, args, accelerator):
    """The predicted output index of each image [N], the same on every process."""
    loader = accelerator.prepare(DataLoader(Images(paths, size), args.batch_size))
    predictions = torch.empty(len(paths), dtype=torch.long)
    for positions, images in tqdm(loader, desc="evaluating", disable=not accelerator.is_local_main_process):
        with accelerator.autocast():
            logits = classifier(images)
        if not logits.isfinite().all():
            raise UserError("a model answers NaN: it is broken, or needs --mixed_precision no.")
        found = accelerator.gather_for_metrics((positions, logits.argmax(-1)))
        predictions[found[0].cpu()] = found[1].cpu()
    return predictions


def summarise(predictions, labels, classes, names):
    """Accuracy with its Wilson interval over images, all and per class; the confusion matrix (rows: truth).

    Args:
        predictions: indices into `names`, the model's classes. labels: indices into `classes`, the folder's.
    """
    truth = torch.tensor([names.index(c) for c in classes])[labels]
    correct = predictions == truth

    def accuracy(which):
        hits, count = int(correct[which].sum()), int(which.sum())
        return {"mean": hits / count, "ci95": wilson_interval(hits, count), "count": count}

    confusion = torch.zeros(len(classes), len(names), dtype=torch.long)
    confusion.index_put_((labels, predictions), torch.tensor(1), accumulate=True)
    return accuracy(torch.ones_like(correct)) | {
        "per_class": {c: accuracy(labels == i) for i, c in enumerate(classes)},
        "confusion": {"rows": list(classes), "columns": list(names), "counts": confusion.tolist()},
        "correct": correct.int().tolist(),
    }


def percent(value):
    return f"{100 * value:.1f}"


def with_interval(result):
    return f"{percent(result['mean'])} [{percent(result['ci95'][0])}, {percent(result['ci95'][1])}]"


def write_report(path, results):
    """report.html: one file, no scripts; accuracies with intervals as a plot, per class, confusion matrices."""
    escape = html.escape

    def bar(result):
        low, high = (100 * x for x in result["ci95"])
        return (
            '<svg viewBox="0 0 100 6" preserveAspectRatio="none" role="img">'
            f'<rect width="{100 * result["mean"]:.2f}" height="6" class="bar"/>'
            f'<rect x="{low:.2f}" y="2.5" width="{high - low:.2f}" height="1" class="whisker"/></svg>'
        )

    methods = results["methods"]
    rows = [
        f"<tr><th>{escape(n)}<td>{with_interval(m)}<td>{m['classifier']}<td class=plot>{bar(m)}"
        for n, m in methods.items()
    ]
    pairs = [
        f"<tr><th>{escape(p['a'])} − {escape(p['b'])}"
        f"<td>{percent(p['mean'])} [{percent(p['ci95'][0])}, {percent(p['ci95'][1])}]"
        for p in results["paired_differences"]
    ]
    per_class = ["<tr><th>class" + "".join(f"<th>{escape(n)}" for n in methods)] + [
        f"<tr><th>{escape(c)}" + "".join(f"<td>{with_interval(m['per_class'][c])}" for m in methods.values())
        for c in results["classes"]
    ]
    confusions = []
    for n, m in methods.items():
        head = "".join(f"<th>{escape(c)}" for c in m["confusion"]["columns"])
        body = "".join(
            f"<tr><th>{escape(c)}" + "".join(f"<td>{k}" for k in counts)
            for c, counts in zip(m["confusion"]["rows"], m["confusion"]["counts"])
        )
        confusions.append(f"<h3>{escape(n)}</h3><div><table><tr><th>truth \\ answer{head}{body}</table></div>")
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
div {{ overflow-x: auto }} table {{ border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }}
th {{ font-weight: 600 }} td {{ white-space: nowrap }}
.plot {{ width: 40% }} svg {{ width: 100%; height: 1.1rem; background: #f0f0f0 }}
.bar {{ fill: #7aa6d8 }} .whisker {{ fill: #12365c }}
</style>
<h1>Evaluation</h1>
<p>{results["num_images"]} images of {len(results["classes"])} classes from <code>{escape(results["data_dir"])}</code>.
Accuracy in percent; 95% Wilson intervals over the images of this folder.</p>
<div><table>{"".join(rows)}</table></div>
<h2>Paired differences</h2><p>On the same images, in percentage points, with 95% intervals.</p>
<div><table>{"".join(pairs) or "<tr><td>one model only"}</table></div>
<h2>Per class</h2><div><table>{"".join(per_class)}</table></div>
<h2>Confusion</h2>{"".join(confusions)}
</html>
"""
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def main(args):
    specs = {}
    for spec in args.model:
        name, separator, path = spec.partition("=")
        named = separator and "/" not in name
        specs[name if named else spec] = path if named else spec
    if len(specs) < len(args.model):
        raise UserError(f"--model {' '.join(args.model)}: two models have the same name.")
    by_class = list_images(args.data_dir)
    classes = list(by_class)
    paths = [path for name in classes for path in by_class[name]]
    labels = torch.tensor([i for i, name in enumerate(classes) for _ in by_class[name]])

    accelerator = start(args)
    methods = {}
    for name, path in specs.items():
        classifier, names, size, kind = load_classifier(path, classes, args, accelerator.device)
        predictions = predict(classifier, paths, size, args, accelerator)
        methods[name] = {"classifier": kind} | summarise(predictions, labels, classes, names)
        accelerator.log({f"accuracy/{name}": methods[name]["mean"]})
    pairs = [
        {"a": a, "b": b} | dict(zip(("mean", "ci95"), (d[0], d[1:])))
        for i, b in enumerate(methods)
        for a in list(methods)[i + 1 :]
        for d in [paired_difference(methods[a]["correct"], methods[b]["correct"])]
    ]
    results = {
        "settings": settings_of(args),
        "data_dir": str(args.data_dir),
        "num_images": len(paths),
        "classes": classes,
        "methods": methods,
        "paired_differences": pairs,
    }
    if accelerator.is_main_process:
        write_json(Path(args.output_dir) / "results.json", results)
        write_report(Path(args.output_dir) / "report.html", results)
    accelerator.end_training()
    width = max(map(len, methods))
    for name, result in methods.items():
        accelerator.print(f"{name:{width}}  {with_interval(result)} %  by {result['classifier']}")


def parse_args():
    parser = argument_parser(__doc__, "outputs/demo/evaluation")
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        default=["outputs/demo/student"],
        metavar="[NAME=]PATH",
        help="model folders, timm names or ONNX files to measure on the same images",
    )
    add("--data_dir", default="outputs/demo/query", help="the images to measure on: one folder per class")
    add("--support_dir", help="support images, for models that do not know the classes")
    add(
        "--teacher_image_size",
        type=positive_int,
        help="input side of models that classify by prototypes; default: their own",
    )
    add("--batch_size", type=positive_int, default=64, help="images classified together")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args)
