"""The report's figures by matplotlib: curves over steps, forests of intervals, accuracy against cost and through the stages.

Each is a `Drawn`: an SVG file, the same for the page, a description for those who cannot see it, and its numbers as CSV.
"""

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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

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

POINTS = 80
"""Points of a curve that are drawn; its CSV has the same ones."""

Line = tuple[Sequence[float], Sequence[float]]
"""Steps and values of one seed."""


@dataclass(frozen=True, slots=True)
class Series:
    """One group of seeds in a panel of curves. `lines[s]` is one seed's (steps, values)."""

    label: str
    style: int
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a forest plot: an estimate, its interval, and the seeds' own values as small ticks."""

    label: str
    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """An arm in a plane: what it cost, and its accuracy with its interval (fractions)."""

    label: str
    cost: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure. `name` is that of its files, `page` the element for a page, `file` the SVG, `rows` the CSV with its head."""

    name: str
    label: str
    page: str
    file: str
    rows: tuple[tuple[Any, ...], ...]

    @property
    def csv(self) -> str:
        sink = io.StringIO()
        csv.writer(sink, lineterminator="\n").writerows(self.rows)
        return sink.getvalue()


class Album:
    """The figures of a page, in the order in which they were drawn."""

    def __init__(self) -> None:
        self.drawn: list[Drawn] = []

    def add(self, one: Drawn) -> str:
        """Its element for the page."""
        self.drawn.append(one)
        return one.page


def named(*parts: str) -> str:
    """A file's name out of names that may be anything; different parts give different names.

    Example: `named("accuracy", "sums")` is `accuracy-sums`.
    """
    said = "-".join(parts)
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", said)[:60]
    return plain if plain == said else f"{plain}-{hashlib.sha256(said.encode(errors='replace')).hexdigest()[:6]}"


def colour(style: int) -> str:
    return COLOURS[style % len(COLOURS)]


def finish(figure: Figure, name: str, label: str, rows: Sequence[tuple[Any, ...]]) -> Drawn:
    file, label = as_file(figure, name), printable(label)
    return Drawn(name, label, inline(file, label), file, tuple(rows))


def curves(name: str, title: str, series: Sequence[Series]) -> Drawn:
    """A metric over steps: the mean over seeds as a line, from the lowest to the highest seed as a band."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.15))
        axes = figure.add_axes((0.135, 0.175, 0.845, 0.69))
        axes.set_title(printable(title), loc="left", x=-0.13, y=1.03, fontsize=9.5)
        drawn = [(one, *_seeds(one)) for one in series]
        for one, steps, mean, low, high in drawn:
            if steps:
                _curve(axes, one, steps, mean, low, high)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.02)
        if axes.get_ylim()[0] < 0.0 <= min((min(low) for *_, low, _ in drawn if low), default=0.0):
            axes.set_ylim(bottom=0.0)  # what is never negative gets no axis below 0
        axes.set_xlabel("step", loc="right", labelpad=0, fontsize=8)
        seeds = max((len(one.lines) for one in series), default=0)
        ends = [f"{one.label} from {mean[0]:.3g} to {mean[-1]:.3g}" for one, _, mean, *_ in drawn if mean]
        label = (
            f"{title} over training steps, {seeds} seed{'s' * (seeds != 1)}: {'; '.join(ends) or 'no step in common'}"
        )
        rows: list[tuple[Any, ...]] = [("series", "step", "mean", "lowest_seed", "highest_seed")]
        for one, *columns in drawn:
            rows += [(one.label, *values) for values in zip(*columns, strict=True)]
        return finish(figure, name, label, rows)


def _curve(axes: Axes, one: Series, steps: list[float], mean: list[float], low: list[float], high: list[float]) -> None:
    if len(one.lines) > 1 and len(steps) > 1:
        axes.fill_between(steps, low, high, color=colour(one.style), alpha=0.13, linewidth=0)
    axes.plot(
        steps,
        mean,
        color=colour(one.style),
        linestyle=DASHES[one.style // len(COLOURS) % len(DASHES)],
        marker=MARKERS[one.style % len(MARKERS)],
        markersize=3.6,
        markevery=max(1, len(steps) // 5),
        linewidth=1.4,
    )


def _seeds(one: Series) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps that all seeds reached, at most about POINTS with the last among them, and mean, lowest and highest seed there."""
    held = [dict(zip(steps, values, strict=True)) for steps, values in one.lines]
    steps = sorted(set(held[0]).intersection(*held[1:])) if held else []
    stride = -(-len(steps) // POINTS) or 1
    steps = [step for place, step in enumerate(steps) if place % stride == 0 or place == len(steps) - 1]
    at = [[seed[step] for seed in held] for step in steps]
    return steps, [sum(v) / len(v) for v in at], [min(v) for v in at], [max(v) for v in at]


def forest(name: str, title: str, rows: Sequence[Row], reference: float | None, unit: str) -> Drawn:
    """Estimates with intervals, one below the other, over a dashed line at `reference`. Values times 100 are shown."""
    with matplotlib.rc_context(STYLE):
        longest = max(len(row.label) for row in rows)
        left, height = 0.066 * longest + 0.15, 0.22 * len(rows) + 0.85
        figure = Figure(figsize=(left + 3.6, height))
        axes = figure.add_axes((left / (left + 3.6), 0.5 / height, 3.5 / (left + 3.6), 1 - 0.85 / height))
        axes.set_title(printable(title), loc="left")
        if reference is not None:
            axes.axvline(100 * reference, color=TEXT, linewidth=0.8, linestyle="--")
        for place, row in enumerate(rows):
            shade = colour(0)
            axes.plot([100 * row.low, 100 * row.high], [place, place], color=shade, linewidth=2)
            axes.plot([100 * row.mean], [place], color=shade, marker="o", markersize=5)
            axes.plot([100 * v for v in row.per_seed], [place] * len(row.per_seed), "|", color=TEXT, markersize=7)
        axes.set_yticks(range(len(rows)), [printable(row.label) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        said = [f"{r.label} {100 * r.mean:.1f} ({100 * r.low:.1f} to {100 * r.high:.1f})" for r in rows]
        table: list[tuple[Any, ...]] = [("row", "mean", "low", "high", "per_seed")]
        table += [(r.label, r.mean, r.low, r.high, " ".join(map(str, r.per_seed))) for r in rows]
        return finish(figure, name, f"{title}, {unit}: {'; '.join(said)}", table)


def against(
    name: str,
    title: str,
    points: Sequence[Point],
    levels: Sequence[tuple[str, float]],
    cost: str,
    said: Callable[[float], str],
    log: bool = False,
) -> Drawn:
    """Accuracy against what it cost: a point an arm with its interval, named at the right; `levels` are dashed lines.

    cost  the name of the axis, and `said` how a cost is written; with `log` every cost must be above zero

    Points of one cost stand beside each other, so that their intervals can be told apart.
    """
    with matplotlib.rc_context(STYLE):
        names = [*(one.label for one in points), *(name for name, _ in levels)]
        right, height = 0.066 * max(map(len, names)) + 0.45, max(2.9, 0.17 * len(names) + 0.85)
        figure = Figure(figsize=(4.3 + right, height))
        axes = figure.add_axes((0.45 / (4.3 + right), 0.5 / height, 3.75 / (4.3 + right), 1 - 0.82 / height))
        axes.set_title(printable(f"{title}, %"), loc="left", x=-0.1)
        axes.set_xlabel(cost)
        costs = [one.cost for one in points]
        low, high = min(costs), max(costs)
        if log:
            axes.set_xscale("log")
            axes.set_xlim(low / (high / low) ** 0.06 / 1.1, high * (high / low) ** 0.06 * 1.1)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(*spanning([0.0, *costs, 1e-9], 0.12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: said(value)))
        values = [100 * v for one in points for v in (one.low, one.high)] + [100 * level for _, level in levels]
        axes.set_ylim(*spanning(values))
        _named_points(axes, points, levels)
        told = [
            f"{p.label} {100 * p.mean:.1f} ({100 * p.low:.1f} to {100 * p.high:.1f}) at {said(p.cost)}" for p in points
        ]
        told += [f"{level_name} {100 * level:.1f}" for level_name, level in levels]
        rows: list[tuple[Any, ...]] = [("arm", "cost", "mean", "low", "high")]
        rows += [(p.label, p.cost, p.mean, p.low, p.high) for p in points]
        rows += [(level_name, "", level, "", "") for level_name, level in levels]
        return finish(figure, name, f"{title}, % ({cost}): {'; '.join(told)}", rows)


def paths(name: str, title: str, series: Sequence[Series], places: Sequence[str]) -> Drawn:
    """A value after each stage, a line a series, named at the right; a series passes through the places that it has."""
    with matplotlib.rc_context(STYLE):
        right, height = 0.066 * max(len(one.label) for one in series) + 0.45, max(2.9, 0.17 * len(series) + 0.7)
        figure = Figure(figsize=(4.3 + right, height))
        axes = figure.add_axes((0.45 / (4.3 + right), 0.3 / height, 3.75 / (4.3 + right), 1 - 0.62 / height))
        axes.set_title(printable(title), loc="left", x=-0.1)
        axes.set_xticks(range(len(places)), [printable(place) for place in places])
        axes.set_xlim(-0.15, len(places) - 0.85)
        values = [value for one in series for _, line in one.lines for value in line]
        axes.set_ylim(*spanning(values))
        ends, rows = [], [("series", "place", "value")]
        for one in series:
            at, line = one.lines[0]
            dash = DASHES[one.style // len(COLOURS) % len(DASHES)]
            mark = MARKERS[one.style % len(MARKERS)]
            axes.plot(at, line, color=colour(one.style), linestyle=dash, marker=mark, markersize=5, linewidth=1.4)
            ends.append(Named(one.label, at[-1], line[-1], colour(one.style), mark))
            rows += [(one.label, places[int(x)], str(y)) for x, y in zip(at, line, strict=True)]
        _name(axes, ends)
        told = [f"{one.label} {' to '.join(f'{y:.1f}' for y in one.lines[0][1])}" for one in series]
        return finish(figure, name, f"{title}: {'; '.join(told)}", rows)


@dataclass(frozen=True, slots=True)
class Named:
    """What stands at (x, y) and is named at the right of the axes."""

    label: str
    x: float
    y: float
    colour: str
    mark: str = ""


def _named_points(axes: Axes, points: Sequence[Point], levels: Sequence[tuple[str, float]]) -> None:
    ends = []
    for place, (one, shift) in enumerate(zip(points, beside([one.cost for one in points]), strict=True)):
        x, shade, mark = _shifted(axes, one.cost, shift), colour(place), MARKERS[place % len(MARKERS)]
        axes.plot([x, x], [100 * one.low, 100 * one.high], color=shade, linewidth=1.4)
        axes.plot([x], [100 * one.mean], color=shade, marker=mark, markersize=5.5)
        ends.append(Named(one.label, x, 100 * one.mean, shade, mark))
    for name, level in levels:
        axes.axhline(100 * level, color=QUIET, linewidth=0.9, linestyle="--")
        ends.append(Named(name, axes.get_xlim()[1], 100 * level, QUIET))
    _name(axes, ends)


def _name(axes: Axes, ends: Sequence[Named]) -> None:
    """Names at the right, apart from each other, each led to by a thin line of its own colour."""
    bottom, top = axes.get_ylim()
    assert axes.figure is not None
    inches = axes.get_position().height * axes.figure.get_size_inches()[1]  # type: ignore[union-attr]
    gap = (top - bottom) * 0.155 / inches
    heights = spread([one.y for one in ends], gap, bottom - 2 * gap, top + gap)
    at = axes.get_yaxis_transform()
    for one, height in zip(ends, heights, strict=True):
        line = {"arrowstyle": "-", "color": one.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5, "alpha": 0.6}
        axes.annotate("", (one.x, one.y), xytext=(1.04, height), textcoords=at, annotation_clip=False, arrowprops=line)
        if one.mark:
            axes.plot([1.06], [height], color=one.colour, marker=one.mark, markersize=5, transform=at, clip_on=False)
        axes.text(1.09, height, printable(one.label), transform=at, va="center", size=8.5)


def _shifted(axes: Axes, cost: float, points: float) -> float:
    """The cost that is drawn so many points to the right of this one."""
    assert axes.figure is not None
    x, y = axes.transData.transform((cost, axes.get_ylim()[0]))
    return float(axes.transData.inverted().transform((x + points * axes.figure.dpi / 72, y))[0])


def beside(costs: Sequence[float]) -> list[float]:
    """How many points each is moved sideways: those of one cost stand in a row around it.

    Example: `beside([256, 256, 512])` is `[-2.5, 2.5, 0.0]`.
    """
    shifts = []
    for place, cost in enumerate(costs):
        equal = [other for other, value in enumerate(costs) if abs(value - cost) <= 1e-9 * abs(cost)]
        shifts.append(min(5.0, 50.0 / len(equal)) * (equal.index(place) - (len(equal) - 1) / 2))
    return shifts


@cache
def key(style: int) -> str:
    """A small sample of a series' line and marker, for a legend in the page."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.5, 0.14))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        _curve(axes, Series("", style, ()), [0.0, 0.5, 1.0], [0.0, 0.0, 0.0], [], [])
        axes.lines[0].set_markevery([1])
        drawn = inline(as_file(figure, f"key {style}"), None)
    # It stands in many legends of one page, so it may have no ids: the mark is drawn where it is used.
    shape = re.search(r'<path id="[^"]*" d="([^"]*)"', drawn)
    used = re.search(r'<use href="[^"]*" x="([^"]*)" y="([^"]*)" style="([^"]*)"', drawn)
    assert shape is not None and used is not None
    mark = f'<path d="{shape[1]}" transform="translate({used[1]} {used[2]})" style="{used[3]}"/>'
    drawn = re.sub(r"<defs>.*?</defs>", "", drawn, flags=re.DOTALL).replace("</svg>", f"{mark}</svg>")
    return re.sub(r'<use [^>]*>|<g clip-path[^>]*>\s*</g>| clip-path="[^"]*"', "", drawn)
