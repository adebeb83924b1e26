"""The plots of report.html: SVG by matplotlib, coloured by the page's CSS variables so that they follow its scheme."""

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

INK, MUTED, GRID, ACCENT, SECOND, BAD, SURFACE = (f"#0{number}0{number}0{number}" for number in range(1, 8))
"""Stand-ins that `_svg` replaces by the page's variables; no other colour is drawn with."""
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
    BAD: "var(--bad)",
    SURFACE: "var(--surface)",
}
STYLE = {
    "svg.fonttype": "none",  # text stays text: it is small, can be searched, and takes the page's font
    "svg.hashsalt": "g4kit",
    "text.parse_math": False,  # a label may hold a dollar sign
    "font.size": 11.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "legend.facecolor": SURFACE,
    "legend.edgecolor": SURFACE,
    "legend.framealpha": 0.85,
    "legend.fontsize": 11,
}
CHART_INCHES = (6.1, 3.3)
"""In SVG units 72 a unit: wide enough for a desk, and its text still legible at the width of a phone."""
POINTS = 800
"""A curve with more is averaged down to so many."""
LOG_RATIO = 50.0
"""A loss that spans more than this is drawn on a logarithmic axis."""
MATRIX_CLASSES = 50
"""Larger confusion matrices show the classes with the most mistakes."""
SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"

Line = Mapping[str, Any]
"""One line of the metrics."""


def loss_chart(lines: Sequence[Line], resumed: Sequence[int], best_step: int | None) -> str | None:
    """Training loss, smoothed and as it was, with the validation loss. None where nothing was logged.

    resumed: steps at which a later attempt went on.
    """
    train = _series(lines, "train", "step", "loss")
    validation = _series(lines, "eval", "step", "eval_loss")
    if train is None:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _chart("optimizer step", "loss")
        axes.plot(*_thinned(*train), color=ACCENT, alpha=0.28, linewidth=1)
        axes.plot(*_thinned(train[0], _smooth(train[1])), color=ACCENT, label="training (smoothed)")
        if validation is not None:
            axes.plot(*validation, color=SECOND, marker="o", markersize=4, linewidth=1.4, label="validation")
            _mark_best(axes, validation, best_step)
        positive = train[1][train[1] > 0]
        if len(positive) == len(train[1]) and positive.max() / positive.min() > LOG_RATIO:
            axes.set_yscale("log")
            axes.set_ylabel("loss (logarithmic)")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        _mark_resumed(axes, resumed)
        axes.legend(loc="upper right")
        return _svg(figure, "loss")


def step_chart(lines: Sequence[Line], name: str, label: str, resumed: Sequence[int]) -> str | None:
    """One logged number by step, bytes as GiB; None where it was not logged."""
    series = _series(lines, "train", "step", name)
    if series is None:
        return None
    if name.endswith("_bytes"):
        series = series[0], series[1] / 2**30
    with mpl.rc_context(STYLE):
        figure, axes = _chart("optimizer step", label)
        smooth = name == "grad_norm"
        axes.plot(*_thinned(*series), color=ACCENT, alpha=0.28 if smooth else 1, linewidth=1 if smooth else 1.8)
        if smooth:
            axes.plot(*_thinned(series[0], _smooth(series[1])), color=ACCENT)
        axes.set_ylim(bottom=0)
        _mark_resumed(axes, resumed)
        return _svg(figure, name)


def throughput_chart(lines: Sequence[Line], samples_a_step: int, resumed: Sequence[int]) -> str | None:
    """Samples a second by time, the pauses between attempts left out; None where fewer than two lines tell their time.

    resumed: steps at which a later attempt went on.

    An attempt logs its rate with every line; lines without one were taken over from a checkpoint and have no true time.
    """
    timed = [
        (datetime.fromisoformat(line["time"]).timestamp(), line["step"], line["samples_per_second"])
        for line in lines
        if line["kind"] == "train" and "samples_per_second" in line
    ]
    if len(timed) < 2:
        return None
    seconds, steps, _ = (np.array(column, dtype=float) for column in zip(*timed, strict=True))
    spans, samples = np.diff(seconds), np.diff(steps) * samples_a_step
    between = np.isin(steps[1:], resumed)
    going_on = (spans > 0) & ~between
    if not going_on.any():
        return None
    ended = np.cumsum(going_on)[between]  # spans before each pause
    spans, samples = spans[going_on], samples[going_on]
    minutes, rates = np.cumsum(spans) / 60, samples / spans
    with mpl.rc_context(STYLE):
        figure, axes = _chart("minutes of training", "samples a second")
        axes.plot(*_thinned(minutes, rates), color=ACCENT, alpha=0.28, linewidth=1)
        axes.plot(*_thinned(minutes, _smooth(samples) / _smooth(spans)), color=ACCENT)
        _mark_resumed(axes, [minutes[count - 1] for count in ended if 0 < count < len(minutes)])
        axes.set_ylim(0, 1.4 * np.percentile(rates, 95))  # a log line that came late makes the next one look fast
        return _svg(figure, "throughput")


def confusion_chart(confusion: Mapping[str, Any]) -> tuple[str, int]:
    """The confusion matrix, and how many classes it shows. Shades are shares of a row."""
    rows, columns = list(confusion["rows"]), list(confusion["columns"])
    counts = np.array(confusion["counts"])
    if len(rows) > MATRIX_CLASSES:
        wrong = counts.sum(axis=1) - counts.diagonal()
        kept = sorted(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES].tolist())
        counts = counts[kept][:, [*kept, len(rows)]]
        rows, columns = [rows[index] for index in kept], [*(columns[index] for index in kept), columns[-1]]
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], columns[:-1]
    with mpl.rc_context(STYLE):
        return _svg(_matrix(counts, rows, columns), "confusion"), len(rows)


def _matrix(counts: Any, rows: Sequence[str], columns: Sequence[str]) -> Figure:
    few = len(rows) <= 12
    cell, font = (0.42, 11.5) if few else (0.25, 8.5)
    margin = 0.1 * max(map(len, (*rows, *columns))) * font / 11.5 + 0.5
    figure = Figure(figsize=(len(columns) * cell + margin, len(rows) * cell + margin), layout="constrained")
    axes = figure.add_subplot()
    totals = counts.sum(axis=1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        count, right = int(counts[row, column]), row == column
        share = 0.12 + 0.88 * count / totals[row]
        axes.add_patch(
            Rectangle((column, row), 1, 1, facecolor=ACCENT if right else BAD, alpha=share, edgecolor="none")
        )
        ink = SURFACE if share > 0.6 else INK
        axes.text(column + 0.5, row + 0.52, str(count), ha="center", va="center", fontsize=font * 0.92, color=ink)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), aspect="equal", xlabel="answered", ylabel="truth")
    axes.set_xticks(np.arange(len(columns)) + 0.5, [_printable(name) for name in columns], rotation=90, fontsize=font)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [_printable(name) for name in rows], fontsize=font)
    axes.set_xticks(np.arange(len(columns) + 1), minor=True)
    axes.set_yticks(np.arange(len(rows) + 1), minor=True)
    axes.grid(visible=False, which="major")
    axes.grid(which="minor")
    axes.tick_params(which="both", length=0)
    return figure


def _chart(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=CHART_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(visible=False, axis="x")
    axes.tick_params(which="both", length=0)
    axes.margins(x=0.02)
    if xlabel == "optimizer step":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure, axes


def _mark_best(axes: Axes, validation: tuple[Any, Any], best_step: int | None) -> None:
    where = np.flatnonzero(validation[0] == best_step)
    if len(where):
        at = where[0]
        axes.plot(
            validation[0][at : at + 1],
            validation[1][at : at + 1],
            color=SECOND,
            marker="o",
            markersize=9,
            markerfacecolor="none",
            linestyle="none",
            label=f"kept: step {best_step}",
        )


def _mark_resumed(axes: Axes, resumed: Sequence[float]) -> None:
    for number, at in enumerate(resumed):
        axes.axvline(
            at, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), label=None if number else "resumed by an attempt"
        )


def _series(lines: Sequence[Line], kind: str, x: str, y: str) -> tuple[Any, Any] | None:
    pairs = [(line[x], line[y]) for line in lines if line["kind"] == kind and y in line]
    if not pairs:
        return None
    xs, ys = zip(*pairs, strict=True)
    return np.array(xs, dtype=float), np.array(ys, dtype=float)


def _smooth(values: Any) -> Any:
    """A centred moving average over a fortieth of the curve."""
    width = max(1, len(values) // 40)
    if width == 1:
        return values
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _thinned(xs: Any, ys: Any) -> tuple[Any, Any]:
    """At most POINTS points, each the mean of its neighbours."""
    if len(xs) <= POINTS:
        return xs, ys
    parts = [part for part in np.array_split(np.arange(len(xs)), POINTS) if len(part)]
    return np.array([xs[part].mean() for part in parts]), np.array([ys[part].mean() for part in parts])


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an element to put into the page: ids of its own, the page's colours and font, no fixed size."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page's fonts draw the text
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK[1:].partition("}")[0])
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 what matplotlib just wrote
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            element.set(name, _attribute(name, value, prefix))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("aria-hidden", "true")
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == XLINK:
        return f"#{prefix}-{value[1:]}"
    value = re.sub(r"url\(#(.+?)\)", rf"url(#{prefix}-\1)", value)
    value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
    for colour, variable in VARIABLES.items():
        value = value.replace(colour, variable)
    return value
