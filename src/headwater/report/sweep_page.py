"""Write a sweep's files, with the plot, the tables and the sentences as one HTML page without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headwater.config.arms import BASE_MODELS, DESCRIPTIONS
from headwater.report import sweep_plot
from headwater.report.render import render
from headwater.report.svg import inline
from headwater.report.sweep import as_csv, build, cost_table, names, note, seeds_text, shown_arms, tables
from headwater.report.view import RowHeader, Table
from headwater.runs.sweep import Sweep, text_of
from headwater.storage.run_dir import write_atomic, write_json


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
    arms = [arm for arm in shown_arms(summary) if arm not in BASE_MODELS]
    texts = names(summary["values"])
    headers = {text: _header(text, point) for text, point in zip(texts, summary["points"], strict=True)}

    def linked(table: Table) -> Table:
        return replace(table, rows=[[headers[first], *rest] for first, *rest in table.rows])

    values = {
        "summary": summary,
        "settings": f"{summary['field']} = {', '.join(map(text_of, summary['values']))}; {seeds_text(summary)}",
        "plot": inline(svg, sweep_plot.description(summary)) if svg else None,
        "arms": "; ".join(f"{arm}: {DESCRIPTIONS[arm]}" for arm in arms if arm in DESCRIPTIONS),
        "note": note(summary),
        "tables": [linked(table) for table in tables(summary)],
        "costs": [cost_table(summary)] if arms else [],
        "commands": "\n".join([summary["command"], "", *(point["command"] for point in summary["points"])]),
    }
    return render("sweep.html.j2", values)


def _header(value: str, point: dict[str, Any]) -> RowHeader:
    """The value as a link to its report, with the error of a failed point."""
    errors = (f"failed: {point['failed']}",) if point["failed"] else ()
    return RowHeader(value, warnings=errors, href=point["page"])
