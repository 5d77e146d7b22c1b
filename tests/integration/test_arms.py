"""Control arms and measurements during training, in real tiny runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from forked_runs import warm_runs
from runs import all_arms, call, load_json, node, rows, sets, tiny

PLATEAU = (  # a rate of nothing: the KL cannot fall, so the first window is the best
    "stages.warmup.steps=12",
    "stages.warmup.optim.lr=1e-12",
    "stages.warmup.until={metric: kl_teacher_student, every: 2, patience: 2, least: 0.9}",
)


def done(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "DONE").read_text()))


def test_stage_without_progress_stops_on_plateau_and_reports_it(tmp_path: Path) -> None:
    result = tiny("run", tmp_path / "out", "--arm", "warmup_only", changes=PLATEAU)
    assert result.code == 0, result.err
    warmup = node(tmp_path / "out", "warmup_only", "warmup")
    # Windows of two steps; two after the first are no better: 6 steps of 12.
    assert len(rows(warmup / "metrics.jsonl")) == 6
    assert done(warmup)["ended"] == {"step": 6, "of": 12, "why": "plateau of kl_teacher_student"}
    assert [path.name for path in sorted((warmup / "checkpoint").iterdir())] == ["000006"]


def test_plateau_below_its_threshold_does_not_stop_stage(tmp_path: Path) -> None:
    changes = (*PLATEAU, "stages.warmup.optim.lr=1e-3", "stages.warmup.until.patience=6")
    assert tiny("run", tmp_path / "out", "--arm", "warmup_only", changes=changes).code == 0
    warmup = node(tmp_path / "out", "warmup_only", "warmup")
    assert len(rows(warmup / "metrics.jsonl")) == 12 and "ended" not in done(warmup)


def test_validation_stops_opd_and_its_labels_are_counted_apart(tmp_path: Path) -> None:
    changes = (
        "data.validation.generate={pool: train, count: 7, seed: 5}",
        "stages.opd.steps=10",
        "stages.opd.optim.lr=1e-12",
        "stages.opd.until={metric: validation, every: 2, patience: 1, least: 0.0}",
    )
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "opd_only", changes=changes).code == 0
    opd = node(out, "opd_only", "opd")
    measured = [row["validation"] for row in rows(opd / "metrics.jsonl") if "validation" in row]
    # The weights stand still and each measurement has the same draws: the second is no better than the first.
    assert len(measured) == 2 and measured[0] == measured[1]
    assert done(opd)["ended"]["step"] == 4
    looks = [row for row in rows(opd / "ledger.jsonl") if row["purpose"] == "validation"]
    assert [(row["step"], len(row["labels"]), row["checks"]) for row in looks] == [(2, 7, 14), (4, 7, 14)]
    assert not any(row["labels"] for row in rows(opd / "ledger.jsonl") if row["purpose"] == "train")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("stages.opd.until={metric: validation}", "stages.opd.until.metric validation: data.validation is missing"),
        ("stages.warmup.until={metric: reward}", "until.metric reward: objective forward_kl uses no reward"),
        ("stages.teacher_rl.until={metric: kl_teacher_student}", "objective grpo does not compare with a teacher"),
        ("stages.student_rl.until={metric: reward}", "its matched replay takes as many"),
    ],
)
def test_plateau_of_unmeasured_metric_is_refused(change: str, sentence: str, tmp_path: Path) -> None:
    result = call("run", "pocket", "--out", tmp_path / "out", *sets(change))
    assert result.code == 2 and sentence in result.err and not (tmp_path / "out").exists()


def test_conditions_are_measured_at_first_and_last_step_of_student_stages() -> None:
    out = all_arms()
    with_teacher, without = [], []
    for folder in sorted((out / "nodes").iterdir()):
        info = load_json(folder / "node.json")
        if info["kind"] != "train":
            continue
        path = folder / "conditions.jsonl"
        (with_teacher if path.exists() else without).append((info["stage"], info["role"]))
        if path.exists():
            measured = rows(path)
            assert [row["step"] for row in measured] == [0, 2]
            assert all(row["kl_teacher_student"] > 0 and row["kl_student_teacher"] > 0 for row in measured)
            assert all(0 < row["overlap_student_prefixes"] <= 1 for row in measured)
    assert {stage for stage, _ in with_teacher} == {"warmup", "opd", "sft"}
    assert {role for _, role in with_teacher} == {"student"}
    # GRPO has no teacher, the constant control neither, and the teacher's own fine-tuning is no student's stage.
    assert set(without) == {
        ("teacher_rl", "teacher"),
        ("student_rl", "student"),
        ("opd", "student"),
        ("sft", "teacher"),
    }


def test_condition_measurements_use_no_label_and_change_no_weight(tmp_path: Path) -> None:
    plain, silent = tmp_path / "plain", tmp_path / "silent"
    assert tiny("run", plain, "--arm", "raw_teacher").code == 0
    assert tiny("run", silent, "--arm", "raw_teacher", changes=("conditions.problems=0",)).code == 0
    a, b = (node(out, "raw_teacher", "opd") for out in (plain, silent))
    assert a.name == b.name
    assert (a / "model/model.safetensors").read_bytes() == (b / "model/model.safetensors").read_bytes()
    spent = [row for row in rows(plain / "ledger.jsonl") if row["purpose"] == "measure"]
    assert spent and not any(row["labels"] or row["checks"] for row in spent)
    assert not (b / "conditions.jsonl").exists()


def test_condition_measurements_take_at_most_their_share_of_flops(tmp_path: Path) -> None:
    """Of a stage of two steps, measuring on the five held-out problems would take several times what training takes."""
    plain, limited = tmp_path / "plain", tmp_path / "limited"
    changes = ("stages.opd.batch_size=16", "stages.opd.steps=12", "conditions.every=2", "evaluate.samples=1")
    assert tiny("run", plain, "--arm", "raw_teacher", changes=changes).code == 0
    result = tiny("run", limited, "--arm", "raw_teacher", changes=(*changes, "conditions.max_share=0.1"))
    assert result.code == 0, result.err
    assert "warmup: condition C2 (how far student and teacher are apart) is not measured" in result.err
    assert "opd: condition C2 (how far student and teacher are apart) is measured 2 times on 5 problems" in result.err

    def flops(out: Path, stage: str, purpose: str) -> float:
        ledger = rows(node(out, "raw_teacher", stage) / "ledger.jsonl")
        return float(sum(row["flops"] for row in ledger if row["purpose"] == purpose))

    assert flops(plain, "opd", "measure") > 0.2 * flops(plain, "opd", "train")
    assert 0 < flops(limited, "opd", "measure") <= 0.1 * flops(limited, "opd", "train")
    assert flops(plain, "warmup", "measure") > flops(limited, "warmup", "measure") == 0
    assert [row["step"] for row in rows(node(limited, "raw_teacher", "opd") / "conditions.jsonl")] == [0, 12]
    weights = [node(out, "raw_teacher", "opd") / "model/model.safetensors" for out in (plain, limited)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_condition_measurements_are_equal_after_resume(tmp_path: Path) -> None:
    """Killed by a full stop in the middle of OPD, then resumed: conditions and ledger as if nothing had happened."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = ("stages.opd.steps=6", "stages.opd.checkpoint_every=2", "conditions.every=2")
    assert tiny("run", whole, "--arm", "opd_only", changes=changes).code == 0
    words = ("run", "pocket", "--out", cut, "--arm", "opd_only", *sets(*changes))
    ended = warm_runs().run(
        *words, fault="step.measured:5=kill"
    )  # metrics of step 5 are written, its ledger row is not
    assert ended.code == -signal.SIGKILL
    assert tiny("run", cut, "--arm", "opd_only", changes=changes).code == 0
    a, b = (node(out, "opd_only", "opd") for out in (whole, cut))
    assert rows(a / "conditions.jsonl") == rows(b / "conditions.jsonl")
    timeless = [[{**row, "seconds": 0} for row in rows(folder / "ledger.jsonl")] for folder in (a, b)]
    assert timeless[0] == timeless[1]


def test_equal_compute_arm_takes_as_many_steps_as_its_flops_allow() -> None:
    out = all_arms()

    def flops(folder: Path) -> float:
        return float(sum(row["flops"] for row in rows(folder / "ledger.jsonl") if row["purpose"] == "train"))

    plan = load_json(out / "plan.json")["arms"]
    bridge = sum(flops(out / "nodes" / name) for name in plan["bridge"]["0"])
    direct, matched = (out / "nodes" / plan[arm]["0"][-1] for arm in ("direct_grpo", "direct_grpo_compute"))
    steps = len(rows(direct / "metrics.jsonl"))
    assert len(rows(matched / "metrics.jsonl")) == round(bridge / (flops(direct) / steps))
    # What an arm's length was taken from is no part of it: its cost is its own.
    assert plan["direct_grpo_compute"]["0"] == [matched.name]
    opd = out / "nodes" / plan["opd_then_rl"]["0"][0]
    like, longer = (out / "nodes" / plan[arm]["0"][-1] for arm in ("opd_then_rl", "opd_then_rl_compute"))
    per_step = flops(like) / len(rows(like / "metrics.jsonl"))
    assert len(rows(longer / "metrics.jsonl")) == round((bridge - flops(opd)) / per_step)


def test_constant_advantage_arm_uses_no_label_and_no_teacher() -> None:
    out = all_arms()
    name = load_json(out / "plan.json")["arms"]["constant_advantage"]["0"]
    assert len(name) == 1
    spent = rows(out / "nodes" / name[0] / "ledger.jsonl")
    assert all(not row["labels"] and not row["tokens_teacher_scored"] for row in spent if row["purpose"] == "train")
    assert sum(row["tokens_trained"] for row in spent) > 0


def test_best_of_group_is_share_of_groups_with_correct_completion() -> None:
    folder = node(all_arms(), "direct_grpo", "student_rl")
    for row in rows(folder / "metrics.jsonl"):
        sampled = rows(folder / "rollouts" / f"{row['step']:06d}.jsonl")
        groups = [sampled[start : start + 4] for start in range(0, len(sampled), 4)]
        assert row["best_of_group"] == sum(any(rollout["correct"] for rollout in group) for group in groups) / len(
            groups
        )
