"""The top of the page: what stopped, and one sentence with accuracy and costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fake_runs import ARMS, fake_run, names, unfinished_run
from headwater.report import build as report
from headwater.report.headline import headline, stops
from headwater.report.study import read_study


def stops_of(out: Path) -> list[str]:
    study = read_study([out])
    return stops(study, report.summarize(study))


def plain(text: str) -> str:
    """The text with ordinary spaces before its per cent signs."""
    return text.replace("\u00a0", " ")


def fail(out: Path, node: str, sentence: str, code: int) -> None:
    (out / "nodes" / node / "DONE").unlink()
    (out / "nodes" / node / "FAILED").write_text(json.dumps({"sentence": sentence, "code": code}))


def test_headline_has_accuracy_and_costs_of_both_arms(fake_report: dict[str, Any]) -> None:
    bridge, direct = (fake_report["arms"][arm]["accuracy"]["sums"]["mean"] for arm in ("bridge", "direct_grpo"))
    # Three stages of 12 steps of 1.5e9 FLOPs and 0.5 s, and a cache of 2e9 FLOPs and 3.25 s; one stage for direct GRPO.
    assert plain(headline(fake_report)).startswith(
        f"The bridge beats direct GRPO on sums: {100 * bridge:.1f} % with 96 labels, 56.0 GFLOPs and 21 s of training, "
        f"against {100 * direct:.1f} % with 96 labels, 18.0 GFLOPs and 6 s of training; +"
    )


def test_headline_of_other_arms_compares_best_with_untrained_student(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "bridge_rl")}
    values = report.build([fake_run(tmp_path / "out", seeds=(0,), arms=arms)])
    row = values["arms"]["bridge_rl"]["accuracy"]["sums"]
    mean = f"{100 * row['mean']:.1f}"
    # Four stages of 12 steps and a cache: 4 · 1.8e10 + 2e9 FLOPs; 64 labels of each half.
    costs = "with 128 labels, 74.0 GFLOPs and 27 s of training"
    before = f"{100 * values['arms']['base_student']['accuracy']['sums']['mean']:.1f} % before training"
    text = plain(headline(values))
    assert text.startswith(f"bridge_rl beats the untrained student on sums: {mean} % {costs}, against {before}; +")


def test_headline_of_untrained_models_names_best(tmp_path: Path) -> None:
    values = report.build([fake_run(tmp_path / "out", seeds=(0,), arms={"base_student": ARMS["base_student"]})])
    row = values["arms"]["base_student"]["accuracy"]["sums"]
    mean, low, high = (f"{100 * row[key]:.1f}" for key in ("mean", "low", "high"))
    text = f"Best on sums: base_student with {mean} % (95 % {low} to {high}) without training."
    assert plain(headline(values)) == text


def test_headline_names_guard_and_step_of_stopped_stage(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("base_student", "bridge_rl", "replay")}
    out = fake_run(tmp_path / "out", seeds=(0,), arms=arms)
    why = "guard truncation: 62 % of the completions reached the token limit (window of 10 steps; bound 0.5): raise "
    why += "sampling.max_tokens"
    hint = " (or set guards.truncation=warn to continue from the checkpoint)"
    fail(out, names(out, "replay")[1], f"teacher_rl, step 8 of 12: {why}{hint}", 4)
    assert stops_of(out) == [f"Stopped: Teacher RL at step 8 of 12 (seed 0; bridge_rl, replay): {why}."]


@pytest.mark.parametrize(("sentence", "code"), [("OSError: the disk is full", 1), ("the disk is full", 4)])
def test_headline_calls_other_failures_failed(tmp_path: Path, sentence: str, code: int) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"bridge": ARMS["bridge"]})
    fail(out, names(out, "bridge")[-1], sentence, code)
    assert stops_of(out) == [f"Failed: On-policy distillation (seed 0; bridge): {sentence}."]


@pytest.mark.usefixtures("undrawn")
def test_headline_names_step_of_interrupted_run(tmp_path: Path) -> None:
    out = unfinished_run(tmp_path / "out")
    opd = "Interrupted: On-policy distillation at step 12 of 40 (seed 0; bridge)."
    assert stops_of(out) == [opd, "Not started yet: On-policy distillation (seed 0; bridge_rl)."]
    report.write(out)
    assert f'<p class="stop">{opd}</p>' in (out / "report.html").read_text()


def test_headline_calls_nodes_of_locked_run_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = unfinished_run(tmp_path / "out")
    monkeypatch.setattr("headwater.report.headline.is_locked", lambda path: path == out / ".lock")
    assert stops_of(out)[0] == "Running: On-policy distillation at step 12 of 40 (seed 0; bridge)."


def test_headline_of_finished_study_names_no_stops(fake_study: Path, fake_report: dict[str, Any]) -> None:
    assert stops(read_study([fake_study]), fake_report) == []
