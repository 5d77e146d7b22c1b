"""A sweep as one HTML file: no script, no network; the plot inside it takes the page's colours, light or dark."""

from __future__ import annotations

from typing import Any

from headwater.report.html_parts import document, escaped, noted, section, table, td
from headwater.report.study import ARM_TEXT
from headwater.report.style import STYLE
from headwater.report.svg import inline
from headwater.report.sweep_figure import described
from headwater.report.sweep_text import BASES, cell, costs, differences, name_of, note, shown_arms
from headwater.runs.sweep import text_of

WIDE = ".sweep svg { width: 100%; height: auto; } figure.sweep { max-width: 60rem; }"


def page(found: dict[str, Any], svg: str) -> str:
    """The whole file. `svg` is the drawn plot as a file of its own; empty where nothing is there to be drawn."""
    seeds = f"seed{'s' * (len(found['seeds']) != 1)} {', '.join(map(str, found['seeds']))}"
    values = ", ".join(text_of(value) for value in found["values"])
    sections = [_plot(found, svg), _words(found), _tables(found), _costs(found), _commands(found)]
    header = f"""<h1>{escaped(found["recipe"])} by {escaped(found["vary"])}</h1>
<p class="note">{escaped(f"{found['field']} = {values}; {seeds}")}; made by headwater from the points' files</p>"""
    return document(f"headwater: {found['recipe']} by {found['vary']}", STYLE + WIDE, header, "".join(sections))


def _plot(found: dict[str, Any], svg: str) -> str:
    if not svg:
        return noted("No point has a result yet.")
    legend = "Bars: 95 % intervals over problems and seeds. Dashed and dotted: the models before training."
    arms = "; ".join(f"{arm}: {ARM_TEXT[arm]}" for arm in shown_arms(found) if arm in ARM_TEXT and arm not in BASES)
    return f'<figure class="sweep">{inline(svg, described(found))}</figure>{noted(f"{legend} {arms}.")}'


def _words(found: dict[str, Any]) -> str:
    said = "".join(f'<p class="verdict">{escaped(one)}</p>' for one in found["said"])
    return section("What the numbers say", said + noted(note(found))) if said else ""


def _tables(found: dict[str, Any]) -> str:
    parts = []
    for eval_name in found["evals"]:
        arms = shown_arms(found)
        rows = []
        for point in found["points"]:
            cells = "".join(td(cell(point, arm, eval_name)) for arm in arms)
            rows.append(f'<tr><th scope="row">{_value(found, point)}</th>{cells}</tr>')
        parts.append(table(f"Accuracy on {eval_name}, % [95 %]", [found["vary"], *arms], rows))
        lines = differences(found, eval_name)
        if lines:
            heads = [found["vary"], "a − b", "points [95 %]", "p", "a is"]
            rows = [f'<tr><th scope="row">{escaped(v)}</th>{"".join(map(td, rest))}</tr>' for v, *rest in lines]
            parts.append(table(f"Differences on {eval_name}, paired over problems and seeds", heads, rows))
    return section("Tables", "".join(parts)) if parts else ""


def _value(found: dict[str, Any], point: dict[str, Any]) -> str:
    """The value, with a link to its report, or with why it has none."""
    text = escaped(name_of(found, point["value"]))
    failed = f'<span class="warn">failed: {escaped(point["failed"])}</span>' if point["failed"] else ""
    return (f'<a href="{escaped(point["page"])}">{text}</a>' if point["page"] else text) + failed


def _costs(found: dict[str, Any]) -> str:
    arms = [arm for arm in shown_arms(found) if arm not in BASES]
    if not arms:
        return ""
    heads = [found["vary"], *(head for arm in arms for head in (f"labels, {arm}", f"FLOPs, {arm}"))]
    rows = []
    for point in found["points"]:
        cells = "".join(td(one) for arm in arms for one in costs(point, arm))
        rows.append(f'<tr><th scope="row">{escaped(name_of(found, point["value"]))}</th>{cells}</tr>')
    said = "Labels: distinct problems whose answer was looked at. Means per seed; a stage that several points share counts in each."
    return section("Costs", table("What each arm cost", heads, rows) + noted(said))


def _commands(found: dict[str, Any]) -> str:
    lines = [found["command"], "", *(point["command"] for point in found["points"])]
    said = "The whole sweep, and each point alone, in the same folder. Run again, each goes on where it stopped."
    return section("Commands", noted(said) + f"<pre>{escaped(chr(10).join(lines))}</pre>")
