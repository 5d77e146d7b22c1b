"""The section of arms and the plots of accuracy against cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from headwater.report import html_arms
from headwater.report.render import render
from headwater.report.view import RowHeader, Table


@pytest.fixture
def values(fake_report: dict[str, Any]) -> dict[str, Any]:
    """A report that a test may change."""
    return copy.deepcopy(fake_report)


def titles(report: dict[str, Any]) -> list[str]:
    return [column.title.replace("\u00a0", " ") for column in html_arms.arms(report).view["table"].columns]


def test_accuracy_cell_holds_its_interval(values: dict[str, Any]) -> None:
    table: Table = html_arms.arms(values).view["table"]
    row = values["arms"]["bridge"]["accuracy"]["sums"]
    mean, low, high = (f"{100 * row[key]:.1f}" for key in ("mean", "low", "high"))
    bridge = table.rows[list(values["arms"]).index("bridge")]
    assert titles(values)[:3] == ["arm", "accuracy\n% [95 %]", ""]
    assert table.columns[1].cell(bridge) == f"{mean}\n[{low}, {high}]"


def test_table_without_evaluations_has_costs_alone(values: dict[str, Any]) -> None:
    values["evals"] = []
    section = html_arms.arms(values)
    assert section.view["table"].caption == "Costs" and titles(values)[:3] == ["arm", "labels", "FLOPs"]


def test_pass_and_majority_are_left_out_with_one_sample(values: dict[str, Any]) -> None:
    assert {"pass@4, %", "maj@4, %"} <= set(titles(values))
    for arm in values["arms"].values():
        arm["pass_at_k"] = {"sums": {"1": arm["accuracy"]["sums"]}}
        arm["maj_at_k"] = {"sums": {"k": 1, **arm["accuracy"]["sums"]}}
    assert not [title for title in titles(values) if "@" in title]


def test_failure_sentence_is_at_top_and_not_in_arm_column(values: dict[str, Any]) -> None:
    failure = {"state": "not run", "node": "opd.s0.x", "stage": "opd", "sentence": "out of memory " * 20, "code": 4}
    values["arms"]["bridge"]["failed"] = {"0": failure}
    headers = [row["header"] for row in html_arms.arms(values).view["table"].rows]
    bridge = next(header for header in headers if isinstance(header, RowHeader) and header.text == "bridge")
    assert bridge.warnings == ("not run on seed 0",)
    top = {"headline": "", "chips": [], "sections": [], "report": values}
    page = render("report.html.j2", {**top, "stops": [f"Failed: sentence {number}." for number in range(5)]})
    assert all(page.count(f"Failed: sentence {number}.") == 1 for number in range(5)) and "<summary>2 more<" in page


@pytest.mark.parametrize(
    ("names", "plots"),
    [
        (("base_student", "bridge"), []),
        (("direct_grpo", "bridge"), ["cost-training_FLOPs-sums"]),  # both with 96 labels
        (("raw_teacher", "bridge"), ["cost-distinct_labels-sums", "cost-training_FLOPs-sums"]),
    ],
)
def test_cost_is_plotted_where_arms_differ_in_it(
    values: dict[str, Any], names: tuple[str, ...], plots: list[str]
) -> None:
    values["arms"] = {name: values["arms"][name] for name in names}
    if "raw_teacher" in names:
        values["arms"]["raw_teacher"]["flops"] /= 2
    section = html_arms.costs(values)
    assert [plot.name for plot in (section.plots if section else ())] == plots
