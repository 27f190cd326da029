"""The report: well-formed, without network or scripts, names escaped, plots and pictures readable; in Chromium where it
is."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from common.report import benchmark_page, data_uri, points, write_report

NAME = '<b>&"x'
SHARED = {"settings": {"seed": 0, "split": NAME}, "versions": {"torch": "2"}, "command": f"evaluate.py {NAME}"}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects attributes, text, and the text in plots."""

    def __init__(self, path):
        super().__init__()
        self.open, self.attributes, self.words, self.labels = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data
        if self.open and self.open[-1] == "text":
            self.labels.append(data)


def interval(mean):
    return {"mean": mean, "ci95": [mean - 0.05, mean + 0.04]}


def benchmark(methods, episodes):
    picture = data_uri(torch.rand(3, 8, 8))
    return SHARED | {
        "kind": "benchmark",
        "dataset": {"name": "icons_fs", "split": "novel", "num_ways": 5, "num_shots": 1, "num_queries": None,
                    "num_episodes": episodes, "seed": 0},
        "methods": {
            f"{NAME}{i}": interval(0.8 + 0.01 * i) | {
                "method": "tint", "options": "", "alpha": 0.2 * i if i else None, "s2": None if i == 1 else 0.002,
                "episode_share": None if i == 1 else 0.4, "num_episodes": episodes, "num_queries": 100,
                "per_episode": [0.75 + 0.001 * e for e in range(episodes)], "seconds": 3.5,
            }
            for i in range(methods)
        },
        "paired_differences": [{"a": NAME, "b": "y", "num_episodes": episodes} | interval(-0.0123)] * (methods > 1),
        "episodes": [],
        "examples": [{"class": NAME, "supports": [picture], "generated": {NAME: [picture] * 2}}] if methods > 1 else [],
        "cost": {"episode_seconds": 12.3, "query_seconds": 0.01},
        "looks": [{"num_episodes": n, "num_queries": None} for n in range(1, methods + 1)],
    }  # fmt: skip


def accuracy(classes):
    names = [f"{NAME}{i}" for i in range(classes)]
    method = interval(0.8) | {
        "classifier": "head", "count": 10, "per_class": {n: interval(0.7) | {"count": 5} for n in names},
        "confusion": {"rows": names, "columns": names, "counts": [[3] * classes for _ in names]}, "ece": 0.0312,
        "calibration": [{"low": 0, "high": 0.5, "count": 0, "confidence": None, "accuracy": None},
                        {"low": 0.5, "high": 1, "count": 4, "confidence": 0.8, "accuracy": 0.75}],
        "worst": [{"file": f"{NAME}/1.png", "truth": names[0], "answer": names[1], "confidence": 0.98,
                   "image": data_uri(Image.new("RGB", (5, 5)))}],
    }  # fmt: skip
    return SHARED | {"kind": "accuracy", "data_dir": f"photos/{NAME}", "num_images": 10, "classes": names,
                     "num_supports_among_images": 0,
                     "methods": {NAME: method}, "paired_differences": []}  # fmt: skip


def test_a_curve_of_alphas_is_of_methods_that_differ_in_nothing_else():
    results = benchmark(3, 4)
    _, *others = results["methods"].values()
    for alphas, options, is_plotted in (
        ((0.4, 0.8), ("--generate.alpha 0.4", "--generate.alpha 0.8"), True),
        ((0.4, 0.4), ("--generate.alpha 0.4", "--generate.alpha 0.4 --distill.student conv4_64"), False),
        ((0.4, 0.8), ("--generate.alpha 0.4", "--generate.alpha 0.8 --distill.student conv4_64"), False),
    ):
        for method, alpha, option in zip(others, alphas, options):
            method |= {"alpha": alpha, "options": option}
        assert ("alpha" in benchmark_page(results)["plots"]) == is_plotted


def test_what_a_page_says_of_supports_and_of_the_interval_that_was_asked_for(tmp_path):
    write_report(tmp_path / "page.html", accuracy(2) | {"num_supports_among_images": 3})
    assert "3 of them are supports" in (tmp_path / "page.html").read_text()
    asked = {"half_width": 0.01, "stages": [{"num_episodes": 10}], "wishes": [["tint", "supports"]]}
    write_report(tmp_path / "page.html", benchmark(2, 10) | asked)
    assert "until the interval of tint − supports was no wider than ±1 points" in (tmp_path / "page.html").read_text()


def generated(alphas, pairs):
    def row(value):
        return {"images": 20, "agreement": interval(value), "nearest_support": 1 - value,
                "pairwise": value / 2 if pairs else None}  # fmt: skip

    sets = {f"{NAME}{i}": [{"alpha": a} | row(0.9 - 0.1 * i) for a in alphas] for i in range(2)}
    return SHARED | {"kind": "generated", "classes": ["a", NAME], "sets": sets, "methods": {},
                     "real": {"supports": row(0.8), "real images": row(0.85)}, "paired_differences": []}  # fmt: skip


def latencies(model, runtime, precision, milliseconds):
    return {"model": model, "runtime": runtime, "precision": precision, "device": "cpu", "threads": 2, "batch_size": 1,
            "median_ms": milliseconds, "p90_ms": 2 * milliseconds, "p99_ms": 3 * milliseconds, "calls": 9,
            "images_per_second": 1000 / milliseconds}  # fmt: skip


def exported(teacher_known):
    change = {"accuracy": interval(0.8), "accuracy_change": interval(-0.01)}
    facts = {"max_abs_diff": 1e-5, "mean_abs_diff": 1e-6, "top1_agreement": 0.99}
    runtimes = [("torch", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "int8")]
    known = {"student torch": interval(0.81)} | ({"teacher torch": interval(0.9)} if teacher_known else {})
    return SHARED | {
        "kind": "export", "num_images": 11, "verdict": NAME, "machine": NAME, "bytes": {NAME: 1000}, "methods": {},
        "fidelity": {f"onnxruntime {precision}": facts | change for precision in ("fp32", "int8")},
        "accuracy": known, "paired_differences": [],
        "latency": [latencies("student", *names, 0.2 + 0.1 * i) for i, names in enumerate(runtimes)]
        + [latencies("teacher", "torch", "fp32", 5.4)],
    }  # fmt: skip


def test_generated_images_are_shown_against_alpha_where_there_is_something_to_show(tmp_path):
    for alphas, pairs, plots in (([None], True, 0), ([0.5], True, 0), ([0, 0.5, 1], True, 3), ([0, 1], False, 2)):
        write_report(tmp_path / "report.html", generated(alphas, pairs))
        page = Page(tmp_path / "report.html")
        assert (tmp_path / "report.html").read_text().count("<svg") == plots
        for label in (f"{NAME}0", f"{NAME}1", "real images", "alpha"):
            assert page.labels.count(label) == plots
        assert page.words.count("90.0 [85.0, 94.0]") == len(alphas)


def test_the_teacher_stands_in_the_plot_whenever_it_is_timed(tmp_path):
    for known in (True, False):
        write_report(tmp_path / "report.html", exported(known))
        page = Page(tmp_path / "report.html")
        assert {"torch fp32", "onnxruntime fp32", "onnxruntime int8", "teacher torch fp32"} <= set(page.labels)
        assert ("unknown)" in " ".join(page.labels)) == (not known)


def test_a_difference_is_told_only_where_its_interval_leaves_out_zero(tmp_path):
    results = benchmark(2, 5)
    for low, high, words in ((0.01, 0.1, "left"), (-0.1, -0.01, "right"), (-0.01, 0.1, "cannot be told")):
        results["paired_differences"] = [{"a": "left", "b": "right", "mean": (low + high) / 2, "ci95": [low, high]}]
        write_report(tmp_path / "report.html", results)
        cells = re.findall("<td>([^<]*)</td>", (tmp_path / "report.html").read_text())
        assert cells[cells.index(points((low + high) / 2, low, high)) + 1] == words


CASES = {
    "generated": generated([0, 0.5, 1], True), "one": benchmark(1, 1), "two": benchmark(2, 5),
    "many": benchmark(8, 600), "folder": accuracy(2), "classes": accuracy(64), "export": exported(True),
}  # fmt: skip


@pytest.mark.parametrize("results", CASES.values(), ids=CASES)
def test_pages_stand_alone(results, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, results)
    page, text = Page(path), path.read_text()
    tags = {tag for tag, *_ in page.attributes}
    assert not tags & {"script", "link", "iframe"} and "http" not in text and not re.search(r"url\((?!#)", text)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            kind, _, data = value.partition(",")
            assert kind == "data:image/png;base64"
            Image.open(io.BytesIO(base64.b64decode(data))).verify()
        assert name != "xlink:href" or value.startswith("#")
    assert NAME in page.words and "<b>" not in text  # shown as it is, and never as a tag
    plots = "".join(re.findall("<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in plots and "#1a1a1b" not in plots and "<text" in plots  # the page's colours, and real text
    for name, method in results["methods"].items():
        assert name in page.labels
        assert (
            f"{100 * method['mean']:.1f} [{100 * method['ci95'][0]:.1f}, {100 * method['ci95'][1]:.1f}]" in page.words
        )
    if results["paired_differences"]:
        assert "-1.2 [-6.2, +2.8]" in page.words
    if results["kind"] == "benchmark":
        several = len(results["methods"]) > 1
        assert text.count("stroke-opacity") == several * results["dataset"]["num_episodes"]  # a line each
        assert ("against alpha" in page.words) == (len(results["methods"]) > 2)
    write_report(path, results)
    assert path.read_text() == text


MEASURE = """<script>
const found = {}
function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement
  const tables = [...page.querySelectorAll(".wide")].filter(wide => wide.scrollWidth > wide.clientWidth)
  found[frame.id] = [root.scrollWidth, tables.map(wide => wide.textContent.includes("p99"))]
  document.title = JSON.stringify(found)
}
</script>
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
def test_chromium_shows_every_page_at_every_width_without_complaint(tmp_path):
    """No page is wider than the screen, nor a table of latencies than its page; light and dark are what they say."""

    def chromium(*options):
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                   "--enable-logging=stderr", "--allow-file-access-from-files",
                   f"--user-data-dir={tmp_path / 'profile'}", *options]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert not re.findall(r".*CONSOLE.*", result.stderr)
        return result.stdout

    frames = [MEASURE]
    for name in ("generated", "many", "classes", "export"):
        write_report(tmp_path / f"{name}.html", CASES[name])
        for width in (390, 1000):
            frame = f'<iframe id="{name} {width}" src="{name}.html" style="width: {width}px; border: 0"'
            frames.append(f'{frame} onload="measure(this)"></iframe>')
    (tmp_path / "all.html").write_text("".join(frames))
    html = chromium("--dump-dom", f"file://{tmp_path / 'all.html'}")
    found = json.loads(re.search("<title>(.*?)</title>", html)[1])
    assert len(found) == 8
    for name, (width, wider) in found.items():
        assert width <= int(name.split()[1]) and not any(wider)
    for scheme, page in ((0, 0), (1, 255)):  # dark, light
        options = f"--blink-settings=preferredColorScheme={scheme}", "--window-size=500,1200"
        chromium(*options, f"--screenshot={tmp_path / 'page.png'}", f"file://{tmp_path / 'export.html'}")
        shot = Image.open(tmp_path / "page.png").convert("L")
        assert shot.size == (500, 1200) and abs(shot.getpixel((0, 0)) - page) < 40
        assert shot.getextrema()[0] < 60 and shot.getextrema()[1] > 200
