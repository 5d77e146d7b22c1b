"""Training a stage: every step is recorded, and an interrupted stage resumes to the bit."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch

from headwater.config.builtin import find_recipe
from headwater.config.stage import Stage
from headwater.errors import TrainingStoppedError, UserError
from headwater.losses.batch import Row
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.runs import train_node
from headwater.runs.display import NodeProgress
from headwater.runs.inputs import RunInputs
from headwater.runs.node import TrainNode
from headwater.runs.node_context import NodeContext
from headwater.runs.plan import Plan
from headwater.storage.files import read_jsonl
from headwater.storage.node_dir import NodeDir
from headwater.storage.run_dir import RunDir
from headwater.training.checkpoint import load_checkpoint
from headwater.training.loop import StepBatch
from headwater.training.update import make_optimizer
from tiny import furthest, same_bits, sampled_rows, stage_of, taught, tiny_policy, weights_of

OPD = stage_of(
    "opd",
    steps=10,
    checkpoint_every=3,
    optim={"lr": 3e-3, "schedule": "cosine", "warmup": 0.3, "weight_decay": 0.1},
    sampling={"max_tokens": 6},
)


RECIPE = find_recipe("pocket", ["compute.microbatch_tokens=64", "guards.no_signal=continue"])


class Driver:
    """Runs `train_stage` on a tiny policy that samples for itself, and records what happened."""

    def __init__(self, policy: Policy, teacher: Policy, node: NodeDir) -> None:
        self.policy, self.teacher, self.node = policy, teacher, node
        self.evaluated: list[str] = []
        self.started: list[int] = []
        self.warnings: list[str] = []
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.spoil: Callable[[int, list[Row]], list[Row]] = lambda step, rows: rows

    def source(self, step: int) -> StepBatch:
        rows = sampled_rows(self.policy, groups=2, max_tokens=6, draw=step)
        tokens = sum(row.tokens for row in rows)
        rows = self.spoil(step, taught(rows, self.teacher))
        return StepBatch(rows, {"extra": float(step)}, ("p1", "p2"), len(rows), tokens, tokens, 100.0)

    def advance(self, count: int, metrics: dict[str, float]) -> None:
        self.weights[int(metrics["step"])] = weights_of(self.policy)

    def run(self, stage: Stage = OPD, stop_after: int | None = None) -> Driver:
        node = TrainNode("opd", "student", 7, "student", "all", stage)
        progress = NodeProgress(
            lambda done, total, unit: self.started.append(done),
            self.advance,
            lambda: stop_after is not None and max(self.weights, default=0) >= stop_after,
            self.warnings.append,
        )
        context: Any = NodeContext(
            plan=cast(Plan, SimpleNamespace(names={node: "node"})),
            inputs=cast(
                RunInputs,
                SimpleNamespace(
                    recipe=RECIPE,
                    evals={},
                    validation=None,
                    pool=lambda name: (),
                    prompter=lambda tokenizer, role: Prompter(tokenizer, RECIPE.prompt),
                ),
            ),
            out=cast(RunDir, SimpleNamespace(node=lambda name: self.node)),
            progress=progress,
        )
        with mock.patch.multiple(
            train_node,
            rollout_source=lambda *given: self.source,
            run_evals=lambda policy, node, context, when, step: self.evaluated.append(when),
            update_flops=lambda stage, policy, rows: float(len(rows)),
        ):
            train_node.train_stage(node, context, self.policy, stage.steps or 0)
        return self


@pytest.fixture
def node(tmp_path: Path) -> NodeDir:
    return NodeDir(tmp_path / "nodes" / "opd")


def stripped(path: Path) -> list[dict[str, object]]:
    """Rows of a file without what a clock measured and without the name of the weights in memory."""
    return [
        {key: value for key, value in row.items() if not key.startswith("seconds") and key != "sampler"}
        for row in read_jsonl(path)
    ]


@pytest.mark.parametrize("stop_after", [1, 5, 9])
def test_interrupted_and_resumed_steps_equal_uninterrupted_run(
    tmp_path: Path, teacher: Policy, stop_after: int
) -> None:
    whole = Driver(tiny_policy(), teacher, NodeDir(tmp_path / "whole")).run()
    node = NodeDir(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        Driver(tiny_policy(), teacher, node).run(stop_after=stop_after)
    assert node.checkpoints()[0].name == f"{stop_after:06d}"
    # A new process: other weights in memory, until the checkpoint is read.
    resumed = Driver(tiny_policy(seed=8), teacher, node).run()
    assert resumed.started == [stop_after]
    assert same_bits(weights_of(resumed.policy), weights_of(whole.policy))
    for ours, expected in ((node.metrics, whole.node.metrics), (node.ledger, whole.node.ledger)):
        assert stripped(ours) == stripped(expected)
        assert [row["step"] for row in stripped(ours)] == list(range(1, 11))
    for step in range(1, 11):
        assert stripped(node.rollouts(step)) == stripped(whole.node.rollouts(step))
    assert furthest(whole.weights[10], whole.weights[5]) > 1e-3


def test_resume_needs_no_random_state(tmp_path: Path, teacher: Policy) -> None:
    """Why a checkpoint keeps none: whatever the generators of the process stand at, the draws are the same."""
    whole = Driver(tiny_policy(), teacher, NodeDir(tmp_path / "whole")).run()
    node = NodeDir(tmp_path / "cut")
    for seed, stop_after in ((1, 4), (2, None)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        driver = Driver(tiny_policy(seed=7 + seed), teacher, node) if seed > 1 else Driver(tiny_policy(), teacher, node)
        with pytest.raises(KeyboardInterrupt) if stop_after else contextlib.nullcontext():
            driver.run(stop_after=stop_after)
    assert same_bits(weights_of(driver.policy), weights_of(whole.policy))
    assert stripped(node.metrics) == stripped(whole.node.metrics)


def test_crashed_stage_resumes_from_last_checkpoint(tmp_path: Path, teacher: Policy) -> None:
    whole = Driver(tiny_policy(), teacher, NodeDir(tmp_path / "whole")).run()
    node = NodeDir(tmp_path / "crashed")

    def crash(step: int, rows: list[Row]) -> list[Row]:
        if step == 7:  # after checkpoints at 3 and 6 and a step 7 that no checkpoint holds
            raise RuntimeError("the machine died")
        return rows

    driver = Driver(tiny_policy(), teacher, node)
    driver.spoil = crash
    with pytest.raises(RuntimeError, match="the machine died"):
        driver.run()
    with node.metrics.open("a") as file:
        file.write('{"step": 8, "lo')  # half a row
    resumed = Driver(tiny_policy(seed=8), teacher, node).run()
    assert resumed.started == [6]
    assert same_bits(weights_of(resumed.policy), weights_of(whole.policy))
    assert stripped(node.metrics) == stripped(whole.node.metrics)


def test_finished_stage_does_nothing(node: NodeDir, teacher: Policy) -> None:
    done = Driver(tiny_policy(), teacher, node).run()
    before = stripped(node.metrics)
    again = Driver(tiny_policy(seed=8), teacher, node).run()
    assert again.started == [10] and again.weights == {}
    assert same_bits(weights_of(again.policy), weights_of(done.policy))
    assert stripped(node.metrics) == before


def test_checkpoints_are_written_when_due_and_last_two_remain(node: NodeDir, teacher: Policy) -> None:
    driver = Driver(tiny_policy(), teacher, node).run()
    assert [path.name for path in node.checkpoints()] == ["000010", "000009"]
    assert driver.evaluated == []


def test_intermediate_evaluations_run_when_due_except_at_last_step(node: NodeDir, teacher: Policy) -> None:
    driver = Driver(tiny_policy(), teacher, node).run(OPD.model_copy(update={"eval_every": 5}))
    assert driver.evaluated == ["step-000005"]


def test_step_writes_documented_metrics_and_ledger_row(node: NodeDir, teacher: Policy) -> None:
    Driver(tiny_policy(), teacher, node).run()
    metrics, ledger = list(read_jsonl(node.metrics)), list(read_jsonl(node.ledger))
    promised = {
        "step", "loss", "grad_norm", "seconds", "seconds_update", "tokens_sampled", "tokens_trained",
        "tokens_teacher_scored", "lr", "entropy", "kl_student_teacher", "kl_teacher_student", "sampler_gap", "extra",
    }  # fmt: skip
    assert all(promised <= row.keys() for row in metrics)
    # warmup 0.3 of 10 steps: 1/3, 2/3, 1 of the rate; then half a cosine over seven steps, its first point 1.
    assert [row["lr"] for row in metrics[:4]] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3])
    for row, spent in zip(metrics, ledger, strict=True):
        tokens = sum(line["tokens"] for line in read_jsonl(node.rollouts(row["step"])))
        assert spent["tokens_sampled"] == spent["tokens_trained"] == spent["tokens_teacher_scored"] == tokens
        assert spent["flops"] == 108.0  # 100 to gather and 1 for each of the 8 rows
        assert spent["labels"] == ["p1", "p2"] and spent["checks"] == 8 and spent["seed"] == 7


def test_non_finite_step_stops_stage_and_keeps_last_checkpoint(node: NodeDir, teacher: Policy) -> None:
    driver = Driver(tiny_policy(), teacher, node)

    def spoil(step: int, rows: list[Row]) -> list[Row]:
        if step == 7:
            teacher.model.model.embed_tokens.weight.data[6] = float("nan")
        return rows

    driver.spoil = spoil
    with pytest.raises(TrainingStoppedError, match=r"^step [89] of 10: the loss is not finite"):
        driver.run()
    last = max(driver.weights)
    assert same_bits(weights_of(driver.policy), driver.weights[last])
    assert [path.name for path in node.checkpoints()] == ["000006", "000003"]
    kept = tiny_policy(seed=9)
    load_checkpoint(node, kept.model, make_optimizer(kept, OPD.optim))
    assert same_bits(weights_of(kept), driver.weights[6])


def test_checkpoint_with_damaged_log_is_skipped(node: NodeDir, teacher: Policy) -> None:
    driver = Driver(tiny_policy(), teacher, node).run()
    whole = stripped(node.metrics)
    content = node.metrics.read_bytes()
    rows = content.splitlines(keepends=True)
    node.metrics.write_bytes(b"".join(rows[:9]) + rows[9].replace(b'"step": 10', b'"step": 11'))
    result: list[str] = []
    other = tiny_policy(seed=9)
    assert load_checkpoint(node, other.model, make_optimizer(other, OPD.optim), result.append) == 9
    assert result == [f"{node.metrics}: is damaged; checkpoint 000010 is skipped for the one before it"]
    assert same_bits(weights_of(other), driver.weights[9])
    assert stripped(Driver(tiny_policy(seed=8), teacher, node).run().node.metrics) == whole
    node.metrics.write_bytes(content.replace(b'"step": 2,', b'"step": 3,'))
    with pytest.raises(UserError, match=r"metrics\.jsonl: is damaged"):
        load_checkpoint(node, other.model, make_optimizer(other, OPD.optim))


def test_logs_are_synced_before_their_checkpoint(
    node: NodeDir, teacher: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def noted(number: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{number}"))
        real(number)

    monkeypatch.setattr(os, "fsync", noted)
    Driver(tiny_policy(), teacher, node).run(OPD.model_copy(update={"steps": 3}))
    first = next(place for place, name in enumerate(synced) if "/checkpoint/" in name)
    assert {str(node.metrics), str(node.ledger), *(str(node.rollouts(step)) for step in (1, 2, 3))} <= set(
        synced[:first]
    )
    assert str(node.checkpoint(3).parent) in synced[first:]


@pytest.mark.parametrize(
    ("teacher", "action"),
    [("pocket:qwen3-teacher", "off"), ("http://localhost:8000", "stop"), ("{a: 'pocket:x', b: 'http://h:1'}", "stop")],
)
def test_jump_is_looked_for_only_in_served_teachers(teacher: str, action: str) -> None:
    """The KL to a teacher in this process jumps where the student collapses, or the teacher follows it."""
    recipe = find_recipe("pocket", [f"models.teacher={teacher}", "models.expert=null"])
    guards = train_node.guards_of(recipe)
    assert guards.teacher_jump.action == action
    assert guards.model_copy(update={"teacher_jump": recipe.guards.teacher_jump}) == recipe.guards
