"""A drawing as text: SVG elements for the report's page, and the scales that place values on them.

Lengths are the drawing's own units; a page shows about one pixel for each. Colours are the page's: text takes
`currentColor`, fine lines `--line`, data `--series0`, …, so that the style sheet decides light or dark. There are no ids,
so drawings never clash, and the same values give the same bytes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

FONT = 11.0
LETTER = 0.56 * FONT
"""About the width of a letter; a little more than a common sans-serif takes."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` on the way from `start` to `end` of the drawing, by their logarithm where `log`.

    Example: `Scale(0, 10, 100, 200).at(5)` is 150; `Scale(1, 100, 0, 10, log=True).at(10)` is 5.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        found = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, most)
        return [value for value in found if self.low <= value <= self.high]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`.

    Example: `ticks(0, 0.7)` is `[0.0, 0.2, 0.4, 0.6]`.
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{place * step:.10g}") for place in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between `low` and `high`; over two powers and more, these alone.

    Example: `log_ticks(3, 60)` is `[5.0, 10.0, 20.0, 50.0]`.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) >= 2
    values = [m * 10.0**power for power in powers for m in ((1,) if wide else (1, 2, 5))]
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def spanning(values: Sequence[float], room: float = 0.04) -> tuple[float, float]:
    """The lowest and highest value with a little room around them; never equal."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        return low - max(abs(low), 1e-6) / 2, high + max(abs(high), 1e-6) / 2
    return low - room * (high - low), high + room * (high - low)


def number(value: float) -> str:
    """A number on an axis. Example: `number(-0.25)` is `−0.25`."""
    return f"{value:.4g}".replace("-", "−")


def line(points: Points, colour: str, width: float = 1.5, dash: str = "", opacity: float = 1.0) -> str:
    style = f' stroke-dasharray="{dash}"' if dash else ""
    faint = f' opacity="{opacity:g}"' if opacity < 1.0 else ""
    return f'<polyline points="{_pairs(points)}" fill="none" stroke="{colour}" stroke-width="{width:g}"{style}{faint}/>'


def area(points: Points, colour: str, opacity: float) -> str:
    return f'<polygon points="{_pairs(points)}" fill="{colour}" opacity="{opacity:g}"/>'


MARKS = {
    "s": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "^": ((0, -1.25), (1.15, 0.9), (-1.15, 0.9)),
    "v": ((0, 1.25), (1.15, -0.9), (-1.15, -0.9)),
    "D": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "P": ((-0.45, -1.2), (0.45, -1.2), (0.45, -0.45), (1.2, -0.45), (1.2, 0.45), (0.45, 0.45), (0.45, 1.2),
          (-0.45, 1.2), (-0.45, 0.45), (-1.2, 0.45), (-1.2, -0.45), (-0.45, -0.45)),
    "X": ((-1.1, -1.1), (0, -0.45), (1.1, -1.1), (0.45, 0), (1.1, 1.1), (0, 0.45), (-1.1, 1.1), (-0.45, 0)),
}  # fmt: skip
"""Corners of the marks that are no circle, in units of their size."""


def mark(kind: str, x: float, y: float, colour: str, size: float = 2.8) -> str:
    if kind not in MARKS:
        return f'<circle cx="{_short(x)}" cy="{_short(y)}" r="{_short(size)}" fill="{colour}"/>'
    corners = [(x + size * dx, y + size * dy) for dx, dy in MARKS[kind]]
    return f'<polygon points="{_pairs(corners)}" fill="{colour}"/>'


def text(x: float, y: float, said: str, anchor: str = "start", size: float = FONT, colour: str = "") -> str:
    """A line of text whose middle is at height `y`; `anchor` is start, middle or end."""
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    small = "" if size == FONT else f' font-size="{size:g}"'
    fill = f' fill="{colour}"' if colour else ""
    return f'<text x="{_short(x)}" y="{_short(y + 0.35 * size)}"{where}{small}{fill}>{_safe(said)}</text>'


def drawing(width: float, height: float, parts: Sequence[str], label: str | None) -> str:
    """The `<svg>` element: an image with a description, or one that screen readers pass over."""
    described = f'role="img" aria-label="{_safe(label)}"' if label else 'aria-hidden="true"'
    return (
        f'<svg {described} xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_short(width)} {_short(height)}" '
        f'font-size="{FONT:g}" fill="currentColor">{"".join(parts)}</svg>'
    )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels, in the order of `wanted`: as near to these as fits with `gap` between them and in the bounds.

    Example: `spread([10, 11, 50], 4, 0, 100)` is `[8.5, 12.5, 50]`.
    """
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    # Neighbours that would touch become one block around the mean of what they want; blocks that touch are joined.
    blocks: list[list[int]] = []
    middles: list[float] = []
    for place in order:
        block, middle = [place], min(max(wanted[place], low), high)
        while blocks and middle - gap * (len(block) - 1) / 2 < middles[-1] + gap * (len(blocks[-1]) + 1) / 2:
            block = [*blocks.pop(), *block]
            middles.pop()
            middle = sum(wanted[one] for one in block) / len(block)
        half = gap * (len(block) - 1) / 2
        blocks.append(block)
        middles.append(max(min(middle, high - half), low + half))
    found = list(wanted)
    for block, middle in zip(blocks, middles, strict=True):
        for rank, place in enumerate(block):
            found[place] = middle + gap * (rank - (len(block) - 1) / 2)
    return found


def _pairs(points: Points) -> str:
    return " ".join(f"{_short(x)},{_short(y)}" for x, y in points)


def _short(value: float) -> str:
    """A tenth of a pixel is enough."""
    said = f"{value:.1f}"
    return said[:-2] if said.endswith(".0") else said


def _safe(said: str) -> str:
    return html.escape("".join(c if c.isprintable() else "\ufffd" for c in said), quote=True)
