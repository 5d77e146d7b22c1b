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
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2D, ScaledTranslation

from headwater.report.svg import COLOURS, DASHES, MARKERS, QUIET, STYLE, TEXT, as_file, inline, printable, spanning

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
    """Mean and interval of an arm or a difference (fractions), the values of single seeds, and what the arm cost."""

    label: str
    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...] = ()
    cost: float = 0.0


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


def line_style(style: int) -> dict[str, Any]:
    """Colour, marker and dashes of a series."""
    dashes = DASHES[style // len(COLOURS) % len(DASHES)]
    return {"color": colour(style), "marker": MARKERS[style % len(MARKERS)], "linestyle": dashes}


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
                every = max(1, len(steps) // 5)
                axes.plot(steps, mean, **line_style(one.style), markersize=3.6, markevery=every, linewidth=1.4)
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
        figure, axes = _axes(title, 0.22 * len(estimates) + 0.85)
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


def accuracy_by_cost(
    name: str, title: str, points: Sequence[Estimate], levels: Sequence[tuple[str, float]], cost: CostAxis
) -> Plot:
    """Plot accuracy against cost: one point with its interval per arm; `levels` are dashed lines with their names."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(f"{title}, %", max(2.9, 0.17 * (len(points) + len(levels)) + 0.85))
        axes.set_xlabel(cost.label)
        costs = [point.cost for point in points]
        low, high = min(costs), max(costs)
        if cost.log:
            axes.set_xscale("log")
            axes.set_xlim(low / (high / low) ** 0.06 / 1.1, high * (high / low) ** 0.06 * 1.1)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.set_xlim(*spanning([0.0, *costs, 1e-9], 0.12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost.format(value)))
        ends = [value for point in points for value in (point.low, point.high)]
        axes.set_ylim(*spanning([100 * value for value in (*ends, *(level for _, level in levels))]))
        lines = []
        for style, (point, shift) in enumerate(zip(points, sideways_shifts(costs), strict=True)):
            moved = axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
            ends = [100 * point.low, 100 * point.high]
            axes.plot([point.cost] * 2, ends, color=colour(style), linewidth=1.4, transform=moved)
            look = {**line_style(style), "linestyle": ""}
            lines += axes.plot(
                [point.cost], [100 * point.mean], **look, markersize=5.5, transform=moved, label=point.label
            )
        for label, level in levels:
            lines.append(axes.axhline(100 * level, color=QUIET, linewidth=0.9, linestyle="--", label=label))
        _legend(axes, lines)
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
    """Plot a value after each stage, one line per series. Steps of a series are indices into `places`."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(title, max(2.9, 0.17 * len(series) + 0.65))
        axes.set_xticks(range(len(places)), [printable(place) for place in places])
        lines = []
        rows = [("series", "place", "value")]
        for one in series:
            x, y = one.lines[0]
            lines += axes.plot(x, y, **line_style(one.style), markersize=5, linewidth=1.4, label=one.label)
            rows += [(one.label, places[int(place)], str(value)) for place, value in zip(x, y, strict=True)]
        _legend(axes, lines)
        texts = [f"{one.label} {' to '.join(f'{value:.1f}' for value in one.lines[0][1])}" for one in series]
        return as_plot(figure, name, f"{title}: {'; '.join(texts)}", rows)


def _axes(title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(printable(title), loc="left")
    return figure, axes


def _legend(axes: Axes, lines: Sequence[Line2D]) -> None:
    """List the lines at the right in the order of their last values, and give these."""
    last = {line: float(np.asarray(line.get_ydata())[-1]) for line in lines}
    ordered = sorted(lines, key=lambda line: -last[line])
    labels = [f"{printable(str(line.get_label()))} {last[line]:.1f}" for line in ordered]
    axes.legend(ordered, labels, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


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
"""SVG stroke-dasharray of each matplotlib line style."""


@cache
def swatch(style: int) -> Markup:
    """The line and marker of a series, as inline SVG for a legend. It has no ids, because a page shows it many times."""
    look = line_style(style)
    symbol = MarkerStyle(look["marker"])
    outline = symbol.get_path().transformed(symbol.get_transform() + Affine2D().scale(3.6, -3.6).translate(18, 5))
    corners: Any = outline.to_polygons()[0]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    paint, dashes = f"var(--series{style % len(COLOURS)}, {look['color']})", DASH_ARRAYS[look["linestyle"]]
    return Markup(
        f'<svg viewBox="0 0 36 10" aria-hidden="true"><path d="M2 5h32" fill="none" stroke="{paint}" stroke-width="1.4"'
        f' stroke-dasharray="{dashes}"/><polygon points="{points}" fill="{paint}"/></svg>'
    )
