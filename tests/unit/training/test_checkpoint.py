"""Checkpoints: bitwise round trip, and damaged ones are skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from headwater.errors import UserError
from headwater.losses.objectives import objective_of
from headwater.storage.node_dir import NodeDir
from headwater.training.checkpoint import load_checkpoint, save_checkpoint
from headwater.training.update import make_optimizer, update
from tiny import same_bits, sampled_rows, stage_of, tiny_policy, weights_of

OPD = stage_of(
    "opd",
    steps=10,
    checkpoint_every=3,
    optim={"lr": 3e-3, "schedule": "cosine", "warmup": 0.3, "weight_decay": 0.1},
    sampling={"max_tokens": 6},
)


@pytest.fixture
def node(tmp_path: Path) -> NodeDir:
    return NodeDir(tmp_path / "nodes" / "opd")


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_round_trips_weights_and_optimizer_bitwise(node: NodeDir, tied: bool) -> None:
    policy, stage = tiny_policy(tied=tied), stage_of("grpo")
    optimizer, rows = make_optimizer(policy, stage.optim), sampled_rows(policy)
    for _ in range(3):
        update(policy, optimizer, rows, objective_of(stage), 4096)
    save_checkpoint(node, 3, policy.model, optimizer)
    other = tiny_policy(seed=9, tied=tied)
    restored = make_optimizer(other, stage.optim)
    assert load_checkpoint(node, other.model, restored) == 3
    assert same_bits(weights_of(other), weights_of(policy))
    saved, read = optimizer.state_dict()["state"], restored.state_dict()["state"]
    assert saved.keys() == read.keys() and len(saved) == len(weights_of(policy))
    assert all(same_bits(saved[index], read[index]) and saved[index]["step"].item() == 3 for index in saved)
    # And both go on alike, to the bit.
    update(policy, optimizer, rows, objective_of(stage), 4096)
    update(other, restored, rows, objective_of(stage), 4096)
    assert same_bits(weights_of(other), weights_of(policy))


def test_checkpoint_keeps_tied_head_tied(node: NodeDir) -> None:
    policy = tiny_policy()
    save_checkpoint(node, 1, policy.model, make_optimizer(policy, OPD.optim))
    other = tiny_policy(seed=9)
    load_checkpoint(node, other.model, make_optimizer(other, OPD.optim))
    assert other.model.lm_head.weight.data_ptr() == other.model.model.embed_tokens.weight.data_ptr()


def test_load_checkpoint_without_checkpoint_returns_step_zero(node: NodeDir) -> None:
    policy = tiny_policy()
    before = weights_of(policy)
    assert load_checkpoint(node, policy.model, make_optimizer(policy, OPD.optim)) == 0
    assert same_bits(weights_of(policy), before)


def flip(path: Path) -> None:
    saved = bytearray(path.read_bytes())
    saved[-5] ^= 1
    path.write_bytes(bytes(saved))


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
def test_load_checkpoint_skips_damaged_one(node: NodeDir, damage: str) -> None:
    policy = tiny_policy()
    optimizer, rows, stage = make_optimizer(policy, OPD.optim), sampled_rows(policy), stage_of("sft")
    saved = {}
    for step in (1, 2):
        update(policy, optimizer, rows, objective_of(stage), 4096)
        save_checkpoint(node, step, policy.model, optimizer)
        saved[step] = weights_of(policy)
    DAMAGE[damage](node.checkpoint(2))
    other = tiny_policy(seed=9)
    assert load_checkpoint(node, other.model, make_optimizer(other, OPD.optim)) == 1
    assert same_bits(weights_of(other), saved[1])
    assert not same_bits(saved[1], saved[2])


def test_load_checkpoint_names_every_damaged_one_and_changes_nothing(node: NodeDir) -> None:
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
