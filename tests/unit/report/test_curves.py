"""Curves over steps: which are drawn, their axes, what the page's script reads, held-out accuracy during training."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fake_runs import ARMS, MORE_ARMS, fake_run, graded, names, write_rows
from headwater.report import figures
from headwater.report.figures import Series
from headwater.report.html_curves import METRICS, axis_limits, curves, mean_curves, panels_by_stage
from headwater.report.study import read_study


def line(*values: float) -> list[Series]:
    """A metric of one seed at the steps 1, 2, …"""
    rows = [{"step": step, "value": value} for step, value in enumerate(values, 1)]
    return mean_curves([("bridge", [rows])], "value")


@pytest.mark.parametrize(
    ("metric", "values", "limits"),
    [
        ("reward", (0.5, 0.55), (0.425, 0.625)),  # at least 0.2, around the values
        ("reward", (0.0, 0.02), (0.0, 0.2)),  # not below zero
        ("reward", (0.98, 1.0), (0.8, 1.004)),  # not above one, but for a margin
        ("reward", (0.1, 0.9), (0.06, 0.94)),  # the values and 5 % of their range
        ("reward", (0.5, 0.505), None),
        ("best_of_group", (0.875, 1.0), (0.0, 1.02)),  # always the whole range: with few groups its steps are large
        ("truncated", (0.0, 0.0), None),
        ("sampler_gap", (3e-8, 6e-8), None),  # rounding
        ("sampler_gap", (0.001, 0.003), (0.0009, 0.0031)),
        ("completion_tokens", (400.0, 410.0), (364.0, 446.0)),  # a fifth of 410 tokens is 82
        ("lr", (1e-5, 1e-5), None),
        ("loss", (-0.5, 0.5), (-0.55, 0.55)),
    ],
)
def test_axis_spans_least_range_of_metric(
    metric: str, values: tuple[float, ...], limits: tuple[float, float] | None
) -> None:
    computed = axis_limits(line(*values), METRICS[metric])
    assert computed == (None if limits is None else pytest.approx(limits, rel=1e-9))


def test_flat_curves_are_named_with_their_value(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"direct_grpo": ARMS["direct_grpo"]})
    (panels,) = panels_by_stage(read_study([out]), METRICS, lambda node: node.metrics)
    drawn = {plot.name.removeprefix("curve-student_rl-student--") for plot in panels["plots"]}
    # The fake run's learning rate is 1e-3 at every step and its sampler gap at most 1e-5; it has no completion length.
    assert drawn == {"reward", "informative", "best_of_group", "loss", "entropy", "truncated", "grad_norm"}
    rate, gap = panels["flat"].split("; ")
    assert rate == "learning rate, nearly constant at 0.001"
    assert re.fullmatch(r"sampler–trainer gap, nats a token, nearly constant at \S+e-06", gap)


@pytest.mark.parametrize(("times", "drawn"), [(1.0, {"kl_student_teacher"}), (1.01, {"loss", "kl_student_teacher"})])
def test_loss_equal_to_divergence_is_not_drawn_twice(tmp_path: Path, times: float, drawn: set[str]) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"opd_only": MORE_ARMS["opd_only"]})
    values = [{"step": step, "kl_student_teacher": 1.0 / step, "loss": times / step} for step in range(1, 9)]
    panels = panels_by_stage(read_study([out]), METRICS, lambda node: values if node.stage == "opd" else [])
    assert {plot.name.rsplit("-", 1)[1] for plot in panels[0]["plots"]} == drawn
    assert (panels[0]["flat"] == "loss, which equals KL(student ‖ teacher)") == (times == 1.0)


def test_curve_element_carries_values_for_script() -> None:
    seeds = [[{"step": 1, "x": 0.25}, {"step": 2, "x": 0.5}], [{"step": 1, "x": 0.75}, {"step": 2, "x": 1.0}]]
    plot = figures.curves("c", 'a "title"', mean_curves([("b & c", seeds)], "x"), (0.0, 1.25))
    data = json.loads(html.unescape(re.search(r'data-curve="([^"]*)"', plot.element)[1]))  # type: ignore[index]
    line = {"label": "b & c", "colour": 0, "x": [1, 2], "y": [0.5, 0.75], "low": [0.25, 0.5], "high": [0.75, 1.0]}
    assert (data["title"], data["y"], data["lines"]) == ('a "title"', [0.0, 1.25], [line])
    # The frame is that of the drawn axes: its lower left corner is where both spines begin.
    left, bottom, right, top = data["frame"]
    spines = [tuple(map(float, m)) for m in re.findall(r'd="M ([\d.]+) ([\d.]+)\nL ([\d.]+) ([\d.]+)\n"', plot.element)]
    assert any(spine == pytest.approx((left, bottom, left, top), abs=0.1) for spine in spines)
    assert any(spine == pytest.approx((left, bottom, right, bottom), abs=0.1) for spine in spines)
    for part in ("line0", "band0", "values"):
        assert plot.element.count(f'class="{part}"') == 1 and f'id="part-{part}"' in plot.svg


def test_held_out_accuracy_over_steps_is_drawn(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"direct_grpo": ARMS["direct_grpo"]})
    folder = out / "nodes" / names(out, "direct_grpo")[-1] / "evals"
    rows = graded(out, "direct_grpo", 0)
    for step, right in ((4, 0.25), (8, 0.5)):
        (folder / f"step-{step:06d}").mkdir()
        changed = [{**row, "correct": row["sample"] < 4 * right} for row in rows]
        write_rows(folder / f"step-{step:06d}" / "sums.jsonl", changed)
    section = curves(read_study([out]))
    assert section is not None
    plot = next(plot for plot in section.plots if "accuracy on sums (held out)" in plot.description)
    final = sum(row["correct"] for row in rows) / len(rows)
    steps: list[Any] = [row[1:3] for row in plot.rows[1:]]
    assert steps == [(4, 0.25), (8, 0.5), (12, pytest.approx(final))]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0005, "5e−4"), (0.00016, "1.6e−4"), (-0.25, "−0.25"), (2500.0, "2500"), (0.0, "0")]
)
def test_tick_text_is_short(value: float, text: str) -> None:
    assert figures.tick_text(value) == text
