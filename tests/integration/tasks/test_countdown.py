"""The countdown recipe with its shipped models."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from headwater.report.html import Page
from runs import call, infos, load_json


def test_countdown_recipe_runs_with_shipped_models(tmp_path: Path) -> None:
    """Preflight included; only the page is not drawn."""
    shape = ("batch_size=16", "group_size=4", "steps=2")
    stages = [f"stages.{stage}.{field}" for stage in ("teacher_rl", "warmup", "student_rl") for field in shape]
    few = ("data.labeled.generate.count=64", "data.evals.countdown.generate.count=8", "evaluate.samples=2")
    more = ("labels.budget=16", "stages.opd.batch_size=8", "stages.opd.steps=2", "guards.no_signal=continue")
    options = [part for change in (*stages, *few, *more) for part in ("--set", change)]
    with mock.patch("headwater.report.html.page", return_value=Page("")):
        result = call("study", "pocket-countdown", "--arms", "direct_grpo,bridge", "--out", tmp_path / "out", *options)
    assert result.code == 0, result.err
    arms = load_json(tmp_path / "out" / "report.json")["arms"]
    # two steps of four prompts each, four answers to each
    assert [arms[arm]["labels"] for arm in ("direct_grpo", "bridge")] == [{"distinct": 8, "checks": 32}] * 2
    # of 16 answers; the raw teacher is right nine times in ten
    assert arms["base_teacher"]["accuracy"]["countdown"]["mean"] > 0.5
    assert {"student_rl", "teacher_rl", "warmup", "opd"} <= {info["stage"] for _, info in infos(tmp_path / "out")}
