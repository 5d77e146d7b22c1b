"""Values of `dense` in runs: what they record, and that labels are counted once."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import call, load_json, node, rows, tiny

GROUPS = ("stages.opd.group_size=4", "stages.opd.steps=3")


def train_rows(folder: Path) -> list[dict[str, object]]:
    return [row for row in rows(folder / "ledger.jsonl") if row["purpose"] == "train"]


def test_pass_rate_weights_look_at_spent_labels_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = (*GROUPS, "stages.opd.dense.token_weights.prompts=pass_rate")
    assert tiny("run", out, "--arm", "bridge", changes=changes).code == 0
    looked = {label for row in train_rows(node(out, "bridge", "opd")) for label in row["labels"]}  # type: ignore[attr-defined]
    bridge = load_json(out / "report.json")["arms"]["bridge"]
    assert looked and call("report", out, "--audit").code == 0
    plain = tmp_path / "plain"
    assert tiny("run", plain, "--arm", "bridge", changes=GROUPS).code == 0
    unweighted = load_json(plain / "report.json")["arms"]["bridge"]
    graded = 3 * 8  # steps × rollouts
    assert bridge["labels"]["distinct"] == unweighted["labels"]["distinct"]
    assert bridge["labels"]["checks"] == unweighted["labels"]["checks"] + graded


@pytest.mark.parametrize(
    "value", ["gain_over=base_teacher", "gain_over=start", "token_weights={first: 3, soft_or: 0.5}"]
)
def test_value_trains_and_repeats_exactly_after_stop(tmp_path: Path, value: str) -> None:
    changes = ("stages.opd.steps=3", f"stages.opd.dense.{value}", "stages.opd.length_schedule={start: 2, steps: 2}")
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "bridge", changes=changes).code == 0
    metrics = rows(node(out, "bridge", "opd") / "metrics.jsonl")
    assert metrics[0]["max_tokens"] == 2 and metrics[-1]["grad_norm"] > 0
    assert metrics[0]["completion_tokens"] <= 2


def test_rescue_of_wrong_groups_is_not_stopped_without_informative_groups(tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = (
        "stages.student_rl={objective: mixed, sparse_share: 0.9, steps: 4, batch_size: 8, group_size: 4, optim: {lr: 1.0e-3}, "
        "sampling: {max_tokens: 1}, dense: {token_weights: {prompts: all_wrong}}}",
        "guards.patience=2",
    )
    result = tiny("run", out, "--arm", "bridge_rl", changes=changes)
    assert result.code == 0, result.err
    metrics = rows(node(out, "bridge_rl", "student_rl") / "metrics.jsonl")
    assert [row["informative"] for row in metrics] == [0.0] * 4 and all(row["grad_norm"] > 0 for row in metrics)
