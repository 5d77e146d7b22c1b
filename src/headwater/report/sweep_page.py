"""A sweep as one HTML file without script or network access, rendered from templates/sweep.html.j2."""

from __future__ import annotations

from typing import Any

from headwater.report.read import ARM_TEXT
from headwater.report.render import render
from headwater.report.svg import inline
from headwater.report.sweep_figure import described
from headwater.report.sweep_text import BASES, cell, costs, differences, name_of, note, shown_arms
from headwater.report.view import RowHeader, Table, number_columns, text_columns
from headwater.runs.sweep import text_of


def page(found: dict[str, Any], svg: str) -> str:
    """Render the page. `svg` is the drawn plot as a stand-alone file; empty if there is nothing to draw."""
    seeds = f"seed{'s' * (len(found['seeds']) != 1)} {', '.join(map(str, found['seeds']))}"
    arms = [arm for arm in shown_arms(found) if arm not in BASES]
    values = {
        "sweep": found,
        "settings": f"{found['field']} = {', '.join(text_of(value) for value in found['values'])}; {seeds}",
        "plot": inline(svg, described(found)) if svg else "",
        "arms": "; ".join(f"{arm}: {ARM_TEXT[arm]}" for arm in arms if arm in ARM_TEXT),
        "note": note(found),
        "tables": [table for eval_name in found["evals"] for table in _tables(found, eval_name)],
        "costs": _costs(found, arms) if arms else None,
        "commands": "\n".join([found["command"], "", *(point["command"] for point in found["points"])]),
    }
    return render("sweep.html.j2", values)


def _tables(found: dict[str, Any], eval_name: str) -> list[Table]:
    """Accuracy by value and arm, and the differences between arms."""
    arms = shown_arms(found)
    rows = []
    for point in found["points"]:
        failed = (f"failed: {point['failed']}",) if point["failed"] else ()
        header = RowHeader(name_of(found, point["value"]), warnings=failed, href=point["page"])
        rows.append([header, *(cell(point, arm, eval_name) for arm in arms)])
    tables = [Table(f"Accuracy on {eval_name}, % [95 %]", [*text_columns(found["vary"]), *number_columns(*arms)], rows)]
    lines = differences(found, eval_name)
    if lines:
        columns = [*text_columns(found["vary"], "a − b"), *number_columns("points [95 %]", "p"), *text_columns("a is")]
        tables.append(Table(f"Differences on {eval_name}, paired over problems and seeds", columns, lines))
    return tables


def _costs(found: dict[str, Any], arms: list[str]) -> Table:
    columns = number_columns(*(title for arm in arms for title in (f"labels, {arm}", f"FLOPs, {arm}")))
    rows = [
        [name_of(found, point["value"]), *(text for arm in arms for text in costs(point, arm))]
        for point in found["points"]
    ]
    return Table("What each arm cost", [*text_columns(found["vary"]), *columns], rows)
