"""Figures as inline SVG: text stays text, axes take the page's text colour, ids never clash, the same data give the
same bytes. Matplotlib draws; the page's style sheet decides light or dark: `--line` is its colour of fine lines, and
`--series0`, … may brighten a data colour on a dark page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Okabe & Ito's palette, told apart by the colour-blind, without yellow and black, which vanish on one of the pages.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")

# Stand-ins that no data line uses; the page's own colours take their place in the finished text.
_TEXT, _LINE = "#010203", "#030201"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "headwater",
    "text.parse_math": False,
    "font.size": 8.0,
    "font.family": "sans-serif",
    "text.color": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
_POINTS = 150


@dataclass(frozen=True, slots=True)
class Series:
    """One group of seeds in a panel of curves. `lines[s]` is one seed's (steps, values)."""

    label: str
    style: int
    lines: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a forest plot: an estimate, its interval, and the seeds' own values as small dots."""

    label: str
    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...] = ()
    style: int = 0


def curves(name: str, title: str, series: Sequence[Series]) -> str:
    """A metric over training steps: each seed thin, the mean over seeds thick and marked.

    `name` must be unique on the page. Returns an `<svg>` element.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.3, 2.1))
        axes = figure.add_axes((0.17, 0.16, 0.8, 0.72))
        axes.set_title(title, loc="left")
        axes.set_xlabel("step", labelpad=1)
        # A factor such as 1e-5 above the axis would push the title out of the figure.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}".replace("-", "−")))
        for one in series:
            _draw(axes, one)
        seeds = max((len(one.lines) for one in series), default=0)
        label = f"{title} over training steps, {seeds} seed{'s' * (seeds != 1)}: {'; '.join(_ends(s) for s in series)}"
        return _inline(figure, name, label)


def _draw(axes: Axes, one: Series) -> None:
    colour, dash = COLOURS[one.style % len(COLOURS)], DASHES[one.style % len(DASHES)]
    if len(one.lines) > 1:
        for steps, values in one.lines:
            axes.plot(*_thinned(steps, values), color=colour, linewidth=0.6, alpha=0.35)
    mean_steps, means = _thinned(*_mean(one))
    axes.plot(
        mean_steps,
        means,
        color=colour,
        linestyle=dash,
        linewidth=1.5,
        marker=MARKERS[one.style % len(MARKERS)],
        markersize=3.5,
        markevery=max(1, len(mean_steps) // 6),
    )


def _mean(one: Series) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean over seeds at the steps that all of them reached."""
    seeds = [dict(zip(steps, values, strict=True)) for steps, values in one.lines]
    steps = sorted(set(seeds[0]).intersection(*seeds[1:])) if seeds else []
    return tuple(steps), tuple(sum(seed[step] for seed in seeds) / len(seeds) for step in steps)


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """At most about 150 points, the last among them: a page holds a hundred panels."""
    stride = -(-len(steps) // _POINTS) or 1
    keep = sorted({*range(0, len(steps), stride), len(steps) - 1}) if steps else []
    return [steps[i] for i in keep], [values[i] for i in keep]


def _ends(one: Series) -> str:
    _, values = _mean(one)
    return f"{one.label} from {values[0]:.3g} to {values[-1]:.3g}" if values else f"{one.label} without a common step"


def forest(name: str, title: str, rows: Sequence[Row], reference: float | None, unit: str) -> str:
    """Estimates with intervals, one below the other, over a dashed line at `reference`. Values times 100 are shown.

    `name` must be unique on the page. Returns an `<svg>` element.
    """
    height = 0.22 * len(rows) + 0.62
    longest = max(len(row.label) for row in rows)
    left = min(0.05 + 0.0166 * longest, 0.55)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, height))
        axes = figure.add_axes((left, 0.36 / height, 0.97 - left, 1 - 0.6 / height))
        axes.set_title(title, loc="left")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit, labelpad=1)
        if reference is not None:
            axes.axvline(100 * reference, color=_TEXT, linewidth=0.8, linestyle="--")
        for place, row in enumerate(rows):
            colour = COLOURS[row.style % len(COLOURS)]
            axes.plot([100 * row.low, 100 * row.high], [place, place], color=colour, linewidth=1.6)
            axes.plot([100 * v for v in row.per_seed], [place] * len(row.per_seed), "|", color=_TEXT, markersize=4)
            axes.plot([100 * row.mean], [place], MARKERS[row.style % len(MARKERS)], color=colour, markersize=4.5)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        said = [f"{r.label} {100 * r.mean:.1f} ({100 * r.low:.1f} to {100 * r.high:.1f})" for r in rows]
        return _inline(figure, name, f"{title}, {unit}: {'; '.join(said)}")


def key(name: str, style: int) -> str:
    """A small sample of a series' line and marker, for a legend in the page. `name` must be unique on the page."""
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(0.42, 0.14))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        colour, marker = COLOURS[style % len(COLOURS)], MARKERS[style % len(MARKERS)]
        axes.plot([0, 1, 2], [0, 0, 0], color=colour, linestyle=DASHES[style % len(DASHES)], linewidth=1.5)
        axes.plot([1], [0], marker, color=colour, markersize=4.5)
        return _inline(figure, name, None)


def _inline(figure: Figure, name: str, label: str | None) -> str:
    """The drawn figure as an element of a page: no ids but those that are referred to, and these with `name` before."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    used = sorted(set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)))
    short = {old: f"{name}-{place}" for place, old in enumerate(used)}
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{short[m[1]]}"' if m[1] in short else "", svg)
    svg = re.sub(r'(url\(#|href="#)([^")]+)', lambda m: m[1] + short[m[2]], svg)
    svg = svg.replace(_TEXT, "currentColor").replace(_LINE, "var(--line)")
    for place, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--series{place}, {colour})")
    # Tags only: the numbers on the axes are text and stay whole.
    svg = re.sub(r"<[^>]+>", lambda m: _shortened(m[0]), svg)
    svg = re.sub(r">\s+<", "><", svg)
    described = f'role="img" aria-label="{html.escape(label)}"' if label else 'aria-hidden="true"'
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f"<svg {described}", 1).replace(' version="1.1"', "", 1).strip()


def _shortened(tag: str) -> str:
    """Two decimals of a point are enough, and the page's style sheet names the fonts."""
    tag = re.sub(r"font-family: [^;\"]*; ", "", tag)
    tag = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", tag)
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag.replace(" \n", " "))
