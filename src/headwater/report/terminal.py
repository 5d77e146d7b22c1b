"""Print the report as rich tables for a terminal; a narrow one gets more tables with fewer columns each."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from headwater.report.contrasts import flops_ratio, group_by_equality, interval_note, named_contrasts, reading
from headwater.report.figures import Interval
from headwater.report.format import (
    accuracy_text,
    count,
    duration,
    non_training_notes,
    percent,
    plain_table,
    points,
    seeds_text,
    units,
)
from headwater.report.html_contrasts import LABELS, PAIR, P
from headwater.report.stages import accuracy_and_best, accuracy_paths, largest_k
from headwater.report.verdict import failure_state, failure_word
from headwater.report.view import Cell, Column, RowHeader, Table

LONG_NAME = 14
"""If an arm's name is longer, accuracies and costs go into separate tables."""
WIDE = 100
"""Columns of a terminal from which accuracies and costs of an arm fit into one line."""


def terminal_table(report: dict[str, Any], width: int = WIDE) -> Group:
    """All tables of the report, then the warnings and the verdict, for a terminal of this many columns."""
    wide = width >= WIDE
    parts: list[RichTable | Text] = [*_arms_tables(report, wide), *map(rich_table, _path_tables(report))]
    parts += [*_contrast_tables(report, wide), *map(rich_table, _predictions(report))]
    parts += [Text(_warning(row)) for row in report["warnings"]]
    parts.append(Text(report["verdict"]))
    return Group(*[item for part in parts for item in (part, Text(""))])


def _path_tables(report: dict[str, Any]) -> list[Table]:
    """Accuracies of each trained arm's teacher and student over the stages, a table per evaluation."""
    columns = [
        Column(title, itemgetter(index), nowrap=index == 0) for index, title in enumerate(("arm", "teacher", "student"))
    ]
    tables = [
        Table(f"accuracy on {name} before, between and after the stages, %", columns, accuracy_paths(report, name))
        for name in report["evals"]
    ]
    return [table for table in tables if table.rows]


def _warning(row: dict[str, Any]) -> str:
    """Example: `warning: opd, step 40, seed 0 (bridge): truncation: 0.62 of the completions …`."""
    where = f"{row['stage']}, step {row['step']}, seed {row['seed']} ({', '.join(row['arms'])})"
    return f"warning: {where}: {row['sentence']}"


def _arms_tables(report: dict[str, Any], wide: bool) -> list[RichTable]:
    """One table if it fits; else tables of two or three evaluations each, and one of the costs."""
    title = f"{report['recipe']} · {seeds_text(report)}"
    evals: list[str] = report["evals"]
    short = max(map(len, report["arms"])) <= LONG_NAME
    if len(evals) <= 1 and short and wide:
        return [_arms_table(report, f"{title}{''.join(f' · accuracy on {name}, %' for name in evals)}", evals, True)]
    width = 3 if short else 2
    chunks = [evals[start : start + width] for start in range(0, len(evals), width)]
    scores = [_arms_table(report, f"{title} · accuracy on {', '.join(chunk)}, %", chunk, False) for chunk in chunks]
    return [*scores, _arms_table(report, "costs", [], True)]


def _arms_table(report: dict[str, Any], title: str, evals: Sequence[str], costs: bool) -> RichTable:
    table = plain_table(title)
    table.add_column("arm", no_wrap=True)
    k = largest_k(report)
    several = k != "1"
    for name in evals:
        table.add_column("accuracy [95 %]" if len(evals) == 1 else name, justify="right", no_wrap=True)
        if several:
            table.add_column(f"pass@{k}", justify="right", no_wrap=True)
    for head in ("labels", "checks", "sampled", "trained", "scored", "FLOPs", "time") if costs else ():
        table.add_column(head, justify="right", no_wrap=True)
    for name, arm in report["arms"].items():
        scores = [cell for eval_name in evals for cell in _score_cells(arm, eval_name)[: 1 + several]]
        table.add_row(name, *scores, *(_cost_cells(arm) if costs else []), style=None if arm["accuracy"] else "dim")
    if costs:
        note = "labels, checks (answers graded), tokens (sampled, trained on, scored by the teacher), FLOPs, time: mean per seed"
        table.caption = "\n".join([note, *non_training_notes(report), *_unfinished_notes(report)])
    return table


def _unfinished_notes(report: dict[str, Any]) -> list[str]:
    notes = []
    for name, arm in report["arms"].items():
        for seed, failure in arm["failed"].items():
            why = f"{failure['stage']} {failure_word(failure).lower()}: {failure['sentence']}"
            notes.append(f"{name}: {failure_state(failure)} on seed {seed} ({why})")
        notes += [f"{name}: not finished on seed {seed} (waits for {node})" for seed, node in arm["unfinished"].items()]
    return notes


def _score_cells(arm: dict[str, Any], eval_name: str) -> list[str]:
    measured = accuracy_and_best(arm, eval_name)
    if measured is None:
        states = {failure_state(failure) for failure in arm["failed"].values()}
        return [min(states) if states else "unfinished" if arm["unfinished"] else "–", "–"]
    return [accuracy_text(arm["accuracy"][eval_name]), percent(measured["best_of_k"])]


def _cost_cells(arm: dict[str, Any]) -> list[str]:
    tokens = [units(arm["tokens"][key]) for key in ("sampled", "trained", "teacher_scored")]
    flops, seconds = f"{units(arm['flops'])}F", duration(arm["seconds"])
    cells = [count(arm["labels"]["distinct"]), units(arm["labels"]["checks"]), *tokens, flops, seconds]
    return ["–" if cell in ("0", "0F", "0 s") else cell for cell in cells]


def _contrast_tables(report: dict[str, Any], wide: bool) -> list[RichTable]:
    columns = [
        PAIR,
        Column("difference [95 %]", interval_text, "right", nowrap=True),
        P,
        # In a narrow terminal, the titles of the groups say whether labels and compute are equal.
        *([LABELS, Column("FLOPs a/b", flops_ratio, "right", nowrap=True)] if wide else []),
        Column("a above b", reading, nowrap=True),
    ]
    tables = []
    for eval_name in report["evals"]:
        groups = group_by_equality([c for c in named_contrasts(report) if c["eval"] == eval_name])
        where = f" on {eval_name}" if len(report["evals"]) > 1 else ""
        rows = [row for title, contrasts in groups for row in (title.lower(), *contrasts)]
        table = rich_table(Table(f"differences{where} in points, 95 % interval, two-sided p", columns, rows))
        table.caption = (
            f"{interval_note(report)}; holds: the interval is above zero and p < 0.05; equal compute: the smaller is at "
            "least 90 % of the larger"
        )
        tables += [table] if rows else []
    return tables


def interval_text(c: dict[str, Any]) -> str:
    """Example: `+6.0 [ +1.0, +11.2]`."""
    return f"{points(c['difference'])} [{points(c['low']):>5}, {points(c['high']):>5}]"


def _predictions(report: dict[str, Any]) -> list[Table]:
    rows = [row for row in report["predictions"] if row["reading"] != "not measured"]
    shown = ("name", "eval", "claim", "reading") if len(report["evals"]) > 1 else ("name", "claim", "reading")
    columns = [Column(key.removeprefix("name"), itemgetter(key), nowrap=key != "claim") for key in shown]
    return [Table("the paper's predictions", columns, rows)] if rows else []


def rich_table(table: Table) -> RichTable:
    """A table of the page for a terminal, without its plots and links."""
    rich, columns = plain_table(table.caption), [column for column in table.columns if column.axis is None]
    for column in columns:
        rich.add_column(Text(column.title), justify=column.align, no_wrap=column.nowrap, overflow="fold")
    for row in table.rows:
        if isinstance(row, str):
            rich.add_section()
            rich.add_row(Text(row, style="italic"))
        else:
            rich.add_row(*(Text(_cell_text(column.cell(row))) for column in columns))
    return rich


def _cell_text(cell: Cell) -> str:
    match cell:
        case None | Interval():
            return "–"
        case str():
            return cell
        case RowHeader():
            return cell.text
    return "; ".join(cell)
