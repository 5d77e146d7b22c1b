"""Pieces of the report's page: escaped text, tables that scroll by themselves, framed figures, intervals within a table."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from typing import Any

NUMBERS = re.compile(
    r"(accuracy|9|pass@|maj@|best|labels|checks|sampled|trained|scored|FLOPs|time|point|p$|seeds|all|dist|KL|reward|informative|overlap|entropy)"
)
"""Heads of columns of numbers, which stand to the right."""


SENTENCE = re.compile(r"[^\W\d]{4}")
"""A word, as units and signs are none: what holds one is no number, however it begins."""


def document(title: str, style: str, header: str, main: str, script: str = "", after: str = "") -> str:
    """A whole page that asks the network for nothing. `title` is plain text, `script` our own code, the rest HTML and CSS.

    The page's Content-Security-Policy names the script by its hash, so nothing else in the page can run, whatever it holds.
    """
    may_run = f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'; "
    policy = f"default-src 'none'; {may_run if script else ''}style-src 'unsafe-inline'; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<style>{style}</style>
</head>
<body>
<header>
{header}
</header>
<main id="main">
{main}
</main>
{after}{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def data_element(name: str, value: Any) -> str:
    """A value for the page's script, as JSON in which nothing can end the element or begin another."""
    said = json.dumps(value, separators=(",", ":"))
    for letter in "<>&":
        said = said.replace(letter, f"\\u{ord(letter):04x}")
    return f'<script type="application/json" id="{name}">{said}</script>\n'


def anchor(title: str) -> str:
    """The id of a section. Example: `anchor("The paper's predictions")` is `the-paper-s-predictions`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def section(title: str, body: str) -> str:
    name = anchor(title)
    return f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escaped(title)}</h2>{body}</section>\n'


def noted(text: str) -> str:
    return f'<p class="note">{escaped(text)}</p>'


def framed(svgs: Sequence[str], caption: str, kind: str = "") -> str:
    """Figures side by side as the page's width allows.

    kind  `pair` for two that are wide (one below the other and scrolled sideways on a phone), `large` for one that is
    """
    if not svgs:
        return ""
    said = f"<p class='note'>{escaped(caption)}</p>" if caption else ""
    held = "".join(f"<figure>{svg}</figure>" for svg in svgs)
    if kind:
        return f'<div class="wide {kind}" role="region" aria-label="{_region(caption)}" tabindex="0">{held}</div>{said}'
    return f'<div class="figures">{held}</div>{said}'


def _region(caption: str) -> str:
    """The name of a region that scrolls. Example: `_region("Of the student. All seeds.")` is `figures: Of the student`."""
    return escaped(f"figures: {caption.split('.')[0]}" if caption else "figures")


def table(caption: str, heads: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """A table that scrolls sideways by itself on a narrow screen, also from the keyboard.

    kind  `told` where cells hold sentences: on a phone they then stand below each other
    """
    head = "".join(map(_head, heads))
    label = escaped(caption)
    return (
        f'<div class="wide {kind}" role="region" aria-label="{label}" tabindex="0"><table><caption>{label}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


AXIS = "\t"
"""Begins the head of a column of `interval`s and parts the two ends of its axis."""


def _head(text: str) -> str:
    if text.startswith(AXIS):
        low, high = text.split(AXIS)[1:]
        return f'<th scope="col" class="axis"><span><b>{escaped(low)}</b><b>{escaped(high)}</b></span></th>'
    kind = ' class="number"' if NUMBERS.match(text) else ""
    return f'<th scope="col"{kind}>{escaped(text)}</th>'


def td(text: str, rows: int = 1) -> str:
    kind = ' class="number"' if re.match(r"[–+−<\d]", text) and not SENTENCE.search(text) else ""
    span = f' rowspan="{rows}"' if rows > 1 else ""
    return f"<td{span}{kind}>{escaped(text)}</td>"


def interval(
    mean: float, low: float, high: float, ends: tuple[float, float], level: float | None, seeds: Sequence[float] = ()
) -> str:
    """A cell with an interval drawn from `ends[0]` to `ends[1]`: one row of a forest plot that stands in the table itself.

    level  where the line to compare with stands; the numbers themselves are in the cells beside, so screen readers pass over it
    """

    def at(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, (value - ends[0]) / ((ends[1] - ends[0]) or 1.0))):.1f}%"

    parts = [] if level is None else [f'<i class="level" style="left:{at(level)}"></i>']
    parts.append(f'<i class="bar" style="left:{at(low)};right:calc(100% - {at(high)})"></i>')
    parts += [f'<i class="seed" style="left:{at(seed)}"></i>' for seed in seeds]
    parts.append(f'<i class="mean" style="left:{at(mean)}"></i>')
    return f'<td class="forest" aria-hidden="true"><span>{"".join(parts)}</span></td>'


def clean(text: str) -> str:
    """What HTML or UTF-8 cannot hold is shown as a replacement."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text.replace("\r\n", "\n"))


def escaped(text: str) -> str:
    """Escaped for text and for quoted attributes, and `clean`."""
    return html.escape(clean(text), quote=True)
