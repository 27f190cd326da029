"""report.html: results as one page without scripts or network, for phones, screens and paper.

Plots are SVG, 360 units wide so that their text keeps its size on a phone; pictures are data URIs.
"""

import base64
import html
import io
import math

import torch

from common.images import as_picture
from common.records import whole_file

STYLE = """
:root { --ink: #1a1a1a; --soft: #5a6270; --line: #d8dce2; --page: #fff; --mark: #1f5fa8; --band: #9fc0e6 }
@media (prefers-color-scheme: dark) { @media not print {
  :root { --ink: #e8eaee; --soft: #a4adbb; --line: #3a414c; --page: #14171c; --mark: #7db4f2; --band: #34537a } } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--page) }
h1, h2, h3 { line-height: 1.25 } code { overflow-wrap: anywhere } td code { white-space: normal }
.wide { overflow-x: auto; margin: .5rem 0 1rem }
table { border-collapse: collapse } th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; white-space: nowrap; font-variant-numeric: tabular-nums }
figure { margin: 1rem 0; break-inside: avoid } figcaption, .soft { color: var(--soft); font-size: .9rem }
svg { width: 100%; max-width: 34rem; height: auto; display: block } svg text { fill: var(--ink); font-size: 11px }
.axis { stroke: var(--line); stroke-width: 1 } .mark { fill: var(--mark); stroke: var(--mark) }
.dashed { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4 }
.zero { stroke: var(--ink); stroke-width: 1 }
.whisker { stroke: var(--mark); stroke-width: 2; fill: none }
.thin { stroke: var(--mark); fill: none; stroke-width: .7 }
.pictures img { width: 48px; height: 48px; image-rendering: pixelated; margin: 0 2px 2px 0 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .8rem; padding: 0 }
.grid figure { margin: 0 } .grid img { width: 64px; height: 64px; image-rendering: pixelated; display: block }
.confusion span { padding: .1rem .3rem } .confusion td { text-align: right; padding: .15rem .4rem }
.confusion th { font-weight: 400; font-size: .85rem }
@media print { tr, figure { break-inside: avoid }
  body { font-size: 11px; max-width: none } .wide { overflow: visible } }
"""


def percent(value):
    return f"{100 * value:.1f}"


def with_interval(result):
    return f"{percent(result['mean'])} [{percent(result['ci95'][0])}, {percent(result['ci95'][1])}]"


def points(mean, low, high):
    """A difference of accuracies and its interval, in [-1, 1], as text in percentage points."""
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def data_uri(image):
    """A tensor [3, H, W] in [0, 1], or a PIL image, as the text of a PNG that a page can hold."""
    if isinstance(image, torch.Tensor):
        image = as_picture(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def escape(text):
    return html.escape(str(text))


def table(head, rows, kind=""):
    """Cells are HTML; the first of each row is its heading."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(caption, width, height, *parts):
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(caption)}">{"".join(parts)}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def line(x1, y1, x2, y2, kind="axis"):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def text(x, y, words, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def dot(x, y):
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="mark"/>'


def ticks(low, high, count=5):
    """Round numbers that enclose [low, high], in steps of 1, 2 or 5 times a power of ten."""
    raw = max(high - low, 1e-6) / count
    power = 10 ** math.floor(math.log10(raw))
    step = power * next(k for k in (1, 2, 5, 10) if k * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(first, last + 1)]


def interval_plot(caption, rows, zero=False):
    """Rows (name, mean, low, high), in percent, as points with whiskers on one axis; `zero` shows a line there."""
    marks = ticks(min([r[2] for r in rows] + [0] * zero), max([r[3] for r in rows] + [0] * zero))
    left, right, top = 8, 348, 8
    height = top + 34 * len(rows) + 22

    def x(value):
        return left + (right - left) * (value - marks[0]) / (marks[-1] - marks[0])

    parts = [line(x(m), top, x(m), height - 18) + text(x(m), height - 5, f"{m:g}", "middle") for m in marks]
    if zero:
        parts.append(line(x(0), top, x(0), height - 18, "zero"))
    for i, (name, mean, low, high) in enumerate(rows):
        y = top + 34 * i + 24
        parts += [text(left, y - 11, name), line(x(low), y, x(high), y, "whisker"), dot(x(mean), y)]
    return figure(caption, 360, height, *parts)


def upright_axis(marks, y):
    return "".join(line(34, y(m), 352, y(m)) + text(30, y(m) + 4, f"{m:g}", "end") for m in marks)


def alpha_plot(caption, series, yardstick=None):
    """Values against alpha, a numbered line a series.

    Args:
        series: {name: rows (alpha, value) or (alpha, value, low, high), the latter with whiskers}.
        yardstick: (name, value) of a dashed line.
    """
    values = [v for rows in series.values() for _, *row in rows for v in row] + ([yardstick[1]] if yardstick else [])
    marks = ticks(min(values), max(values))

    def y(value):
        return 186 - 170 * (value - marks[0]) / (marks[-1] - marks[0])

    parts = [upright_axis(marks, y)]
    parts += [
        text(50 + 290 * a, 204, f"{a:g}", "middle") for a in sorted({r[0] for rows in series.values() for r in rows})
    ]
    if yardstick:
        parts.append(line(34, y(yardstick[1]), 352, y(yardstick[1]), "dashed"))
    for i, rows in enumerate(series.values()):
        points = [(50 + 290 * row[0], y(row[1])) for row in sorted(rows)]
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{v:.1f}" for x, v in points)}" class="thin"/>')
        parts += [
            line(50 + 290 * row[0], y(row[2]), 50 + 290 * row[0], y(row[3]), "whisker") for row in rows if row[2:]
        ]
        parts += [dot(*point) for point in points]
        if len(series) > 1:
            parts.append(text(points[-1][0] + 6, points[-1][1] + 4, i + 1))
    legend = [f"{i + 1} {name}" for i, name in enumerate(series)] if len(series) > 1 else []
    legend += [f"dashed: {yardstick[0]}"] if yardstick else []
    return figure(caption + (f" ({', '.join(legend)})" if legend else ""), 360, 210, *parts)


def accuracy_against_alpha(methods):
    """Accuracy against alpha with whiskers, where at least two methods have one; else nothing."""
    rows = [(m["alpha"], *(100 * v for v in (m["mean"], *m["ci95"]))) for m in methods if m["alpha"] is not None]
    if len(rows) < 2:
        return ""
    plot = alpha_plot("Accuracy in percent at each alpha, 95% intervals", {"accuracy": rows})
    return "<h2>Accuracy against alpha</h2>" + plot


def episode_plot(methods):
    """Each episode a thin line across the methods: parallel lines are easy and hard episodes, slopes are methods."""
    names, columns = list(methods), [m["per_episode"] for m in methods.values()]
    if len(names) < 2:
        return ""
    values = [100 * v for column in columns for v in column]
    marks = ticks(min(values), max(max(values), min(values) + 1))
    xs = [48 + 290 * i / (len(names) - 1) for i in range(len(names))]

    def y(value):
        return 226 - 210 * (value - marks[0]) / (marks[-1] - marks[0])

    opacity = max(0.08, min(0.7, 12 / len(columns[0])))
    parts = [upright_axis(marks, y)]
    for episode in zip(*columns):
        points = " ".join(f"{x:.1f},{y(100 * v):.1f}" for x, v in zip(xs, episode))
        parts.append(f'<polyline points="{points}" class="thin" style="opacity:{opacity:.2f}"/>')
    for i, (x, name) in enumerate(zip(xs, names)):
        parts += [dot(x, y(100 * methods[name]["mean"])), text(x, 242, i + 1, "middle")]
    legend = ", ".join(f"{i + 1} {name}" for i, name in enumerate(names))
    caption = f"Accuracy in percent: a line is an episode, a point a method's mean ({legend})"
    return "<h2>Episode by episode</h2>" + figure(caption, 360, 248, *parts)


def calibration_plot(name, method):
    """Accuracy against confidence of each bin; the area of a point is the number of images."""
    parts = [line(40, 20, 40, 220), line(40, 220, 340, 220), line(40, 220, 340, 20)]
    for k in (0, 50, 100):
        parts += [text(40 + 3 * k, 234, k, "middle"), text(34, 224 - 2 * k, k, "end")]
    largest = max(row["count"] for row in method["calibration"])
    for row in method["calibration"]:
        if row["count"]:
            x, y, r = 40 + 300 * row["confidence"], 220 - 200 * row["accuracy"], 2 + 8 * (row["count"] / largest) ** 0.5
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" class="mark" style="opacity:.75"/>')
    caption = f"{name}: accuracy against confidence, in percent. Expected calibration error {percent(method['ece'])}"
    return figure(caption, 360, 240, *parts)


def confusion_table(confusion):
    """Rows are the truth; a cell is as dark as its share of the row."""
    rows = []
    for name, counts in zip(confusion["rows"], confusion["counts"]):
        total = max(1, sum(counts))
        cells = [
            f'<span style="background:color-mix(in srgb, var(--band) {share}%, transparent)">{count or "·"}</span>'
            for count, share in ((count, 100 * count // total) for count in counts)
        ]
        rows.append([escape(name), *cells])
    return table(["truth \\ answer", *map(escape, confusion["columns"])], rows, "confusion")


def paired_section(pairs, words):
    if not pairs:
        return ""
    rows = [(f"{p['a']} − {p['b']}", *(100 * v for v in (p["mean"], *p["ci95"]))) for p in pairs]
    cells = [[escape(name), points(p["mean"], *p["ci95"])] for (name, *_), p in zip(rows, pairs)]
    plot = interval_plot("Differences in percentage points, 95% intervals", rows, zero=True)
    return f"<h2>Paired differences</h2><p>{words}</p>" + table(["", "points"], cells) + plot


def accuracy_plot(methods):
    rows = [(name, *(100 * v for v in (m["mean"], *m["ci95"]))) for name, m in methods.items()]
    return interval_plot("Accuracy in percent, 95% intervals", rows)


def benchmark_page(results):
    """Title and body of a benchmark over episodes."""
    methods, d, cost = results["methods"], results["dataset"], results["cost"]
    queries = "all other images" if d["num_queries"] is None else f"{d['num_queries']} queries a class"
    title = f"{d['name']}: {d['num_ways']}-way {d['num_shots']}-shot"

    def share(value, form):
        return "not known" if value is None else form(value)

    rows = [
        [
            escape(name), with_interval(m), share(m["s2"], "{:.5f}".format), share(m["episode_share"], "{:.0%}".format),
            f"{m['seconds']:.1f}", f"<code>{escape(m['method'])} {escape(m['options'])}</code>",
        ]
        for name, m in methods.items()
    ]  # fmt: skip
    head = ["method", "accuracy, %", "s² over episodes", "variance from episodes", "seconds an episode", "what it is"]
    body = (
        f"<p>{d['num_episodes']} episodes of {escape(d['split'])} classes, {queries}, seed {d['seed']}. Means over "
        "episodes, with 95% intervals for new episodes of the same kind; they hold the spread between episodes and "
        f"that between queries.</p>{table(head, rows)}{accuracy_plot(methods)}"
        f'<p class="soft">An episode of all methods together took {cost["episode_seconds"]:.3g} s, and '
        f"{cost['query_seconds']:.3g} s more for each query.</p>"
        + paired_section(
            results["paired_differences"], "On the same queries of the same episodes, in percentage points."
        )
        + episode_plot(methods)
        + accuracy_against_alpha(methods.values())
    )
    if results["examples"]:
        rows = []
        for example in results["examples"]:
            columns = {"supports": example["supports"], **example["generated"]}
            pictures = ["".join(f'<img src="{uri}" alt="">' for uri in uris) for uris in columns.values()]
            rows.append([escape(example["class"]), *pictures])
        body += "<h2>Supports and what was generated of them</h2><p>Episode 0.</p>" + table(
            ["class", *map(escape, columns)], rows, "pictures"
        )
    return title, body


def accuracy_page(results):
    """Title and body of models measured on one folder."""
    methods, classes = results["methods"], results["classes"]
    rows = [[escape(n), with_interval(m), m["classifier"], percent(m["ece"])] for n, m in methods.items()]
    body = (
        f"<p>{results['num_images']} images of {len(classes)} classes from <code>{escape(results['data_dir'])}</code>. "
        "Accuracy in percent with 95% intervals for new images of these classes (Wilson).</p>"
        + table(["model", "accuracy, %", "classifies by", "calibration error, %"], rows)
        + accuracy_plot(methods)
        + paired_section(results["paired_differences"], "On the same images, in percentage points.")
        + "<h2>Per class</h2>"
        + table(
            ["class", *map(escape, methods)],
            [[escape(c), *(with_interval(m["per_class"][c]) for m in methods.values())] for c in classes],
        )
    )
    for name, method in methods.items():
        worst = "".join(
            f'<figure><img src="{w["image"]}" alt=""><figcaption>{escape(w["truth"])}, called {escape(w["answer"])}: '
            f"{w['confidence']:.0%}<br>{escape(w['file'])}</figcaption></figure>"
            for w in method["worst"]
        )
        body += (
            f"<h2>{escape(name)}</h2><h3>Confusion</h3>{confusion_table(method['confusion'])}"
            f"<h3>Calibration</h3>{calibration_plot(name, method)}"
            f'<h3>Most confident mistakes</h3><div class="grid">{worst or "none"}</div>'
        )
    return "Accuracy", body


def generated_table(results):
    """Head and rows, all text, of the specificity and diversity of generated and real images."""
    rows = [(name, None, v) for name, v in results["real"].items()]
    rows += [(name, v["alpha"], v) for name, group in results["sets"].items() for v in group]

    def number(value):
        return "" if value is None else f"{value:.3f}"

    return [("images", "alpha", "number", "teacher agrees, %", "nearest support", "pairwise")] + [
        (name, "" if alpha is None else f"{alpha:g}", str(v["images"]), with_interval(v["agreement"]),
         number(v["nearest_support"]), number(v["pairwise"]))
        for name, alpha, v in rows
    ]  # fmt: skip


def generated_page(results):
    """Title and body of generated images measured against their supports."""
    head, *rows = generated_table(results)
    real = results["real"]
    yardstick = real.get("real images", real["supports"])
    body = (
        "<p>In the feature space of the teacher, specialised on the supports: how often it answers with the label an "
        "image was made for (95% Wilson intervals), the mean cosine distance to the nearest support of the class, and "
        "that of two images of a class. Real images are the yardstick.</p>"
        + table(head, [[escape(row[0]), *row[1:]] for row in rows])
    )
    sets = {name: [v for v in rows if v["alpha"] is not None] for name, rows in results["sets"].items()}
    plots = {
        "Teacher's agreement with the label, in percent": lambda v: [
            100 * x for x in (v["agreement"]["mean"], *v["agreement"]["ci95"])
        ],
        "Cosine distance to the nearest support": lambda v: [v["nearest_support"]],
        "Cosine distance of two images of a class": lambda v: [v["pairwise"]],
    }
    for caption, values in plots.items():
        series = {
            name: [(v["alpha"], *values(v)) for v in group if None not in values(v)] for name, group in sets.items()
        }
        series = {name: group for name, group in series.items() if len(group) > 1}
        if series:
            known = values(yardstick)[0]
            body += alpha_plot(caption, series, None if known is None else ("real images", known))
    return "Generated images", body


def fidelity_table(results):
    """Head and rows, all text, of how far the exported student's answers are from PyTorch's."""
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
    """Head and rows, all text, of the latencies."""
    head = ["model", "runtime", "precision", "device", "threads", "batch", "median ms", "p90 ms", "p99 ms", "images/s",
            "of matrix product's rate, %"]  # fmt: skip
    return [head] + [
        [
            *(str(row[key]) for key in ("model", "runtime", "precision", "device", "threads", "batch_size")),
            *(f"{row[key]:.3f}" for key in ("median_ms", "p90_ms", "p99_ms")),
            f"{row['images_per_second']:.0f}",
            percent(row["share_of_matmul"]),
        ]
        for row in results["latency"]
    ]


def accuracy_against_latency(results):
    """Accuracy with whiskers against the median latency of the smallest batch with most threads, on a logarithmic axis;
    nothing where accuracies are not known."""
    known = dict(results["accuracy"])
    known |= {f"student {name}": v["accuracy"] for name, v in results["fidelity"].items() if "accuracy" in v}
    rows, batch_size = results["latency"], min([row["batch_size"] for row in results["latency"]], default=1)
    threads = max([row["threads"] for row in rows], default=1)
    points = {}
    for row in rows:
        name = f"{row['model']} {row['runtime']} {row['precision']}" + f" on {row['device']}" * (row["device"] != "cpu")
        accuracy = known.get(name) or known.get(f"{row['model']} {row['runtime']}")
        if accuracy and row["batch_size"] == batch_size and (row["threads"] == threads or row["device"] != "cpu"):
            points[name] = (row["median_ms"], *(100 * v for v in (accuracy["mean"], *accuracy["ci95"])))
    if not points:
        return ""
    marks = ticks(min(p[2] for p in points.values()), max(p[3] for p in points.values()))
    first = math.floor(math.log10(min(p[0] for p in points.values())))
    last = max(first + 1, math.ceil(math.log10(max(p[0] for p in points.values()))))

    def x(milliseconds):
        return 44 + 290 * (math.log10(milliseconds) - first) / (last - first)

    def y(value):
        return 186 - 170 * (value - marks[0]) / (marks[-1] - marks[0])

    parts = [upright_axis(marks, y)]
    parts += [text(x(10**k), 204, f"{10.0**k:g} ms", "middle") for k in range(first, last + 1)]
    for i, (milliseconds, mean, low, high) in enumerate(points.values()):
        at = x(milliseconds)
        parts += [
            line(at, y(low), at, y(high), "whisker"),
            dot(at, y(mean)),
            text(at + 5, y(mean) - 5 - 12 * (i % 3), i + 1),
        ]
    legend = ", ".join(f"{i + 1} {name}" for i, name in enumerate(points))
    caption = f"Accuracy in percent against the latency of a batch of {batch_size}, {threads} threads ({legend})"
    return "<h2>Accuracy against latency</h2>" + figure(caption, 360, 210, *parts)


def export_page(results):
    """Title and body of an exported student."""
    head, *rows = ([escape(cell) for cell in row] for row in fidelity_table(results))
    body = (
        f"<p><strong>{escape(results['verdict'])}</strong></p><p>Against PyTorch on {results['num_images']} images; "
        "changes of accuracy with 95% intervals of paired answers.</p>"
        + table(head, rows)
        + accuracy_against_latency(results)
    )
    if results["latency"]:
        head, *rows = ([escape(cell) for cell in row] for row in latency_table(results))
        body += f"<h2>Latency</h2><p>{escape(results['machine'])}</p>" + table(head, rows)
    sizes = [[escape(name), f"{size / 1e6:.2f}"] for name, size in results["bytes"].items()]
    return "Exported student", body + "<h2>Files</h2>" + table(["", "MB"], sizes)


def write_report(path, results):
    """Writes the page of results.json, of either kind.

    Args:
        results: what evaluate.py puts into results.json; its "kind" is "benchmark", "accuracy" or "generated";
            or export.py into benchmark.json, "export".
    """
    pages = {
        "benchmark": benchmark_page,
        "accuracy": accuracy_page,
        "generated": generated_page,
        "export": export_page,
    }
    title, body = pages[results["kind"]](results)
    settings = [[escape(k), f"<code>{escape(v)}</code>"] for k, v in results["settings"].items() if v not in (None, "")]
    versions = ", ".join(f"{escape(k)} {escape(v)}" for k, v in results["versions"].items())
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n<h2>To repeat it</h2><p><code>{escape(results['command'])}</code></p>"
        f'{table(["option", "value"], settings)}<p class="soft">{versions}</p>\n</body>\n</html>\n'
    )
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
