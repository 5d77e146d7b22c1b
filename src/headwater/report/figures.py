"""Figures of reports and sweeps, drawn with matplotlib: training curves, forest plots, and lines with intervals."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import zip_longest
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2D, ScaledTranslation

from headwater.report.format import counted, csv_text
from headwater.report.svg import (
    COLOURS,
    DASHES,
    MARKERS,
    PART,
    QUIET,
    STYLE,
    TEXT,
    as_file,
    inline,
    printable,
    spanning,
)


@dataclass(frozen=True, slots=True)
class Series:
    """One legend entry: values `y` at `x`, each from `low` to `high` where these are given; one `y` without `x` is a level.

    style  colour, marker and dashes; None for an untrained model, which is drawn in grey
    seeds  over how many seeds the values are means
    """

    label: str
    style: int | None
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    seeds: int = 1


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, drawn as one row of a forest plot. `level` is the reference line, `seeds` the values of single seeds."""

    mean: float
    low: float
    high: float
    level: float | None = None
    seeds: tuple[float, ...] = ()

    @classmethod
    def of(cls, accuracy: Mapping[str, Any], level: float | None = None) -> Interval:
        """An accuracy of report.json."""
        return cls(accuracy["mean"], accuracy["low"], accuracy["high"], level, tuple(accuracy["per_seed"].values()))


@dataclass(frozen=True, slots=True)
class ValueAxis:
    """The horizontal axis of a line plot.

    ticks  position -> text; without them, ticks are chosen from zero on and written by `format`
    log    logarithmic; every value must be positive
    """

    label: str = ""
    ticks: Mapping[float, str] = field(default_factory=dict)
    format: Callable[[float], str] = str
    log: bool = False

    def text(self, value: float) -> str:
        return self.ticks[value] if self.ticks else self.format(value)


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
        return csv_text(self.rows)


def file_stem(*parts: str) -> str:
    """A portable file name from arbitrary names. A hash keeps different names apart where characters were replaced.

    Example: `file_stem("accuracy", "sums")` is `accuracy-sums`.
    """
    name = "-".join(parts)
    portable = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:6]
    return portable if portable == name else f"{portable}-{digest}"


def colour(style: int) -> str:
    return COLOURS[style % len(COLOURS)]


def line_style(style: int) -> dict[str, Any]:
    """Colour, marker and dashes of a series."""
    dashes = DASHES[style // len(COLOURS) % len(DASHES)]
    return {"color": colour(style), "marker": MARKERS[style % len(MARKERS)], "linestyle": dashes}


def as_plot(figure: Figure, name: str, description: str, rows: Sequence[tuple[Any, ...]]) -> Plot:
    svg, description = as_file(figure, name), printable(description)
    return Plot(name, description, inline(svg, description), svg, tuple(rows))


WIDTH = 4.8
"""Width in inches of every other figure of the page: its text stays readable where a phone's screen scales it."""
CURVE_SIZE = (3.5, 2.15)
"""Width and height of a panel of curves in inches."""
CURVE_AXES = (0.155, 0.175, 0.825, 0.69)
"""Left, bottom, width and height of its axes, as shares of the panel."""


@matplotlib.rc_context(STYLE)
def curves(name: str, title: str, series: Sequence[Series], limits: tuple[float, float] | None = None) -> Plot:
    """Plot a metric over steps: the mean over seeds as a line, the range from lowest to highest seed as a band.

    limits  of the vertical axis; by default the range of the values

    The element on the page carries the values (`data-curve`), for curves.js.
    """
    figure = Figure(figsize=CURVE_SIZE)
    axes = figure.add_axes(CURVE_AXES)
    axes.set_title(printable(title), loc="left", x=-0.16, y=1.03, fontsize=9.5)
    drawn = [line for line in series if line.x]
    for place, line in enumerate(drawn):
        style = line_style(line.style or 0)
        if line.seeds > 1 and len(line.x) > 1:
            band = axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.13, linewidth=0)
            band.set_gid(f"{PART}band{place}")
        marked = max(1, len(line.x) // 5)
        (path,) = axes.plot(line.x, line.y, **style, markersize=3.6, markevery=marked, linewidth=1.4)
        path.set_gid(f"{PART}line{place}")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    axes.yaxis.set_gid(f"{PART}values")
    axes.margins(x=0.02)
    if limits is not None:
        axes.set_ylim(*limits)
    axes.set_xlabel("step", loc="right", labelpad=0, fontsize=8)
    seeds = max((line.seeds for line in series), default=0)
    text = "; ".join(f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in drawn) or "no step in common"
    header = ("series", "step", "mean", "lowest_seed", "highest_seed")
    rows = [(line.label, *row) for line in drawn for row in zip(line.x, line.y, line.low, line.high, strict=True)]
    plot = as_plot(figure, name, f"{title} over training steps, {counted(seeds, 'seed')}: {text}", [header, *rows])
    values = json.dumps(_curve_values(title, drawn, axes), separators=(",", ":"))
    return replace(plot, element=Markup(f'<svg data-curve="{escape(printable(values))}"') + plot.element[len("<svg") :])


def tick_text(value: float) -> str:
    """A short number. Example: `tick_text(0.0005)` is `5e−4`, `tick_text(-0.25)` is `−0.25`, `tick_text(2500)` is `2500`."""
    text = f"{value:.1e}".replace(".0e", "e") if 0 < abs(value) < 9.9e-4 else f"{value:.4g}"
    return re.sub(r"e(-?)[+]?0*", r"e\1", text).replace("-", "−")


def _curve_values(title: str, drawn: Sequence[Series], axes: Axes) -> dict[str, Any]:
    """What curves.js needs: the frame of the axes in the SVG's points, their limits, and the values of each line."""
    (width, height), (left, bottom, wide, high) = CURVE_SIZE, CURVE_AXES
    inches = (width * left, height * (1 - bottom), width * (left + wide), height * (1 - bottom - high))
    lines = []
    for line in drawn:
        values = {"y": line.y, **({"low": line.low, "high": line.high} if line.seeds > 1 else {})}
        short = {key: [float(f"{value:.4g}") for value in numbers] for key, numbers in values.items()}
        lines.append({"label": line.label, "colour": (line.style or 0) % len(COLOURS), "x": list(line.x), **short})
    numbers = {"frame": [72 * size for size in inches], "x": axes.get_xlim(), "y": axes.get_ylim()}
    return {"title": title, **{key: [float(f"{v:.6g}") for v in pair] for key, pair in numbers.items()}, "lines": lines}


def forest(name: str, title: str, estimates: Sequence[tuple[str, Interval]], unit: str) -> Plot:
    """A forest plot with its files."""
    values = [f"{label} {100 * r.mean:.1f} ({100 * r.low:.1f} to {100 * r.high:.1f})" for label, r in estimates]
    header = ("row", "mean", "low", "high", "per_seed")
    rows = [(label, r.mean, r.low, r.high, " ".join(map(str, r.seeds))) for label, r in estimates]
    figure = forest_figure(title, estimates, unit)
    return as_plot(figure, name, f"{title}, {unit}: {'; '.join(values)}", [header, *rows])


@matplotlib.rc_context(STYLE)
def forest_figure(title: str, estimates: Sequence[tuple[str, Interval]], unit: str) -> Figure:
    """Draw a forest plot of (label, estimate) with a dashed line at the level of the first. Values are shown times 100."""
    figure, axes = titled_figure(title, 0.22 * len(estimates) + 0.85)
    if estimates and (level := estimates[0][1].level) is not None:
        axes.axvline(100 * level, color=TEXT, linewidth=0.8, linestyle="--")
    for y, (_, row) in enumerate(estimates):
        axes.plot([100 * row.low, 100 * row.high], [y, y], color=COLOURS[0], linewidth=2)
        axes.plot([100 * row.mean], [y], color=COLOURS[0], marker="o", markersize=5)
        axes.plot([100 * v for v in row.seeds], [y] * len(row.seeds), "|", color=TEXT, markersize=7)
    axes.set_yticks(range(len(estimates)), [printable(label) for label, _ in estimates])
    axes.set_ylim(len(estimates) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(unit)
    return figure


def titled_figure(title: str, height: float) -> tuple[Figure, Axes]:
    """A figure of one axes, with the title at the figure's left edge: long labels of rows leave no room for it above the axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(printable(title), x=0.01, ha="left", fontsize=10)
    return figure, figure.add_subplot()


Panels = Mapping[str, Sequence[Series]]
"""Title -> series. Values are shares; line plots show them in per cent."""


def line_plot(name: str, panels: Panels, axis: ValueAxis, rows: Sequence[tuple[Any, ...]]) -> Plot:
    """The figure of `line_figure` with its files. `rows` are those of its CSV file."""
    return as_plot(line_figure(panels, axis), name, line_description(panels, axis), rows)


@matplotlib.rc_context(STYLE)
def line_figure(panels: Panels, axis: ValueAxis, width: float = WIDTH, plot_height: float = 2.4) -> Figure:
    """Draw one panel per title: a line through the values of each series, or a single point, with intervals."""
    heights = [plot_height + 0.17 * math.ceil(len(series) / LEGEND_COLUMNS) for series in panels.values()]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights}).flat
    for axes, (title, series) in zip(grid, panels.items(), strict=True):
        axes.set_title(printable(title), loc="left")
        _set_limits(axes, series, axis)
        _draw_lines(figure, axes, series)
    return figure


def line_description(panels: Panels, axis: ValueAxis) -> str:
    """Text alternative: every value with its interval. Example: `Accuracy, %: bridge 67.5 (64.2 to 70.7) at 256`."""
    parts = []
    for title, series in panels.items():
        texts = []
        for line in series:
            ends = [f" ({100 * a:.1f} to {100 * b:.1f})" for a, b in zip(line.low, line.high, strict=True)]
            places = [f" at {axis.text(x)}" for x in line.x]
            values = zip_longest((f"{100 * y:.1f}" for y in line.y), ends, places, fillvalue="")
            texts.append(f"{line.label} {', '.join(map(''.join, values))}")
        parts.append(f"{title} ({axis.label}): {'; '.join(texts)}" if axis.label else f"{title}: {'; '.join(texts)}")
    return ". ".join(parts)


LEGEND_COLUMNS = 2
LEAST_POINTS = 5.0
"""Percentage points that an axis of accuracies spans at least."""


def _set_limits(axes: Axes, series: Sequence[Series], axis: ValueAxis) -> None:
    axes.set_xlabel(printable(axis.label))
    values = [100 * value for line in series for value in (*line.y, *line.low, *line.high)]
    if max(values) - min(values) < LEAST_POINTS:  # a plain axis, rather than one that magnifies rounding
        values += [max(0.0, min(values) - LEAST_POINTS / 2), min(100.0, max(values) + LEAST_POINTS / 2)]
    axes.set_ylim(*spanning(values))
    if axis.ticks:
        axes.set_xlim(*spanning([*axis.ticks], 0.15))
        axes.set_xticks([*axis.ticks], [printable(text) for text in axis.ticks.values()])
        if sum(map(len, axis.ticks.values())) > 60:
            axes.tick_params(axis="x", labelsize=7, labelrotation=12)
        return
    xs = [x for line in series if line.style is not None for x in line.x]
    if axis.log:
        low, high = min(xs), max(xs)
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.06 / 1.1, high * (high / low) ** 0.06 * 1.1)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(*spanning([0.0, *xs, 1e-9], 0.12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: axis.format(value)))


def _draw_lines(figure: Figure, axes: Axes, series: Sequence[Series]) -> None:
    """Draw the series, and list them below the axes in the order of their last values, with these."""
    arms = [entry for entry in series if entry.style is not None]
    lines_of_points = any(len(entry.x) > 1 for entry in arms)
    shifts = iter(sideways_shifts([0.0 if lines_of_points else entry.x[0] for entry in arms]))
    untrained = iter(("--", ":"))
    lines: list[tuple[float, Line2D, str]] = []
    for entry in series:
        y, low, high = ([100 * value for value in values] for values in (entry.y, entry.low, entry.high))
        if entry.style is None:
            look: dict[str, Any] = {"color": QUIET, "linewidth": 1.1, "linestyle": next(untrained, "-.")}
            level = max(y) - min(y) < 1e-9  # the same everywhere: a line across the plot
            line = axes.axhline(y[-1], **look) if level else axes.plot(entry.x, y, **look)[0]
        else:
            shift = ScaledTranslation(next(shifts) / 72 if low else 0.0, 0, figure.dpi_scale_trans)
            look = {**line_style(entry.style), "linewidth": 1.4, "markersize": 5.3, "transform": axes.transData + shift}
            if low:
                axes.vlines(entry.x, low, high, color=look["color"], linewidth=1.4, transform=look["transform"])
            line = axes.plot(entry.x, y, **look | ({} if lines_of_points else {"linestyle": ""}))[0]
        lines.append((y[-1], line, f"{printable(entry.label)} {y[-1]:.1f}"))
    lines.sort(key=lambda end: -end[0])
    handles, labels = [line for _, line, _ in lines], [text for *_, text in lines]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.05, -0.2), "ncols": LEGEND_COLUMNS}
    axes.legend(handles, labels, **place, frameon=False, fontsize=8, columnspacing=1.2)


def sideways_shifts(values: Sequence[float]) -> list[float]:
    """Horizontal offsets in points that put arms of equal value next to each other, so that their intervals do not overlap.

    Example: `sideways_shifts([256, 256, 512])` is `[-2.5, 2.5, 0.0]`.
    """
    shifts = []
    for index, value in enumerate(values):
        equal = [other for other, candidate in enumerate(values) if abs(candidate - value) <= 1e-9 * abs(value)]
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
