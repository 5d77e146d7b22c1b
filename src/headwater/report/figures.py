"""The report's figures, drawn with matplotlib: training curves, forest plots, accuracy against cost and over the stages."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Affine2D

from headwater.report.svg import (
    COLOURS,
    DASHES,
    MARKERS,
    QUIET,
    STYLE,
    TEXT,
    as_file,
    inline,
    printable,
    spanning,
    spread,
)

MAX_POINTS = 80
"""Points per curve, in the figure and in its CSV."""

Line = tuple[Sequence[float], Sequence[float]]
"""(steps, values) of one seed."""


@dataclass(frozen=True, slots=True)
class Series:
    """The seeds of one legend entry. `lines[s]` holds (steps, values) of one seed."""

    label: str
    style: int
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """One row of a forest plot: mean, interval, and the values of single seeds as ticks."""

    label: str
    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """One arm: its cost, and its accuracy with the interval (fractions)."""

    label: str
    cost: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class CostAxis:
    """The horizontal axis of a cost figure. On a log axis every cost must be positive."""

    label: str
    format: Callable[[float], str]
    log: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """A finished figure.

    name         stem of its files in figures/
    description  text for screen readers
    element      inline SVG for the page
    svg          the stand-alone SVG file
    rows         rows of its CSV file, with the header
    """

    name: str
    description: str
    element: Markup
    svg: str
    rows: tuple[tuple[Any, ...], ...]

    @property
    def csv(self) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(self.rows)
        return buffer.getvalue()


def file_stem(*parts: str) -> str:
    """A portable file name from arbitrary names. A hash keeps different names apart where characters were replaced.

    Example: `file_stem("accuracy", "sums")` is `accuracy-sums`.
    """
    name = "-".join(parts)
    portable = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]
    return (
        portable if portable == name else f"{portable}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:6]}"
    )


def colour(style: int) -> str:
    return COLOURS[style % len(COLOURS)]


def marker(style: int) -> str:
    return MARKERS[style % len(MARKERS)]


def dash(style: int) -> str:
    return DASHES[style // len(COLOURS) % len(DASHES)]


def as_plot(figure: Figure, name: str, description: str, rows: Sequence[tuple[Any, ...]]) -> Plot:
    svg, description = as_file(figure, name), printable(description)
    return Plot(name, description, inline(svg, description), svg, tuple(rows))


def curves(name: str, title: str, series: Sequence[Series]) -> Plot:
    """Plot a metric over steps: the mean over seeds as a line, the range from lowest to highest seed as a band."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.15))
        axes = figure.add_axes((0.135, 0.175, 0.845, 0.69))
        axes.set_title(printable(title), loc="left", x=-0.13, y=1.03, fontsize=9.5)
        ranges = [(one, *seed_range(one)) for one in series]
        for one, steps, mean, low, high in ranges:
            if len(one.lines) > 1 and len(steps) > 1:
                axes.fill_between(steps, low, high, color=colour(one.style), alpha=0.13, linewidth=0)
            if steps:
                axes.plot(
                    steps,
                    mean,
                    color=colour(one.style),
                    linestyle=dash(one.style),
                    marker=marker(one.style),
                    markersize=3.6,
                    markevery=max(1, len(steps) // 5),
                    linewidth=1.4,
                )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.02)
        if axes.get_ylim()[0] < 0.0 <= min((min(low) for *_, low, _ in ranges if low), default=0.0):
            axes.set_ylim(bottom=0.0)  # no negative axis for values that are never negative
        axes.set_xlabel("step", loc="right", labelpad=0, fontsize=8)
        seeds = max((len(one.lines) for one in series), default=0)
        ends = [f"{one.label} from {mean[0]:.3g} to {mean[-1]:.3g}" for one, _, mean, *_ in ranges if mean]
        text = "; ".join(ends) or "no step in common"
        rows: list[tuple[Any, ...]] = [("series", "step", "mean", "lowest_seed", "highest_seed")]
        for one, *columns in ranges:
            rows += [(one.label, *values) for values in zip(*columns, strict=True)]
        return as_plot(figure, name, f"{title} over training steps, {seeds} seed{'s' * (seeds != 1)}: {text}", rows)


def seed_range(series: Series) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps that all seeds reached (about MAX_POINTS of them, the last included); mean, lowest and highest seed at each."""
    seeds = [dict(zip(steps, values, strict=True)) for steps, values in series.lines]
    common = sorted(set(seeds[0]).intersection(*seeds[1:])) if seeds else []
    stride = -(-len(common) // MAX_POINTS) or 1
    steps = [step for index, step in enumerate(common) if index % stride == 0 or index == len(common) - 1]
    values = [[seed[step] for seed in seeds] for step in steps]
    return steps, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def forest(name: str, title: str, estimates: Sequence[Estimate], reference: float | None, unit: str) -> Plot:
    """Draw a forest plot with a dashed line at `reference`. Values are shown times 100."""
    with matplotlib.rc_context(STYLE):
        left = 0.066 * max(len(row.label) for row in estimates) + 0.15
        width, height = left + 3.6, 0.22 * len(estimates) + 0.85
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((left / width, 0.5 / height, 3.5 / width, 1 - 0.85 / height))
        axes.set_title(printable(title), loc="left")
        if reference is not None:
            axes.axvline(100 * reference, color=TEXT, linewidth=0.8, linestyle="--")
        for y, row in enumerate(estimates):
            axes.plot([100 * row.low, 100 * row.high], [y, y], color=colour(0), linewidth=2)
            axes.plot([100 * row.mean], [y], color=colour(0), marker="o", markersize=5)
            axes.plot([100 * v for v in row.per_seed], [y] * len(row.per_seed), "|", color=TEXT, markersize=7)
        axes.set_yticks(range(len(estimates)), [printable(row.label) for row in estimates])
        axes.set_ylim(len(estimates) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        values = [f"{r.label} {100 * r.mean:.1f} ({100 * r.low:.1f} to {100 * r.high:.1f})" for r in estimates]
        rows: list[tuple[Any, ...]] = [("row", "mean", "low", "high", "per_seed")]
        rows += [(r.label, r.mean, r.low, r.high, " ".join(map(str, r.per_seed))) for r in estimates]
        return as_plot(figure, name, f"{title}, {unit}: {'; '.join(values)}", rows)


@dataclass(frozen=True, slots=True)
class LineLabel:
    """The label at the right of the axes for the point (x, y)."""

    text: str
    x: float
    y: float
    colour: str
    marker: str = ""


def accuracy_by_cost(
    name: str, title: str, points: Sequence[Point], levels: Sequence[tuple[str, float]], cost: CostAxis
) -> Plot:
    """Plot accuracy against cost: one point with its interval per arm; `levels` are dashed lines with their names."""
    with matplotlib.rc_context(STYLE):
        labels = [*(one.label for one in points), *(label for label, _ in levels)]
        figure, axes = _axes_with_labels(f"{title}, %", labels, below=0.5)
        axes.set_xlabel(cost.label)
        costs = [one.cost for one in points]
        low, high = min(costs), max(costs)
        if cost.log:
            axes.set_xscale("log")
            axes.set_xlim(low / (high / low) ** 0.06 / 1.1, high * (high / low) ** 0.06 * 1.1)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(*spanning([0.0, *costs, 1e-9], 0.12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost.format(value)))
        values = [100 * v for one in points for v in (one.low, one.high)] + [100 * level for _, level in levels]
        axes.set_ylim(*spanning(values))
        line_labels = []
        for style, (one, shift) in enumerate(zip(points, sideways_shifts(costs), strict=True)):
            x = _shifted(axes, one.cost, shift)
            axes.plot([x, x], [100 * one.low, 100 * one.high], color=colour(style), linewidth=1.4)
            axes.plot([x], [100 * one.mean], color=colour(style), marker=marker(style), markersize=5.5)
            line_labels.append(LineLabel(one.label, x, 100 * one.mean, colour(style), marker(style)))
        for label, level in levels:
            axes.axhline(100 * level, color=QUIET, linewidth=0.9, linestyle="--")
            line_labels.append(LineLabel(label, axes.get_xlim()[1], 100 * level, QUIET))
        _draw_labels(axes, line_labels)
        texts = [
            f"{p.label} {100 * p.mean:.1f} ({100 * p.low:.1f} to {100 * p.high:.1f}) at {cost.format(p.cost)}"
            for p in points
        ]
        texts += [f"{label} {100 * level:.1f}" for label, level in levels]
        rows: list[tuple[Any, ...]] = [("arm", "cost", "mean", "low", "high")]
        rows += [(p.label, p.cost, p.mean, p.low, p.high) for p in points]
        rows += [(label, "", level, "", "") for label, level in levels]
        return as_plot(figure, name, f"{title}, % ({cost.label}): {'; '.join(texts)}", rows)


def stage_paths(name: str, title: str, series: Sequence[Series], places: Sequence[str]) -> Plot:
    """Plot a value after each stage, one labelled line per series. Steps of a series are indices into `places`."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes_with_labels(title, [one.label for one in series], below=0.3)
        axes.set_xticks(range(len(places)), [printable(place) for place in places])
        axes.set_xlim(-0.15, len(places) - 0.85)
        axes.set_ylim(*spanning([value for one in series for _, values in one.lines for value in values]))
        line_labels, rows = [], [("series", "place", "value")]
        for one in series:
            x, y = one.lines[0]
            shade, symbol = colour(one.style), marker(one.style)
            axes.plot(x, y, color=shade, linestyle=dash(one.style), marker=symbol, markersize=5, linewidth=1.4)
            line_labels.append(LineLabel(one.label, x[-1], y[-1], shade, symbol))
            rows += [(one.label, places[int(place)], str(value)) for place, value in zip(x, y, strict=True)]
        _draw_labels(axes, line_labels)
        texts = [f"{one.label} {' to '.join(f'{value:.1f}' for value in one.lines[0][1])}" for one in series]
        return as_plot(figure, name, f"{title}: {'; '.join(texts)}", rows)


def _axes_with_labels(title: str, labels: Sequence[str], below: float) -> tuple[Figure, Axes]:
    """A figure with room for `labels` at the right, and `below` inches under the axes."""
    width, height = 4.75 + 0.066 * max(map(len, labels)), max(2.9, 0.17 * len(labels) + below + 0.35)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.45 / width, below / height, 3.75 / width, 1 - (below + 0.32) / height))
    axes.set_title(printable(title), loc="left", x=-0.1)
    return figure, axes


def _draw_labels(axes: Axes, labels: Sequence[LineLabel]) -> None:
    """Draw labels at the right without overlap, each connected to its point by a thin line."""
    bottom, top = axes.get_ylim()
    gap = (top - bottom) * 0.155 * axes.figure.dpi / axes.bbox.height  # 0.155 inches
    heights = spread([label.y for label in labels], gap, bottom - 2 * gap, top + gap)
    at = axes.get_yaxis_transform()
    for label, height in zip(labels, heights, strict=True):
        line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5, "alpha": 0.6}
        axes.annotate(
            "", (label.x, label.y), xytext=(1.04, height), textcoords=at, annotation_clip=False, arrowprops=line
        )
        if label.marker:
            axes.plot(
                [1.06], [height], color=label.colour, marker=label.marker, markersize=5, transform=at, clip_on=False
            )
        axes.text(1.09, height, printable(label.text), transform=at, va="center", size=8.5)


def _shifted(axes: Axes, cost: float, points: float) -> float:
    """The cost that is drawn this many typographic points to the right of `cost`."""
    x, y = axes.transData.transform((cost, axes.get_ylim()[0]))
    return float(axes.transData.inverted().transform((x + points * axes.figure.dpi / 72, y))[0])


def sideways_shifts(costs: Sequence[float]) -> list[float]:
    """Horizontal offsets in points that put arms of equal cost next to each other, so that their intervals do not overlap.

    Example: `sideways_shifts([256, 256, 512])` is `[-2.5, 2.5, 0.0]`.
    """
    shifts = []
    for index, cost in enumerate(costs):
        equal = [other for other, value in enumerate(costs) if abs(value - cost) <= 1e-9 * abs(cost)]
        shifts.append(min(5.0, 50.0 / len(equal)) * (equal.index(index) - (len(equal) - 1) / 2))
    return shifts


DASH_ARRAYS = {"-": "", "--": "5.2 2.2", "-.": "9 2.2 1.4 2.2", ":": "1.4 2.3"}
"""SVG stroke-dasharray of each matplotlib line style at the line width of the legend."""


@cache
def swatch(style: int) -> Markup:
    """The line and marker of a series, as inline SVG for a legend. It has no ids, because a page shows it many times."""
    symbol = MarkerStyle(marker(style))
    outline = symbol.get_path().transformed(symbol.get_transform() + Affine2D().scale(3.6, -3.6).translate(18, 5))
    corners: Any = outline.to_polygons()[0]
    paint = f"var(--series{style % len(COLOURS)}, {colour(style)})"
    return Markup(
        f'<svg viewBox="0 0 36 10" aria-hidden="true"><path d="M2 5h32" fill="none" stroke="{paint}" stroke-width="1.4"'
        f' stroke-dasharray="{DASH_ARRAYS[dash(style)]}"/>'
        f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}" fill="{paint}"/></svg>'
    )
