"""What each published follow-up brings over the arm that it changes: differences with intervals, by what is equal."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from headwater.config.arms import ARMS
from headwater.config.follow_up_arms import FOLLOW_UPS
from headwater.report.contrasts import flops_ratio, group_by_equality, interval_note, reading
from headwater.report.figures import Interval
from headwater.report.format import p_text, points
from headwater.report.html_contrasts import MARKS, forests
from headwater.report.view import Column, RowHeader, Section, Table, interval_axis

BASES = ("bridge", "bridge_rl")
"""Arms that follow-ups change."""


def idea_contrasts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Contrasts of follow-up arms with the arm that they change, idea minus base, the largest difference first."""
    rows = [row for row in report["contrasts"] if row["a"] in FOLLOW_UPS and row["b"] in BASES]
    return sorted(rows, key=itemgetter("difference"), reverse=True)


def ideas(report: dict[str, Any]) -> Section | None:
    """What each idea bought: a table with a forest plot, grouped by whether labels and compute are equal."""
    contrasts = idea_contrasts(report)
    if not contrasts:
        return None
    columns = [
        Column("idea", lambda c: RowHeader(c["a"], (ARMS[c["a"]].description, ARMS[c["a"]].source or "this project"))),
        *([Column("evaluation", itemgetter("eval"))] if len(report["evals"]) > 1 else []),
        Column("better", lambda c: f"{MARKS[reading(c)]} {reading(c)}", nowrap=True),
        Column("points", lambda c: points(c["difference"]), "right"),
        Column("95\u00a0%", lambda c: f"{points(c['low'])} to {points(c['high'])}", "right"),
        Column(
            "", lambda c: Interval(c["difference"], c["low"], c["high"], 0.0), axis=interval_axis(contrasts, points)
        ),
        Column("p", lambda c: p_text(c["p"]), "right"),
        Column("over", itemgetter("b")),
        Column("FLOPs", flops_ratio, "right"),
    ]
    rows = [row for title, members in group_by_equality(contrasts) for row in (title, *members)]
    table = Table("Accuracy of each idea minus that of the arm it changes", columns, rows)
    view = {"table": table, "interval_note": interval_note(report)}
    return Section(
        "What each idea bought", "ideas", view, tuple(forests(report, contrasts, "ideas", "What each idea bought"))
    )
