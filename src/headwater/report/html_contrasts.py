"""Sections of the page about differences between arms: the paper's predictions and the comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

from headwater.report import figures
from headwater.report.contrasts import (
    group_by_equality,
    interval_note,
    named_contrasts,
    reading,
)
from headwater.report.figures import Interval, Plot
from headwater.report.format import count, p_text, points, units
from headwater.report.view import Column, RowHeader, Section, Table, interval_axis

MARKS = {"holds": "▲", "does not hold": "▼", "undecided": "○", "not measured": "–"}


def chips(report: dict[str, Any]) -> list[dict[str, str]]:
    """Name and reading of each prediction on the first evaluation, for the top of the page."""
    first = report["evals"][:1]
    return [
        {"mark": MARKS[row["reading"]], "name": row["name"], "reading": row["reading"]}
        for row in report["predictions"]
        if row["reading"] != "not measured" and [row["eval"]] == first
    ]


def predictions(report: dict[str, Any]) -> Section | None:
    """The paper's three predictions: the rule for each, its reading, and the numbers behind it."""
    if all(row["reading"] == "not measured" for row in report["predictions"]):
        return None
    columns = [
        Column("prediction", lambda row: RowHeader(row["name"], (row["claim"], row["rule"]))),
        *_evaluation(report),
        Column("reading", lambda row: f"{MARKS[row['reading']]} {row['reading']}", nowrap=True),
        Column("why", lambda row: row["why"].split("; ")),
    ]
    table = Table("P1 to P3", columns, report["predictions"], cards=True)
    return Section("The paper's predictions", "predictions", {"table": table})


def _evaluation(report: dict[str, Any]) -> list[Column]:
    """The column of the evaluation's name, if there are several."""
    return [Column("evaluation", itemgetter("eval"))] if len(report["evals"]) > 1 else []


def comparisons(report: dict[str, Any]) -> Section | None:
    """The named contrasts, grouped by whether labels, compute or both are equal; all others in a folded table."""
    if not report["contrasts"]:
        return None
    named = named_contrasts(report)
    others = [contrast for contrast in report["contrasts"] if contrast not in named]
    rows = [row for title, contrasts in group_by_equality(named) for row in (title, *contrasts)]
    table = Table("Differences of accuracy, grouped by what is equal", _columns(report, named), rows)
    folded = Table("Every arm against the untrained student", _columns(report, others), others)
    view = {"table": table, "folded": folded if others else None, "interval_note": interval_note(report)}
    return Section("Comparisons", "comparisons", view, tuple(forests(report, named, "contrasts", "Differences")))


def _columns(report: dict[str, Any], contrasts: Sequence[dict[str, Any]]) -> list[Column]:
    axis = interval_axis(contrasts, points)
    return [
        Column("a − b", lambda c: f"{c['a']} − {c['b']}"),
        *_evaluation(report),
        Column("a better than b", lambda c: f"{MARKS[reading(c)]} {reading(c)}", nowrap=True),
        Column("points", lambda c: points(c["difference"]), "right"),
        Column("95 %", lambda c: f"{points(c['low'])} to {points(c['high'])}", "right"),
        Column("", lambda c: Interval(c["difference"], c["low"], c["high"], 0.0), axis=axis),
        Column("p", lambda c: p_text(c["p"]), "right"),
        Column("labels a / b", lambda c: f"{count(c['labels']['a'])} / {count(c['labels']['b'])}", "right"),
        Column("FLOPs a / b", lambda c: f"{units(c['flops']['a'])} / {units(c['flops']['b'])}", "right"),
        Column("seeds × problems", lambda c: f"{c['seeds']} × {c['problems']}", "right"),
    ]


def forests(report: dict[str, Any], named: Sequence[dict[str, Any]], stem: str, title: str) -> Iterator[Plot]:
    """A forest plot of the differences per evaluation, for figures/ only: the page shows the same in its tables."""
    for eval_name in report["evals"]:
        rows = [
            (f"{c['a']} − {c['b']}", Interval(c["difference"], c["low"], c["high"], 0.0))
            for _, contrasts in group_by_equality(named)
            for c in contrasts
            if c["eval"] == eval_name
        ]
        if rows:
            yield figures.forest(
                figures.file_stem(stem, eval_name), f"{title} on {eval_name}", rows, "percentage points"
            )
