"""Sections of the page about differences between arms: the paper's predictions, published ideas, and the comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

from headwater.config.arms import ARMS
from headwater.config.follow_up_arms import FOLLOW_UPS
from headwater.report import figures
from headwater.report.contrasts import (
    flops_ratio,
    group_by_equality,
    interval_note,
    named_contrasts,
    pair_text,
    reading,
)
from headwater.report.figures import Interval, Plot
from headwater.report.format import count, p_text, points, units
from headwater.report.view import Column, RowHeader, Section, Table, evaluation_column, interval_axis

MARKS = {"holds": "▲", "does not hold": "▼", "undecided": "○", "not measured": "–"}
BASES = ("bridge", "bridge_rl")
"""Arms that follow-ups change."""


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
        *evaluation_column(report["evals"]),
        Column("reading", lambda row: f"{MARKS[row['reading']]} {row['reading']}", nowrap=True),
        Column("why", lambda row: row["why"].split("; ")),
    ]
    table = Table("P1 to P3", columns, report["predictions"], cards=True)
    return Section("The paper's predictions", "predictions", {"table": table})


def idea_contrasts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Contrasts of follow-up arms with the arm that they change, idea minus base, the largest difference first."""
    rows = [row for row in report["contrasts"] if row["a"] in FOLLOW_UPS and row["b"] in BASES]
    return sorted(rows, key=itemgetter("difference"), reverse=True)


def ideas(report: dict[str, Any]) -> Section | None:
    """What each published follow-up brings over the arm that it changes, grouped by whether labels and compute are equal."""
    contrasts = idea_contrasts(report)
    if not contrasts:
        return None
    columns = [
        Column("idea", lambda c: RowHeader(c["a"], (ARMS[c["a"]].description, ARMS[c["a"]].source or "this project"))),
        *evaluation_column(report["evals"]),
        _reading_column("better"),
        *difference_columns(contrasts),
        Column("over", itemgetter("b")),
        Column("FLOPs", flops_ratio, "right"),
    ]
    table = Table("Accuracy of each idea minus that of the arm it changes", columns, _grouped(contrasts))
    view = {"table": table, "interval_note": interval_note(report)}
    title = "What each idea bought"
    return Section(title, "ideas", view, tuple(_forests(report, contrasts, "ideas", title)))


def comparisons(report: dict[str, Any]) -> Section | None:
    """The named contrasts, grouped by whether labels, compute or both are equal; all others in a folded table."""
    if not report["contrasts"]:
        return None
    named = named_contrasts(report)
    others = [contrast for contrast in report["contrasts"] if contrast not in named]
    table = Table("Differences of accuracy, grouped by what is equal", _columns(report, named), _grouped(named))
    folded = Table("Every arm against the untrained student", _columns(report, others), others)
    view = {"table": table, "folded": folded if others else None, "interval_note": interval_note(report)}
    return Section("Comparisons", "comparisons", view, tuple(_forests(report, named, "contrasts", "Differences")))


# Columns and figures of contrasts -------------------------------------------------------------------------------------

PAIR = Column("a − b", pair_text, nowrap=True)
P = Column("p", lambda c: p_text(c["p"]), "right", nowrap=True)
LABELS = Column(
    "labels a / b", lambda c: f"{count(c['labels']['a'])} / {count(c['labels']['b'])}", "right", nowrap=True
)
SIZE = Column("seeds × problems", lambda c: f"{c['seeds']} × {c['problems']}", "right")


def difference_columns(contrasts: Sequence[dict[str, Any]]) -> list[Column]:
    """The difference in points, its interval as text and drawn, and p."""
    return [
        Column("points", lambda c: points(c["difference"]), "right"),
        Column("95\u00a0%", lambda c: f"{points(c['low'])} to {points(c['high'])}", "right"),
        Column("", _interval, axis=interval_axis(contrasts, points)),
        P,
    ]


def _columns(report: dict[str, Any], contrasts: Sequence[dict[str, Any]]) -> list[Column]:
    return [
        PAIR,
        *evaluation_column(report["evals"]),
        _reading_column("a better than b"),
        *difference_columns(contrasts),
        LABELS,
        Column("FLOPs a / b", lambda c: f"{units(c['flops']['a'])} / {units(c['flops']['b'])}", "right"),
        SIZE,
    ]


def _reading_column(title: str) -> Column:
    return Column(title, lambda c: f"{MARKS[reading(c)]} {reading(c)}", nowrap=True)


def _interval(c: dict[str, Any]) -> Interval:
    return Interval(c["difference"], c["low"], c["high"], level=0.0)


def _grouped(contrasts: Sequence[dict[str, Any]]) -> list[Any]:
    """Rows of a table: the contrasts under the headings of their groups."""
    return [row for title, members in group_by_equality(contrasts) for row in (title, *members)]


def _forests(report: dict[str, Any], contrasts: Sequence[dict[str, Any]], stem: str, title: str) -> Iterator[Plot]:
    """A forest plot of the differences per evaluation, for figures/ only: the page shows the same in its tables."""
    ordered = [c for _, members in group_by_equality(contrasts) for c in members]
    for eval_name in report["evals"]:
        rows = [(pair_text(c), _interval(c)) for c in ordered if c["eval"] == eval_name]
        if rows:
            name = figures.file_stem(stem, eval_name)
            yield figures.forest(name, f"{title} on {eval_name}", rows, "percentage points")
