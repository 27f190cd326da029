"""The report: well-formed, without network or scripts, names escaped, pictures readable; in Chromium where it is."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from common.report import data_uri, write_report

NAME = '<b>&"x'
SHARED = {"settings": {"seed": 0, "split": NAME}, "versions": {"torch": "2"}, "command": f"evaluate.py {NAME}"}
VOID = {"meta", "img", "br", "line", "circle"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.attributes, self.words = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in VOID and tag != "polyline":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID and tag != "polyline":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


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
                     "methods": {NAME: method}, "paired_differences": []}  # fmt: skip


def generated(alphas, pairs):
    def row(value):
        return {"images": 20, "agreement": interval(value), "nearest_support": 1 - value,
                "pairwise": value / 2 if pairs else None}  # fmt: skip

    sets = {f"{NAME}{i}": [{"alpha": a} | row(0.9 - 0.1 * i) for a in alphas] for i in range(2)}
    return SHARED | {"kind": "generated", "classes": ["a", NAME], "sets": sets, "methods": {},
                     "real": {"supports": row(0.8), "real images": row(0.85)}, "paired_differences": []}  # fmt: skip


def test_generated_images_are_shown_against_alpha_where_there_is_something_to_show(tmp_path):
    for alphas, pairs, lines in (([None], True, 0), ([0.5], True, 0), ([0, 0.5, 1], True, 6), ([0, 1], False, 4)):
        write_report(tmp_path / "report.html", generated(alphas, pairs))
        text = (tmp_path / "report.html").read_text()
        assert text.count("<polyline") == lines and text.count("stroke-dasharray") == 1
        assert text.count('class="dashed"') == lines / 2
        assert Page(tmp_path / "report.html").words.count("90.0 [85.0, 94.0]") == len(alphas)


CASES = [generated([0, 0.5, 1], True), benchmark(1, 1), benchmark(2, 5), benchmark(8, 600), accuracy(2), accuracy(64)]


@pytest.mark.parametrize("results", CASES, ids=["generated", "one", "two", "many", "folder", "classes"])
def test_pages_stand_alone(results, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, results)
    page = Page(path)
    tags = {tag for tag, *_ in page.attributes}
    assert not tags & {"script", "link", "iframe"} and "http" not in path.read_text()
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            kind, _, data = value.partition(",")
            assert kind == "data:image/png;base64"
            Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert NAME in page.words and "<b>" not in path.read_text()  # shown as it is, and never as a tag
    for method in results["methods"].values():
        assert (
            f"{100 * method['mean']:.1f} [{100 * method['ci95'][0]:.1f}, {100 * method['ci95'][1]:.1f}]" in page.words
        )
    if results["paired_differences"]:
        assert "-1.2 [-6.2, +2.8]" in page.words
    if results["kind"] == "benchmark":
        lines, against_alpha = path.read_text().count("<polyline"), len(results["methods"]) > 2
        assert lines == (results["dataset"]["num_episodes"] if len(results["methods"]) > 1 else 0) + against_alpha
        assert ("against alpha" in page.words) == against_alpha


@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
def test_chromium_shows_it_without_complaint(tmp_path):
    write_report(tmp_path / "report.html", benchmark(3, 20))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,1200",
               f"--screenshot={tmp_path / 'page.png'}", f"file://{tmp_path / 'report.html'}"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not re.findall(r".*CONSOLE.*", result.stderr)
    shot = Image.open(tmp_path / "page.png").convert("L")
    assert shot.size == (500, 1200) and shot.getextrema()[0] < 60 and shot.getextrema()[1] > 200
