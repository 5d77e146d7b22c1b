"""Write a sweep's files, with the plot, the tables and the sentences as one HTML page without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwater.config.arms import DESCRIPTIONS
from headwater.report import sweep_plot
from headwater.report.html_parts import document, escaped, noted, section, table, td
from headwater.report.style import STYLE
from headwater.report.svg import inline
from headwater.report.sweep import (
    BASES,
    Table,
    as_csv,
    build,
    cost_table,
    names,
    note,
    seeds_text,
    shown_arms,
    tables,
)
from headwater.runs.sweep import Sweep, text_of
from headwater.storage.run_dir import write_atomic, write_json

WIDE = ".sweep svg { width: 100%; height: auto; } figure.sweep { max-width: 60rem; }"


def write(sweep: Sweep, out: Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """Write sweep.json, sweep.csv, sweep.svg, sweep.png and sweep.html into `out`. Returns the contents of sweep.json.

    failed  folder name of a point -> its error message
    """
    summary = build(sweep, out, failed)
    write_json(out / "sweep.json", summary)
    write_atomic(out / "sweep.csv", as_csv(summary))
    svg = ""
    if summary["evals"]:
        svg, png = sweep_plot.draw(summary)
        write_atomic(out / "sweep.svg", svg)
        write_atomic(out / "sweep.png", png)
    write_atomic(out / "sweep.html", page(summary, svg))
    return summary


def page(summary: dict[str, Any], svg: str) -> str:
    """The page. `svg` is the plot as an SVG file; empty where no point has a result."""
    title = f"{summary['recipe']} by {summary['vary']}"
    values = ", ".join(text_of(value) for value in summary["values"])
    field = summary["field"]
    header = f"<h1>{escaped(title)}</h1>{noted(f'{field} = {values}; {seeds_text(summary)}')}"
    arms = [arm for arm in shown_arms(summary) if arm not in BASES]
    if svg:
        legend = "Bars: 95 % intervals over problems and seeds. Dashed and dotted: the models before training. "
        legend += "; ".join(f"{arm}: {DESCRIPTIONS[arm]}" for arm in arms if arm in DESCRIPTIONS)
        plot = f'<figure class="sweep">{inline(svg, sweep_plot.description(summary))}</figure>{noted(f"{legend}.")}'
    else:
        plot = noted("No point has a result yet.")
    verdicts = "".join(f'<p class="verdict">{escaped(sentence)}</p>' for sentence in summary["said"])
    commands = "\n".join([summary["command"], "", *(point["command"] for point in summary["points"])])
    how = "The whole sweep, and each point alone, in the same folder. Run again, each resumes where it stopped."
    texts = names(summary["values"])
    links = {text: _link(text, point) for text, point in zip(texts, summary["points"], strict=True)}
    sections = [
        plot,
        section("What the numbers say", verdicts + noted(note(summary))) if verdicts else "",
        section("Tables", "".join(_table(one, links) for one in tables(summary))) if svg else "",
        section("Costs", _table(cost_table(summary), {})) if arms else "",
        section("Commands", f"{noted(how)}<pre>{escaped(commands)}</pre>"),
    ]
    return document(f"headwater: {title}", STYLE + WIDE, header, "".join(sections))


def _link(value: str, point: dict[str, Any]) -> str:
    """The value as a link to its report, with the error of a failed point."""
    link = f'<a href="{escaped(point["page"])}">{escaped(value)}</a>' if point["page"] else escaped(value)
    return link + (f'<span class="warn">failed: {escaped(point["failed"])}</span>' if point["failed"] else "")


def _table(data: Table, links: Mapping[str, str]) -> str:
    rows = [
        f'<tr><th scope="row">{links.get(first, escaped(first))}</th>{"".join(map(td, rest))}</tr>'
        for first, *rest in data.rows
    ]
    return table(data.title, data.heads, rows) + (noted(data.caption) if data.caption else "")
