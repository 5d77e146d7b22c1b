"""Matplotlib figures as SVG: a stand-alone file, and an inline element that follows the page's colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from headwater.report.render import clean

# Okabe and Ito's colour-blind-safe palette, without yellow and black, which are invisible on the light or the dark page.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
TEXT, FINE, QUIET = "#1b1f24", "#d0d7de", "#57606a"
"""Colours of text, grid lines and secondary text. No arm has one of them: `inline` replaces them by the page's colours."""

PART = "part-"
"""Prefix of the id of a part of a figure. On the page the rest of the id is the part's class, for the page's script."""

STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "font.family": "sans-serif",
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": FINE,
    **dict.fromkeys(("axes.linewidth", "grid.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
}


def as_file(figure: Figure, name: str) -> str:
    """The figure as an SVG file with text kept as text. The same values under the same name give the same bytes.

    name  unique among the figures of a page, because the ids in the file are derived from it
    """
    sink = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({**STYLE, "svg.hashsalt": f"headwater {name}"}):
        warnings.simplefilter("ignore", UserWarning)  # of characters that the font lacks: it would print them
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return sink.getvalue()


def inline(svg: str, description: str) -> Markup:
    """Turn an SVG file into an element of a page in the page's colours, with a description for screen readers."""
    body = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    head, rest = body.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns:xlink)="[^"]*"', "", head)
    # The background of the stand-alone file would be white on a dark page.
    rest = re.sub(r'<g id="patch_1">.*?</g>', "", rest, count=1, flags=re.DOTALL)
    rest = rest.replace("xlink:href", "href").replace("fill: #ffffff", "fill: none").replace(TEXT, "currentColor")
    rest = rest.replace(FINE, "var(--line)").replace(QUIET, "var(--quiet)")
    for place, colour in enumerate(COLOURS):
        rest = rest.replace(colour, f"var(--series{place}, {colour})")
    rest = re.sub(rf' id="{PART}(\w+)"', r' class="\1"', rest)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', rest))
    rest = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", rest)
    # Round coordinates to a tenth of a point; axis labels are text, not tags, and keep their digits.
    rest = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]), rest)
    rest = re.sub(r"font-family: [^;]*; ", "", re.sub(r"font: ([\d.]+px) [^;]*;", r"font-size: \1;", rest))
    rest = re.sub(r' transform="rotate\(-0 [^"]*"', "", rest)
    rest = re.sub(r"\s*\n\s*", "\n", rest).replace("; stroke-linecap: butt", "").replace("; stroke-linejoin: miter", "")
    return Markup(f'{head} role="img" aria-label="{escape(clean(description))}">{rest}'.strip())


def printable(text: str) -> str:
    """Replace characters that XML cannot hold. Example: `printable("a\\0b")` is `a�b`."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def spanning(values: Sequence[float], room: float = 0.04) -> tuple[float, float]:
    """Limits of an axis: the range of the values with a margin of `room` on both sides; never equal."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        return low - max(abs(low), 1e-6) / 2, high + max(abs(high), 1e-6) / 2
    return low - room * (high - low), high + room * (high - low)
