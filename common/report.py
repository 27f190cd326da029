"""report.html: results as one page without scripts or network, for phones, screens and paper.

Each kind of results has its template in common/templates, and here its plots, and such tables as are shown elsewhere
too: rows of text, of which the first is the head. Pictures are data URIs.
"""

import base64
import io
import re
from collections import defaultdict
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from common.images import as_picture
from common.plots import alpha_plot, calibration_plot, interval_plot, latency_plot
from common.records import write_file


def percent(value):
    return f"{100 * value:.1f}"


def with_interval(result):
    return f"{percent(result['mean'])} [{percent(result['ci95'][0])}, {percent(result['ci95'][1])}]"


def points(mean, low, high):
    """A difference of accuracies and its interval, in [-1, 1], as text in percentage points."""
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def better(pair):
    """Which of a paired difference "a" minus "b" is better, where its interval leaves out 0; else None."""
    low, high = pair["ci95"]
    return pair["a"] if low > 0 else pair["b"] if high < 0 else None


def data_uri(image):
    """A tensor [3, H, W] in [0, 1], or a PIL image, as the text of a PNG for a page: of a photograph a small one."""
    image = as_picture(image) if isinstance(image, torch.Tensor) else image.copy()
    image.thumbnail((192, 192))  # three times the side at which pages show it
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def in_percent(result):
    """Mean, low and high end of its interval, in percent; of nothing, nothing."""
    return [100 * value for value in (result["mean"], *result["ci95"])] if result else [None]


def comparison(results):
    """Plots of the accuracies and paired differences that a benchmark and a folder have in common."""
    pairs = [(f"{pair['a']} − {pair['b']}", *in_percent(pair)) for pair in results["paired_differences"]]
    return {
        "accuracy": interval_plot([(name, *in_percent(m)) for name, m in results["methods"].items()], "accuracy, %"),
        "paired": pairs and interval_plot(pairs, "points", zero=True),
    }


def benchmark_page(results):
    """Plots of a benchmark over episodes."""
    methods, plots, series = results["methods"], comparison(results), defaultdict(list)
    if len(methods) > 1:
        lines = [[100 * accuracy for accuracy in line] for line in zip(*(m["per_episode"] for m in methods.values()))]
        rows = [(name, *in_percent(m)) for name, m in methods.items()]
        plots["episodes"] = interval_plot(rows, "accuracy, %", lines=lines)
    for m in methods.values():
        if m["alpha"] is not None:
            others = re.sub(r"--generate\.alpha \S+", "", m["options"])
            series[f"{m['method']} {others}".strip()].append((m["alpha"], *in_percent(m)))
    if any(len({alpha for alpha, *_ in rows}) > 1 for rows in series.values()):
        plots["alpha"] = alpha_plot(series, "accuracy, %")
    return {"plots": plots}


def accuracy_page(results):
    """Plots of models measured on one folder."""
    calibration = {name: calibration_plot(m["calibration"]) for name, m in results["methods"].items()}
    return {"plots": comparison(results) | {"calibration": calibration}}


def generated_table(results):
    """The specificity and diversity of generated and real images."""
    rows = [(name, None, v) for name, v in results["real"].items()]
    rows += [(name, v["alpha"], v) for name, group in results["sets"].items() for v in group]

    def known(value, form):
        return "" if value is None else form.format(value)

    return [["images", "alpha", "number", "teacher agrees, %", "nearest support", "pairwise"]] + [
        [name, known(alpha, "{:g}"), str(v["images"]), known(v["agreement"] and with_interval(v["agreement"]), "{}"),
         known(v["nearest_support"], "{:.3f}"), known(v["pairwise"], "{:.3f}")]
        for name, alpha, v in rows
    ]  # fmt: skip


def generated_page(results):
    """Table and plots of generated images measured against their supports."""
    plots = {}
    yardstick, real = list(results["real"].items())[-1]  # the supports, unless there are other real images
    wanted = {
        "Teacher's agreement with the label, 95% intervals": ("agreement, %", lambda v: in_percent(v["agreement"])),
        "Cosine distance to the nearest support": ("distance", lambda v: [v["nearest_support"]]),
        "Cosine distance of two images of a class": ("distance", lambda v: [v["pairwise"]]),
    }
    for caption, (label, values) in wanted.items():
        series = {name: [(v["alpha"], *values(v)) for v in group] for name, group in results["sets"].items()}
        series = {name: [row for row in rows if None not in row] for name, rows in series.items()}
        series = {name: rows for name, rows in series.items() if len(rows) > 1}
        if series:
            known = values(real)[0]
            plots[caption] = alpha_plot(series, label, None if known is None else (yardstick, known))
    return {"cells": generated_table(results), "plots": plots}


def fidelity_table(results):
    """How far the exported student's answers are from PyTorch's."""
    rows = []
    for name, v in results["fidelity"].items():
        row = [name, f"{v['max_abs_diff']:.1e}", f"{v['mean_abs_diff']:.1e}", percent(v["top1_agreement"])]
        if change := v.get("accuracy_change"):
            row += [with_interval(v["accuracy"]), points(change["mean"], *change["ci95"])]
        rows.append(row + [""] * (6 - len(row)))
    head = ["student in", "largest difference", "mean", "top-1 agrees, %", "accuracy, %", "change, points"]
    return [head, *rows]


def export_page(results):
    """Table and plot of an exported student, and its latencies for each size of batch and number of threads; the plot
    is of the smallest batch and, on the CPU, most threads."""
    accuracies = results["accuracy"] | {f"student {k}": v.get("accuracy") for k, v in results["fidelity"].items()}
    smallest = min((row["batch_size"] for row in results["latency"]), default=1)
    most = max((row["threads"] for row in results["latency"]), default=1)
    latencies, rows = defaultdict(list), []

    def conditions(batch_size, threads):
        return f"batch of {batch_size}, {threads} thread{'s' * (threads > 1)}"

    for row in results["latency"]:
        name = "{model} {runtime} {precision}".format(**row) + f" on {row['device']}" * (row["device"] != "cpu")
        latencies[conditions(row["batch_size"], row["threads"])].append(row | {"name": name})
        if row["batch_size"] == smallest and (row["threads"] == most or row["device"] != "cpu"):
            accuracy = accuracies.get(name) or accuracies.get("{model} {runtime}".format(**row))
            known = in_percent(accuracy) if accuracy else [None] * 3
            rows.append((name.removeprefix("student "), row["median_ms"], *known))
    caption = f"Accuracy with 95% intervals, and median latency of a {conditions(smallest, most)}"
    plots = {caption: latency_plot(rows)} if any(mean is not None for _, _, mean, *_ in rows) else {}
    return {"cells": fidelity_table(results), "latencies": latencies, "plots": plots}


PAGES = {"benchmark": benchmark_page, "accuracy": accuracy_page, "generated": generated_page, "export": export_page}
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined,
    autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
TEMPLATES.filters |= {
    "percent": percent, "interval": with_interval, "better": better,
    "points": lambda pair: points(pair["mean"], *pair["ci95"]),
}  # fmt: skip


def write_report(path, results):
    """Writes the page, or the Markdown of an export, of what evaluate.py puts into results.json, whose "kind" is
    "benchmark", "accuracy" or "generated", or export.py into benchmark.json, "export"."""
    template = TEMPLATES.get_template(results["kind"] + Path(path).suffix)
    page = template.render(results, **PAGES[results["kind"]](results))
    write_file(path, page.encode(errors="backslashreplace"))  # names may be no UTF-8
