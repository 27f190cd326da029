"""Plots by matplotlib as SVG for a page: 360 units wide, so that phones show text in its size, and in its own ink."""

import io
import re
import textwrap
from itertools import accumulate, cycle

import matplotlib
from markupsafe import Markup
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

PAGE = {"ink": "#1a1a1b", "soft": "#5a6270", "line": "#d8dce2"}  # variables of the page, and where there is none
COLOURS = ("#3b7dc4", "#d1662b", "#2f9166", "#a564bd", "#a88415")  # legible on white and on black
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "tint", "figure.facecolor": "none", "axes.facecolor": "none",
    "font.family": "DejaVu Sans", "font.size": 11, "text.parse_math": False, "lines.markersize": 6,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), PAGE["ink"]),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), PAGE["line"]),
}  # fmt: skip


def new_axes(height):
    return Figure(figsize=(5, height / 72), layout="constrained").add_subplot()


def as_svg(axes):
    """The SVG element of a figure, always the same for the same data, coloured by the page."""
    buffer = io.StringIO()
    axes.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    head, body = re.search(r"(<svg[^>]*>)(.*)", buffer.getvalue(), re.DOTALL).groups()
    # Inside a page, names of elements would be there twice, and namespaces are known.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", head) + re.sub(r'<g id="[\w.]+_\d+"', "<g", body)
    for name, colour in PAGE.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg)


def write_beside(axes, labels):
    """Writes each name right of the axes at the height of its point, moved where two would touch.

    Args:
        labels: (x, y, name, colour).
    """
    axes.autoscale_view()  # else done at drawing, after the places are read
    place = axes.transScale + axes.transLimits  # to shares of the axes' width and height
    labels = [(place.transform((x, y))[1], x, y, textwrap.fill(name, 20), colour) for x, y, name, colour in labels]
    labels.sort(key=lambda label: label[0])
    lines = max(name.count("\n") + 1 for *_, name, _ in labels)
    gap = 14 * lines / (72 * axes.figure.get_figheight() - 45)
    up = list(accumulate((y for y, *_ in labels), lambda below, y: max(y, below + gap)))
    down = list(accumulate((y for y, *_ in reversed(labels)), lambda above, y: min(y, above - gap)))[::-1]
    for (_, x, y, name, colour), *heights in zip(labels, up, down):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)}
        axes.annotate(
            name, (x, y), (1.05, sum(heights) / 2), textcoords="axes fraction", va="center", color=colour,
            annotation_clip=False, arrowprops=leader,
        )  # fmt: skip


@matplotlib.rc_context(STYLE)
def interval_plot(rows, label, zero=False, lines=()):
    """Points with whiskers, one below the other, on an axis of that label, of rows (name, mean, low, high). `zero` is
    marked if wished; `lines`, each of a value for each row, run thinly from row to row."""
    axes = new_axes(34 * len(rows) + 45)
    if lines:
        opacity = max(0.08, min(0.7, 12 / len(lines)))
        paths = [[(value, y) for y, value in enumerate(line)] for line in lines]
        axes.add_collection(LineCollection(paths, colors=PAGE["soft"], linewidths=0.8, alpha=opacity))
    for y, (name, mean, low, high) in enumerate(rows):
        axes.plot([low, high], [y, y], linewidth=2.5, color=COLOURS[0])
        axes.plot(mean, y, "o", color=COLOURS[0])
        axes.text(0, y - 0.25, name, transform=axes.get_yaxis_transform())
    if zero:
        axes.axvline(0, color=PAGE["ink"], linewidth=1)
    axes.set(xlabel=label, ylim=(len(rows) - 0.6, -0.75), yticks=[])
    return as_svg(axes)


@matplotlib.rc_context(STYLE)
def alpha_plot(series, label, yardstick=None):
    """Values of that label against alpha, a line for each series, {name: rows (alpha, value), or (alpha, value, low,
    high) with whiskers}; and a dashed one at a yardstick (name, value)."""
    axes, labels = new_axes(230), []
    for (name, rows), colour in zip(series.items(), cycle(COLOURS)):
        alphas, values, *interval = zip(*sorted(rows))
        axes.plot(alphas, values, "o-", color=colour)
        if interval:
            axes.vlines(alphas, *interval, color=colour, linewidth=2)
        labels.append((alphas[-1], values[-1], name, colour))
    if yardstick:
        axes.axhline(yardstick[1], color=PAGE["soft"], linestyle="--")
        labels.append((axes.get_xlim()[1], yardstick[1], yardstick[0], PAGE["soft"]))
    if len(labels) > 1:
        write_beside(axes, labels)
    axes.set(xlabel="alpha", ylabel=label)
    return as_svg(axes)


@matplotlib.rc_context(STYLE)
def calibration_plot(bins):
    """Accuracy against confidence in percent; the area of a point stands for the number of images of its bin, {"count",
    "confidence", "accuracy"}, the latter two in [0, 1], or None where it is empty."""
    axes, bins = new_axes(260), [row for row in bins if row["count"]]
    axes.axline((0, 0), slope=1, color=PAGE["soft"], linestyle="--", linewidth=1)
    axes.scatter(
        *([100 * row[key] for row in bins] for key in ("confidence", "accuracy")), color=COLOURS[0], alpha=0.75,
        s=[12 + 300 * row["count"] / max(row["count"] for row in bins) for row in bins],
    )  # fmt: skip
    axes.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(-3, 105), ylim=(-3, 105))
    return as_svg(axes)


@matplotlib.rc_context(STYLE)
def latency_plot(rows):
    """Accuracy in percent from left to right, latency in milliseconds upwards, on a logarithmic axis, of rows (name,
    milliseconds, mean, low, high), the last three None where the accuracy is not known."""
    axes, labels = new_axes(max(240, 15 * len(rows) + 60)), []
    for (name, ms, mean, low, high), colour in zip(rows, cycle(COLOURS)):
        if mean is None:
            axes.axhline(ms, color=colour, linestyle="--")
            name += " (accuracy unknown)"
        else:
            axes.plot([low, high], [ms, ms], linewidth=2.5, color=colour)
            axes.plot(mean, ms, "o", color=colour)
        labels.append((high, ms, name, colour))
    axes.set(xlabel="accuracy, %", ylabel="latency, ms", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    write_beside(axes, [(x or axes.get_xlim()[1], *label) for x, *label in labels])
    return as_svg(axes)
