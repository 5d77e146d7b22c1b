"""Checkpoints and the loop around them: what is saved comes back to the bit, and a resumed run is the run."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from headwater.config.recipe import Guards
from headwater.config.stage import Stage
from headwater.errors import TrainingStoppedError, UserError
from headwater.losses.batch import Row
from headwater.losses.objectives import objective_of
from headwater.models.policy import Policy
from headwater.storage.ledger import Spend
from headwater.storage.run_dir import NodeDir, append_jsonl, read_jsonl
from headwater.training.checkpoint import load_checkpoint, save_checkpoint
from headwater.training.guards import GuardMonitor
from headwater.training.loop import StepBatch, make_optimizer, train, update
from tiny import furthest, same_bits, sampled_rows, stage_of, taught, tiny_policy, weights_of

OPD = stage_of(
    "opd",
    steps=10,
    checkpoint_every=3,
    optim={"lr": 3e-3, "schedule": "cosine", "warmup": 0.3, "weight_decay": 0.1},
    sampling={"max_tokens": 6},
)


class Driver:
    """Runs `train` on a tiny policy that samples for itself, and remembers what it was told."""

    def __init__(self, policy: Policy, teacher: Policy, node: NodeDir) -> None:
        self.policy, self.teacher, self.node = policy, teacher, node
        self.evaluated: list[str] = []
        self.started: list[int] = []
        self.said: list[str] = []
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.spoil: Callable[[int, list[Row]], list[Row]] = lambda step, rows: rows

    def gather(self, step: int) -> StepBatch:
        rows = sampled_rows(self.policy, groups=2, max_tokens=6, draw=step)
        tokens = sum(row.tokens for row in rows)
        rows = self.spoil(step, taught(rows, self.teacher))
        return StepBatch(rows, {"extra": float(step)}, ("p1", "p2"), len(rows), tokens, tokens, 100.0)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self.weights[step] = weights_of(self.policy)

    def run(self, stage: Stage = OPD, stop_after: int | None = None) -> Driver:
        train(
            self.policy, stage, stage.steps or 0, objective_of(stage), self.gather, self.node,
            Spend("node", "opd", 7, 0, "train"),
            microbatch_tokens=64,
            update_flops=lambda rows: float(len(rows)),
            on_start=self.started.append,
            on_step=self.on_step,
            write_rollouts=lambda step, rows: append_jsonl(
                self.node.rollouts(step), [{"ids": row.rollout.completion_ids} for row in rows]
            ),
            evaluate=self.evaluated.append,
            beside=lambda step, last: {},
            ended=lambda step: False,
            guards=GuardMonitor(Guards(), self.node, self.said.append),
            should_stop=lambda: stop_after is not None and max(self.weights, default=0) >= stop_after,
        )  # fmt: skip
        return self


@pytest.fixture
def node(tmp_path: Path) -> NodeDir:
    return NodeDir(tmp_path / "nodes" / "opd")


def stripped(path: Path) -> list[dict[str, object]]:
    """Rows of a file without what a clock measured."""
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in read_jsonl(path)]


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_optimizer_come_back_to_the_bit(node: NodeDir, tied: bool) -> None:
    policy, stage = tiny_policy(tied=tied), stage_of("grpo")
    optimizer, rows = make_optimizer(policy, stage.optim), sampled_rows(policy)
    for _ in range(3):
        update(policy, optimizer, rows, objective_of(stage), stage, 4096)
    save_checkpoint(node, 3, policy.model, optimizer)
    other = tiny_policy(seed=9, tied=tied)
    theirs = make_optimizer(other, stage.optim)
    assert load_checkpoint(node, other.model, theirs) == 3
    assert same_bits(weights_of(other), weights_of(policy))
    held, read = optimizer.state_dict()["state"], theirs.state_dict()["state"]
    assert held.keys() == read.keys() and len(held) == len(weights_of(policy))
    assert all(same_bits(held[index], read[index]) and held[index]["step"].item() == 3 for index in held)
    # And both go on alike, to the bit.
    update(policy, optimizer, rows, objective_of(stage), stage, 4096)
    update(other, theirs, rows, objective_of(stage), stage, 4096)
    assert same_bits(weights_of(other), weights_of(policy))


def test_a_tied_head_is_still_tied_after_loading(node: NodeDir) -> None:
    policy = tiny_policy()
    save_checkpoint(node, 1, policy.model, make_optimizer(policy, OPD.optim))
    other = tiny_policy(seed=9)
    load_checkpoint(node, other.model, make_optimizer(other, OPD.optim))
    assert other.model.lm_head.weight.data_ptr() == other.model.model.embed_tokens.weight.data_ptr()


def test_a_folder_without_checkpoints_starts_at_step_zero_with_the_weights_as_they_are(node: NodeDir) -> None:
    policy = tiny_policy()
    before = weights_of(policy)
    assert load_checkpoint(node, policy.model, make_optimizer(policy, OPD.optim)) == 0
    assert same_bits(weights_of(policy), before)


@pytest.mark.parametrize("stop_after", [1, 5, 9])
def test_steps_before_and_after_an_interruption_are_the_uninterrupted_run_to_the_bit(
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
    for ours, theirs in ((node.metrics, whole.node.metrics), (node.ledger, whole.node.ledger)):
        assert stripped(ours) == stripped(theirs)
        assert [row["step"] for row in stripped(ours)] == list(range(1, 11))
    for step in range(1, 11):
        assert node.rollouts(step).read_bytes() == whole.node.rollouts(step).read_bytes()
    assert furthest(whole.weights[10], whole.weights[5]) > 1e-3


def test_a_resumed_run_needs_no_random_state(tmp_path: Path, teacher: Policy) -> None:
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


def test_a_crash_without_a_warning_goes_on_from_the_last_checkpoint_and_forgets_what_came_after(
    tmp_path: Path, teacher: Policy
) -> None:
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


def test_a_finished_stage_run_again_does_nothing(node: NodeDir, teacher: Policy) -> None:
    done = Driver(tiny_policy(), teacher, node).run()
    before = stripped(node.metrics)
    again = Driver(tiny_policy(seed=8), teacher, node).run()
    assert again.started == [10] and again.weights == {}
    assert same_bits(weights_of(again.policy), weights_of(done.policy))
    assert stripped(node.metrics) == before


def test_checkpoints_are_kept_when_due_at_the_end_and_only_the_last_two(node: NodeDir, teacher: Policy) -> None:
    driver = Driver(tiny_policy(), teacher, node).run()
    assert [path.name for path in node.checkpoints()] == ["000010", "000009"]
    assert driver.evaluated == []


def test_evaluations_in_between_are_asked_for_when_due_but_not_at_the_last_step(node: NodeDir, teacher: Policy) -> None:
    driver = Driver(tiny_policy(), teacher, node).run(OPD.model_copy(update={"eval_every": 5}))
    assert driver.evaluated == ["step-000005"]


def test_every_step_writes_the_metrics_of_the_contract_and_its_spend(node: NodeDir, teacher: Policy) -> None:
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
        tokens = sum(len(one["ids"]) for one in read_jsonl(node.rollouts(row["step"])))
        assert spent["tokens_sampled"] == spent["tokens_trained"] == spent["tokens_teacher_scored"] == tokens
        assert spent["flops"] == 108.0  # 100 to gather and 1 for each of the 8 rows
        assert spent["labels"] == ["p1", "p2"] and spent["checks"] == 8 and spent["seed"] == 7


def test_a_non_finite_step_stops_the_stage_by_name_and_keeps_the_last_good_checkpoint(
    node: NodeDir, teacher: Policy
) -> None:
    driver = Driver(tiny_policy(), teacher, node)

    def spoil(step: int, rows: list[Row]) -> list[Row]:
        if step == 7:
            teacher.model.model.embed_tokens.weight.data[6] = float("nan")
        return rows

    driver.spoil = spoil
    with pytest.raises(TrainingStoppedError, match=r"^opd, step [89] of 10: the loss is not finite"):
        driver.run()
    last = max(driver.weights)
    assert same_bits(weights_of(driver.policy), driver.weights[last])
    assert [path.name for path in node.checkpoints()] == ["000006", "000003"]
    kept = tiny_policy(seed=9)
    load_checkpoint(node, kept.model, make_optimizer(kept, OPD.optim))
    assert same_bits(weights_of(kept), driver.weights[6])


def flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[-5] ^= 1
    path.write_bytes(bytes(held))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit in the weights": lambda folder: flip(folder / "model.safetensors"),
    "a flipped bit in the optimizer": lambda folder: flip(folder / "optimizer.safetensors"),
    "weights cut short": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99),
    "no optimizer": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "another step": lambda folder: (folder / "state.json").write_text(json.dumps({"step": 99, "param_groups": []})),
    "checksums cut short": lambda folder: (folder / "sums.json").write_text('{"model.safe'),
    "checksums empty": lambda folder: (folder / "sums.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_left_out_and_the_one_before_is_used(node: NodeDir, damage: str) -> None:
    policy = tiny_policy()
    optimizer, rows, stage = make_optimizer(policy, OPD.optim), sampled_rows(policy), stage_of("sft")
    held = {}
    for step in (1, 2):
        update(policy, optimizer, rows, objective_of(stage), stage, 4096)
        save_checkpoint(node, step, policy.model, optimizer)
        held[step] = weights_of(policy)
    DAMAGE[damage](node.checkpoint(2))
    other = tiny_policy(seed=9)
    assert load_checkpoint(node, other.model, make_optimizer(other, OPD.optim)) == 1
    assert same_bits(weights_of(other), held[1])
    assert not same_bits(held[1], held[2])


def test_a_checkpoint_rests_on_its_logs_and_a_damaged_log_passes_it_over(node: NodeDir, teacher: Policy) -> None:
    driver = Driver(tiny_policy(), teacher, node).run()
    whole = stripped(node.metrics)
    content = node.metrics.read_bytes()
    rows = content.splitlines(keepends=True)
    node.metrics.write_bytes(b"".join(rows[:9]) + rows[9].replace(b'"step": 10', b'"step": 11'))
    said: list[str] = []
    other = tiny_policy(seed=9)
    assert load_checkpoint(node, other.model, make_optimizer(other, OPD.optim), said.append) == 9
    assert said == [f"{node.metrics}: is damaged, so checkpoint 000010 is passed over for the one before"]
    assert same_bits(weights_of(other), driver.weights[9])
    assert stripped(Driver(tiny_policy(seed=8), teacher, node).run().node.metrics) == whole
    node.metrics.write_bytes(content.replace(b'"step": 2,', b'"step": 3,'))
    with pytest.raises(UserError, match=r"metrics\.jsonl: is damaged"):
        load_checkpoint(node, other.model, make_optimizer(other, OPD.optim))


def test_what_a_checkpoint_rests_on_is_on_disk_before_it(
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


def test_when_every_checkpoint_is_damaged_the_user_is_told_which_and_nothing_is_changed(node: NodeDir) -> None:
    policy = tiny_policy()
    for step in (1, 2):
        save_checkpoint(node, step, policy.model, make_optimizer(policy, OPD.optim))
        flip(node.checkpoint(step) / "model.safetensors")
    other = tiny_policy(seed=9)
    before = weights_of(other)
    with pytest.raises(UserError, match="is damaged") as refused:
        load_checkpoint(node, other.model, make_optimizer(other, OPD.optim))
    assert str(node.checkpoint(2)) in str(refused.value)
    assert same_bits(weights_of(other), before)
