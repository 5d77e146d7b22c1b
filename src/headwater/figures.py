"""The report's figures as inline SVG: curves over steps, forests of intervals, accuracy against what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headwater import svg

# Okabe & Ito's palette, told apart by the colour-blind, without yellow and black, which vanish on one of the pages.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")

_STROKES = {"-": "", "--": "6 3", "-.": "6 2 1.5 2", ":": "1.5 2.5"}
_TEXT, _FINE = "currentColor", "var(--line)"
_POINTS = 80

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
    style: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """An arm in a plane: what it cost, and its accuracy with its interval (fractions)."""

    label: str
    cost: float
    mean: float
    low: float
    high: float


def colour(style: int) -> str:
    place = style % len(COLOURS)
    return f"var(--series{place}, {COLOURS[place]})"


def curves(
    title: str, series: Sequence[Series], places: Sequence[str] = (), span: tuple[float, float] | None = None
) -> str:
    """A metric over steps: the mean over seeds as a line, from the lowest to the highest seed as a band.

    places  names of the steps 0, 1, …, where they are stages rather than training steps
    span    the ends of the upright axis, where several panels share it

    Returns an `<svg>` element.
    """
    width, height = 330.0, 200.0
    drawn = [(one, *_seeds(one)) for one in series]
    steps = [step for _, at, *_ in drawn for step in at]
    values = [value for _, _, _, low, high in drawn for value in (*low, *high)]
    seeds = max((len(one.lines) for one in series), default=0)
    ends = [f"{one.label} from {mean[0]:.3g} to {mean[-1]:.3g}" for one, _, mean, *_ in drawn if mean]
    over = "stages" if places else "training steps"
    label = f"{title} over {over}, {seeds} seed{'s' * (seeds != 1)}: {'; '.join(ends) or 'no step in common'}"
    if not steps:
        return svg.drawing(width, height, [svg.text(4, 10, title, size=12)], label)
    across = svg.Scale(*(svg.spanning(steps, 0.12) if places else svg.spanning(steps, 0.02)), 48, width - 8)
    up = svg.Scale(*(span or svg.spanning(values)), height - 34, 26)
    ticks = list(range(len(places))) if places else across.ticks()
    named = {step: places[int(step)] if places else svg.number(step) for step in ticks}
    parts = [svg.text(4, 10, title, size=12), *_grid(across, up, named, {v: svg.number(v) for v in up.ticks()})]
    parts += [] if places else [svg.text(width - 8, height - 9, "step", "end")]
    for one, at, _, low, high in drawn:
        if len(one.lines) > 1 and len(at) > 1:
            edge = [(across.at(s), up.at(v)) for s, v in zip(at, high, strict=True)]
            edge += [(across.at(s), up.at(v)) for s, v in zip(reversed(at), reversed(low), strict=True)]
            parts.append(svg.area(edge, colour(one.style), 0.13))
    for one, at, mean, *_ in drawn:
        way = [(across.at(s), up.at(v)) for s, v in zip(at, mean, strict=True)]
        parts.append(svg.line(way, colour(one.style), dash=_STROKES[DASHES[one.style % len(DASHES)]]))
        every = max(1, len(way) // 5)
        parts += [svg.mark(MARKERS[one.style % len(MARKERS)], x, y, colour(one.style)) for x, y in way[::every]]
    return svg.drawing(width, height, parts, label)


def _seeds(one: Series) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps that all seeds reached, at most about 80 with the last among them, and mean, lowest and highest seed there."""
    held = [dict(zip(steps, values, strict=True)) for steps, values in one.lines]
    steps = sorted(set(held[0]).intersection(*held[1:])) if held else []
    stride = -(-len(steps) // _POINTS) or 1
    steps = [step for place, step in enumerate(steps) if place % stride == 0 or place == len(steps) - 1]
    at = [[seed[step] for seed in held] for step in steps]
    return steps, [sum(v) / len(v) for v in at], [min(v) for v in at], [max(v) for v in at]


def forest(title: str, rows: Sequence[Row], reference: float | None, unit: str) -> str:
    """Estimates with intervals, one below the other, over a dashed line at `reference`. Values times 100 are shown.

    Returns an `<svg>` element.
    """
    longest = max(len(row.label) for row in rows)
    left, width = svg.LETTER * longest + 12, svg.LETTER * longest + 290
    height = 17.0 * len(rows) + 62
    values = [100 * v for row in rows for v in (row.low, row.high, *row.per_seed)]
    values += [100 * reference] if reference is not None else []
    across, top = svg.Scale(*svg.spanning(values), left, width - 10), 26.0
    floor = height - 36
    parts = [svg.text(4, 10, title, size=12), svg.text((left + width) / 2, height - 10, unit, "middle")]
    for tick in across.ticks():
        parts.append(svg.line([(across.at(tick), top), (across.at(tick), floor)], _FINE, 0.6))
        parts.append(svg.text(across.at(tick), floor + 10, svg.number(tick), "middle"))
    if reference is not None:
        parts.append(
            svg.line([(across.at(100 * reference), top), (across.at(100 * reference), floor)], _TEXT, 0.8, "4 3")
        )
    for place, row in enumerate(rows):
        y, shade = top + 8.5 + 17 * place, colour(row.style)
        parts.append(svg.text(left - 8, y, row.label, "end"))
        parts.append(svg.line([(across.at(100 * row.low), y), (across.at(100 * row.high), y)], shade, 2))
        parts += [
            svg.line([(across.at(100 * v), y - 3.5), (across.at(100 * v), y + 3.5)], _TEXT, 0.8) for v in row.per_seed
        ]
        parts.append(svg.mark(MARKERS[row.style % len(MARKERS)], across.at(100 * row.mean), y, shade, 3.2))
    said = [f"{r.label} {100 * r.mean:.1f} ({100 * r.low:.1f} to {100 * r.high:.1f})" for r in rows]
    return svg.drawing(width, height, parts, f"{title}, {unit}: {'; '.join(said)}")


def against(
    title: str,
    points: Sequence[Point],
    levels: Sequence[tuple[str, float]],
    cost: str,
    said: Callable[[float], str],
    log: bool = False,
) -> str:
    """Accuracy against what it cost: a point an arm with its interval, named at the right; `levels` are dashed lines.

    cost  the name of the axis, and `said` how a cost is written; with `log` every cost must be above zero

    Points of one cost stand beside each other, so that their intervals can be told apart. Returns an `<svg>` element.
    """
    names = max(len(name) for name in [*(one.label for one in points), *(name for name, _ in levels)])
    left, right = 40.0, 330.0
    width = right + 34 + svg.LETTER * names
    height = max(250.0, 13.0 * (len(points) + len(levels)) + 60)
    values = [100 * v for one in points for v in (one.low, one.high)] + [100 * level for _, level in levels]
    up = svg.Scale(*svg.spanning(values), height - 44, 26)
    costs = [one.cost for one in points]
    if log:
        low, high = min(costs), max(costs)
        across = svg.Scale(low / (high / low) ** 0.06 / 1.1, high * (high / low) ** 0.06 * 1.1, left, right, log=True)
    else:
        across = svg.Scale(*svg.spanning([0.0, *costs, 1e-9], 0.15), left, right)
    parts = [
        svg.text(4, 10, f"{title}, %", size=12),
        *_grid(across, up, {tick: said(tick) for tick in across.ticks()}, {v: svg.number(v) for v in up.ticks()}),
        svg.text((left + right) / 2, height - 10, cost, "middle"),
    ]
    at = [
        (across.at(one.cost) + shift, up.at(100 * one.mean)) for one, shift in zip(points, _beside(points), strict=True)
    ]
    wanted = [y for _, y in at] + [up.at(100 * level) for _, level in levels]
    names_at = svg.spread(wanted, 13, 24, height - 36)
    for place, (one, (x, y), name_y) in enumerate(zip(points, at, names_at, strict=False)):
        shade = colour(place)
        parts.append(svg.line([(x, up.at(100 * one.low)), (x, up.at(100 * one.high))], shade, 1.4))
        parts.append(svg.mark(MARKERS[place % len(MARKERS)], x, y, shade, 3.4))
        parts.append(svg.line([(x + 5, y), (right + 4, y), (right + 18, name_y)], shade, 0.6, opacity=0.55))
        parts.append(svg.mark(MARKERS[place % len(MARKERS)], right + 22, name_y, shade))
        parts.append(svg.text(right + 28, name_y, one.label))
    for (name, level), name_y in zip(levels, names_at[len(points) :], strict=True):
        y = up.at(100 * level)
        parts.append(svg.line([(left, y), (right + 4, y), (right + 18, name_y)], _TEXT, 0.8, "4 3"))
        parts.append(svg.text(right + 28, name_y, name))
    told = [f"{p.label} {100 * p.mean:.1f} ({100 * p.low:.1f} to {100 * p.high:.1f}) at {said(p.cost)}" for p in points]
    told += [f"{name} {100 * level:.1f}" for name, level in levels]
    return svg.drawing(width, height, parts, f"{title}, % ({cost}): {'; '.join(told)}")


def _beside(points: Sequence[Point]) -> list[float]:
    """How far each point is moved sideways: those of one cost stand in a row around it."""
    shifts = []
    for one in points:
        equal = [other for other in points if abs(other.cost - one.cost) <= 1e-9 * abs(one.cost)]
        place = next(rank for rank, other in enumerate(equal) if other is one)
        shifts.append(min(6.0, 60.0 / len(equal)) * (place - (len(equal) - 1) / 2))
    return shifts


def _grid(across: svg.Scale, up: svg.Scale, below: dict[float, str], beside: dict[float, str]) -> list[str]:
    """Fine lines and numbers of both axes."""
    parts = []
    for value, said in beside.items():
        parts.append(svg.line([(across.start, up.at(value)), (across.end, up.at(value))], _FINE, 0.6))
        parts.append(svg.text(across.start - 5, up.at(value), said, "end"))
    for value, said in below.items():
        parts.append(svg.line([(across.at(value), up.start), (across.at(value), up.end)], _FINE, 0.6))
        parts.append(svg.text(across.at(value), up.start + 11, said, "middle"))
    return parts


def key(style: int) -> str:
    """A small sample of a series' line and marker, for a legend in the page."""
    shade, dash = colour(style), _STROKES[DASHES[style % len(DASHES)]]
    parts = [svg.line([(0, 5), (42, 5)], shade, dash=dash), svg.mark(MARKERS[style % len(MARKERS)], 21, 5, shade)]
    return svg.drawing(42, 10, parts, None)
