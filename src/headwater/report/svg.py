"""Drawings by matplotlib as text: an SVG file of its own, and the same as an element of a page in the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from headwater.report.html_parts import escaped

# Okabe & Ito's palette, told apart by the colour-blind, without yellow and black, which vanish on one of the pages.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
TEXT, FINE, QUIET = "#1b1f24", "#d0d7de", "#57606a"
"""Text, thin lines and what stands back, in colours that no arm has."""

STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "font.family": "sans-serif",
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": FINE,
    "grid.linewidth": 0.6,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def as_file(figure: Figure, name: str) -> str:
    """The drawing as an SVG file whose text stays text. The same values under the same name give the same bytes.

    name  different for every drawing of a page, so that no two of them share an id
    """
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"headwater {name}"}):
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return sink.getvalue()


def inline(svg: str, label: str | None) -> str:
    """A drawing's file as an element of a page: an image with a description (none is passed over), in the page's own colours."""
    body = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    head, rest = body.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns:xlink)="[^"]*"', "", head)
    # The plate behind a file of its own would be white on a dark page.
    rest = re.sub(r'<g id="patch_1">.*?</g>', "", rest, count=1, flags=re.DOTALL)
    rest = rest.replace("xlink:href", "href").replace("fill: #ffffff", "fill: none").replace(TEXT, "currentColor")
    rest = rest.replace(FINE, "var(--line)").replace(QUIET, "var(--quiet)")
    for place, colour in enumerate(COLOURS):
        rest = rest.replace(colour, f"var(--series{place}, {colour})")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', rest))
    rest = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", rest)
    # A tenth of a point is enough for places; what axes say stays as it is.
    rest = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]), rest)
    rest = re.sub(r"font-family: [^;]*; ", "", re.sub(r"font: ([\d.]+px) [^;]*;", r"font-size: \1;", rest))
    rest = re.sub(r' transform="rotate\(-0 [^"]*"', "", rest)
    rest = re.sub(r"\s*\n\s*", "\n", rest).replace("; stroke-linecap: butt", "").replace("; stroke-linejoin: miter", "")
    described = f'role="img" aria-label="{escaped(label)}"' if label else 'aria-hidden="true"'
    return f"{head} {described}>{rest}".strip()


def printable(said: str) -> str:
    """Text that XML can hold. Example: `printable("a\\0b")` is `a�b`."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in said)


def spanning(values: Sequence[float], room: float = 0.04) -> tuple[float, float]:
    """The lowest and highest value with a little room around them; never equal."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        return low - max(abs(low), 1e-6) / 2, high + max(abs(high), 1e-6) / 2
    return low - room * (high - low), high + room * (high - low)


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
