"""The section on what each idea bought: signs, groups and sources."""

from __future__ import annotations

from typing import Any

from headwater.config.arms import CONTRASTS
from headwater.report.html_contrasts import idea_contrasts, ideas
from headwater.report.render import render
from headwater.report.view import RowHeader


def contrast(a: str, b: str, difference: float, equal: list[str]) -> dict[str, Any]:
    interval = {"difference": difference, "low": difference - 0.01, "high": difference + 0.02, "p": 0.001}
    costs = {"labels": {"a": 256.0, "b": 256.0}, "flops": {"a": 2e12, "b": 1e12}}
    return {"a": a, "b": b, "eval": "sums", **interval, **costs, "equal": equal, "seeds": 2, "problems": 50}


REPORT: dict[str, Any] = {
    "evals": ["sums"],
    "seeds": [0, 1],
    "contrasts": [
        contrast("bridge", "direct_grpo", 0.09, ["labels"]),
        contrast("opd2", "bridge", -0.05, ["labels"]),
        contrast("every_prompt", "bridge", 0.06, ["labels", "compute"]),
        contrast("rescue", "bridge_rl", 0.03, ["labels"]),
        contrast("every_prompt", "base_student", 0.5, []),
    ],
}


def test_ideas_are_follow_ups_minus_arm_they_change_in_order() -> None:
    rows = idea_contrasts(REPORT)
    assert [(row["a"], row["b"]) for row in rows] == [
        ("every_prompt", "bridge"), ("rescue", "bridge_rl"), ("opd2", "bridge")
    ]  # fmt: skip
    assert {("opd2", "bridge"), ("bridge_plus", "bridge"), ("rescue", "bridge_rl")} <= set(CONTRASTS)


def test_section_groups_ideas_by_equality_and_names_sources() -> None:
    section = ideas(REPORT)
    assert section is not None
    rows = section.view["table"].rows
    assert [row if isinstance(row, str) else row["a"] for row in rows] == [
        "Equal labels and compute", "every_prompt", "Equal labels", "rescue", "opd2"
    ]  # fmt: skip
    header = section.view["table"].columns[0].cell(rows[-1])
    assert isinstance(header, RowHeader) and header.details[1] == "OPD², 2607.15161"
    values = {"headline": "", "chips": [], "stops": [], "sections": [section], "report": {**REPORT, "recipe": "r"}}
    page = render("report.html.j2", {**values, "report": {**values["report"], "arms": {}, "verdict": ""}})
    assert "▲ holds" in page and "+6.0" in page and "RSTG, 2608.00782" in page and "2.00×" in page
    assert [plot.name for plot in section.plots] == ["ideas-sums"]


def test_study_without_follow_ups_has_no_section() -> None:
    assert ideas({**REPORT, "contrasts": REPORT["contrasts"][:1]}) is None
