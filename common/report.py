"""report.html: results as one page without scripts or network, for phones, screens and paper.

Each kind of results has its template in common/templates, and here what the template shows: tables, rows of text of
which the first is the head, and plots. Pictures are data URIs.
"""

import base64
import io
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.images import as_picture
from common.plots import alpha_plot, calibration_plot, interval_plot, latency_plot
from common.records import whole_file


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
    """A tensor [3, H, W] in [0, 1], or a PIL image, as the text of a PNG that a page can hold: of a photograph a small
    one."""
    image = as_picture(image) if isinstance(image, torch.Tensor) else image.copy()
    image.thumbnail((192, 192))  # three times the side at which pages show it
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def in_percent(result):
    """Mean, low and high end of its interval, in percent."""
    return [100 * value for value in (result["mean"], *result["ci95"])]


def comparison(results):
    """Tables and plots of the accuracies and paired differences that a benchmark and a folder have in common."""
    methods, pairs = results["methods"], results["paired_differences"]
    found = {"accuracy": interval_plot([(name, *in_percent(m)) for name, m in methods.items()], "accuracy, %")}
    if not pairs:
        return {}, found
    rows = [(f"{pair['a']} − {pair['b']}", pair) for pair in pairs]
    found["paired"] = interval_plot([(name, *in_percent(pair)) for name, pair in rows], "points", zero=True)
    table = [["", "points", "which is better"]]
    table += [[name, points(p["mean"], *p["ci95"]), better(p) or "cannot be told"] for name, p in rows]
    return {"paired": table}, found


def benchmark_page(results):
    """Tables and plots of a benchmark over episodes."""
    methods = results["methods"]
    tables, plots = comparison(results)

    def known(value, form):
        return "not known" if value is None else form.format(value)

    head = ["method", "accuracy, %", "s² over episodes", "variance from episodes", "seconds an episode", "what it is"]
    tables["accuracy"] = [head] + [
        [name, with_interval(m), known(m["s2"], "{:.5f}"), known(m["episode_share"], "{:.0%}"), f"{m['seconds']:.1f}",
         f"{m['method']} {m['options']}"]
        for name, m in methods.items()
    ]  # fmt: skip
    if len(methods) > 1:
        lines = [[100 * accuracy for accuracy in line] for line in zip(*(m["per_episode"] for m in methods.values()))]
        rows = [(name, *in_percent(m)) for name, m in methods.items()]
        plots["episodes"] = interval_plot(rows, "accuracy, %", lines=lines)
    series = {}
    for m in methods.values():
        if m["alpha"] is not None:
            series.setdefault(m["method"], []).append((m["alpha"], *in_percent(m)))
    if any(len(rows) > 1 for rows in series.values()):
        plots["alpha"] = alpha_plot(series, "accuracy, %")
    return tables, plots


def accuracy_page(results):
    """Tables and plots of models measured on one folder."""
    methods = results["methods"]
    tables, plots = comparison(results)
    tables["accuracy"] = [["model", "accuracy, %", "classifies by", "calibration error, %"]] + [
        [name, with_interval(m), m["classifier"], percent(m["ece"])] for name, m in methods.items()
    ]
    tables["classes"] = [["class", *methods]] + [
        [name, *(with_interval(m["per_class"][name]) for m in methods.values())] for name in results["classes"]
    ]
    plots["calibration"] = {name: calibration_plot(m["calibration"]) for name, m in methods.items()}
    return tables, plots


def generated_table(results):
    """The specificity and diversity of generated and real images."""
    rows = [(name, None, v) for name, v in results["real"].items()]
    rows += [(name, v["alpha"], v) for name, group in results["sets"].items() for v in group]

    def known(value, form):
        return "" if value is None else form.format(value)

    return [["images", "alpha", "number", "teacher agrees, %", "nearest support", "pairwise"]] + [
        [name, known(alpha, "{:g}"), str(v["images"]), with_interval(v["agreement"]),
         known(v["nearest_support"], "{:.3f}"), known(v["pairwise"], "{:.3f}")]
        for name, alpha, v in rows
    ]  # fmt: skip


def generated_page(results):
    """Tables and plots of generated images measured against their supports."""
    plots = {}
    yardstick, real = list(results["real"].items())[-1]  # the supports, unless there are other real images
    wanted = {
        "Teacher's agreement with the label, 95% intervals": ("agreement, %", lambda v: in_percent(v["agreement"])),
        "Cosine distance to the nearest support": ("distance", lambda v: [v["nearest_support"]]),
        "Cosine distance of two images of a class": ("distance", lambda v: [v["pairwise"]]),
    }
    for caption, (label, values) in wanted.items():
        series = {
            name: [(v["alpha"], *values(v)) for v in group if None not in (v["alpha"], *values(v))]
            for name, group in results["sets"].items()
        }
        series = {name: rows for name, rows in series.items() if len(rows) > 1}
        if series:
            known = values(real)[0]
            plots[caption] = alpha_plot(series, label, None if known is None else (yardstick, known))
    return {"generated": generated_table(results)}, plots


def fidelity_table(results):
    """How far the exported student's answers are from PyTorch's."""
    rows = []
    for name, v in results["fidelity"].items():
        row = [name, f"{v['max_abs_diff']:.1e}", f"{v['mean_abs_diff']:.1e}", percent(v["top1_agreement"])]
        change = v.get("accuracy_change")
        if change:
            row += [with_interval(v["accuracy"]), points(change["mean"], *change["ci95"])]
        rows.append(row + [""] * (6 - len(row)))
    head = ["student in", "largest difference", "mean", "top-1 agrees, %", "accuracy, %", "change, points"]
    return [head, *rows]


def latency_table(results):
    """The latencies, of each model in each runtime, precision and device."""
    head = ["model", "runtime", "precision", "device", "threads", "batch", "median ms", "p90 ms", "p99 ms", "images/s"]
    return [head] + [
        [
            *(str(row[key]) for key in ("model", "runtime", "precision", "device", "threads", "batch_size")),
            *(f"{row[key]:.3f}" for key in ("median_ms", "p90_ms", "p99_ms")),
            f"{row['images_per_second']:.0f}",
        ]
        for row in results["latency"]
    ]


def export_page(results):
    """Tables and plots of an exported student. A table of latencies for each size of batch and number of threads; the
    plot is of the smallest batch and, on the CPU, most threads."""
    accuracies = results["accuracy"] | {f"student {k}": v.get("accuracy") for k, v in results["fidelity"].items()}
    timed, (head, *cells) = results["latency"], latency_table(results)
    smallest = min([row["batch_size"] for row in timed], default=1)
    most = max([row["threads"] for row in timed], default=1)
    latencies, rows = {}, []

    def conditions(batch_size, threads):
        return f"batch of {batch_size}, {threads} thread{'s' * (threads > 1)}"

    for row, (*_, median, p90, p99, rate) in zip(timed, cells):
        name = f"{row['model']} {row['runtime']} {row['precision']}" + f" on {row['device']}" * (row["device"] != "cpu")
        latencies.setdefault(conditions(row["batch_size"], row["threads"]), [["", *head[-4:]]]).append(
            [name, median, p90, p99, rate]
        )
        if row["batch_size"] == smallest and (row["threads"] == most or row["device"] != "cpu"):
            accuracy = accuracies.get(name) or accuracies.get(f"{row['model']} {row['runtime']}")
            known = in_percent(accuracy) if accuracy else [None] * 3
            rows.append((name.removeprefix("student "), row["median_ms"], *known))
    tables = {
        "fidelity": fidelity_table(results),
        "latency": latencies,
        "files": [["", "MB"]] + [[name, f"{size / 1e6:.2f}"] for name, size in results["bytes"].items()],
    }
    if all(mean is None for _, _, mean, _, _ in rows):
        return tables, {}
    caption = f"Accuracy with 95% intervals, and median latency of a {conditions(smallest, most)}"
    return tables, {caption: latency_plot(rows)}


PAGES = {"benchmark": benchmark_page, "accuracy": accuracy_page, "generated": generated_page, "export": export_page}
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
TEMPLATES.filters["percent"] = percent


def write_report(path, results):
    """Writes the page of results.json, of any kind.

    Args:
        results: what evaluate.py puts into results.json; its "kind" is "benchmark", "accuracy" or "generated";
            or export.py into benchmark.json, "export".
    """
    tables, plots = PAGES[results["kind"]](results)
    tables["settings"] = [["option", "value"]] + [
        [name, " ".join(map(str, value)) if isinstance(value, list) else value]
        for name, value in results["settings"].items()
        if value not in (None, "")
    ]
    page = TEMPLATES.get_template(f"{results['kind']}.html").render(results, tables=tables, plots=plots)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # names may be no UTF-8
