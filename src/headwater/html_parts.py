"""Pieces of the report's page: escaped text, tables that scroll by themselves, framed figures."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

NUMBERS = re.compile(
    r"(accuracy|9|pass@|maj@|best|labels|checks|sampled|trained|scored|FLOPs|time|point|p$|seeds|all|dist|KL|reward|informative|overlap|entropy)"
)
"""Heads of columns of numbers, which stand to the right."""


def document(title: str, style: str, header: str, main: str) -> str:
    """A whole page that asks the network for nothing. `title` is plain text, the rest is HTML and CSS."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<style>{style}</style>
</head>
<body>
<header>
{header}
</header>
<main>
{main}
</main>
</body>
</html>
"""


def section(title: str, body: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>{body}</section>\n"


def noted(text: str) -> str:
    return f'<p class="note">{escaped(text)}</p>'


def framed(svgs: Sequence[str], caption: str, small: bool = False) -> str:
    """Figures side by side as the page's width allows; small ones four in a row."""
    if not svgs:
        return ""
    kind = "figures small" if small else "figures"
    said = f"<p class='note'>{escaped(caption)}</p>" if caption else ""
    return f'<div class="{kind}">{"".join(f"<figure>{svg}</figure>" for svg in svgs)}</div>{said}'


def table(caption: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls sideways by itself on a narrow screen, also from the keyboard."""
    kinds = [' class="number"' if NUMBERS.match(text) else "" for text in heads]
    head = "".join(f'<th scope="col"{kind}>{escaped(text)}</th>' for kind, text in zip(kinds, heads, strict=True))
    label = escaped(caption)
    return (
        f'<div class="wide" role="region" aria-label="{label}" tabindex="0"><table><caption>{label}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def td(text: str, rows: int = 1) -> str:
    kind = ' class="number"' if re.match(r"[–+−<\d]", text) else ""
    span = f' rowspan="{rows}"' if rows > 1 else ""
    return f"<td{span}{kind}>{escaped(text)}</td>"


def escaped(text: str) -> str:
    """Escaped for text and for quoted attributes; what HTML or UTF-8 cannot hold is shown as a replacement."""
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text.replace("\r\n", "\n"))
    return html.escape(text, quote=True)
