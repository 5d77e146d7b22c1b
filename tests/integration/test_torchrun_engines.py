"""vLLM engines on several ranks, with a stand-in that computes with transformers: the run of one process, faults, refusals."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest

import fake_vllm
from forked_ranks import Rank, run_ranks
from runs import node, rows, temporary
from tests.integration.test_torchrun import assert_alike, command_of

CHANGES = (
    "compute.sampler=vllm",
    "stages.opd.checkpoint_every=1",
    *(f"stages.{stage}.optim.lr=2e-5" for stage in ("teacher_rl", "warmup", "opd", "student_rl")),  # as test_torchrun
)
SCRIPT = fake_vllm.__file__
pytestmark = pytest.mark.timeout(900)


def run(
    out: Path, size: int, *changes: str, options: tuple[str, ...] = (), faults: dict[int, str] | None = None
) -> list[Rank]:
    argv = command_of(out, *CHANGES, *changes)
    return run_ranks(size, *argv, *options, script=SCRIPT, faults=faults, patience=400)


@cache
def one_process() -> Path:
    out = temporary() / "one-engine"
    ended = run(out, 1)
    assert [rank.code for rank in ended] == [0], ended
    return out


@pytest.mark.parametrize(
    ("size", "devices"),
    [(2, 2), pytest.param(2, 1, marks=pytest.mark.many), pytest.param(4, 2, marks=pytest.mark.many)],
)
def test_engines_of_several_ranks_equal_one_process(size: int, devices: int, tmp_path: Path) -> None:
    """Of an engine of two ranks each must get the same requests, or the stand-in stops."""
    ended = run(tmp_path / "out", size, f"compute.vllm.tensor_parallel_size={devices}")
    assert [rank.code for rank in ended] == [0] * size, ended
    assert_alike(tmp_path / "out", one_process())
    for stage in ("teacher_rl", "opd", "student_rl"):
        for row in rows(node(tmp_path / "out", "bridge_rl", stage) / "metrics.jsonl"):
            assert row["sampler_gap"] < 1e-4 and 1.0 <= row["token_mult_prob_error"] < 1.0 + 1e-4, row


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra `lora` is not installed")
def test_engines_get_merged_adapters_matrix_by_matrix(tmp_path: Path) -> None:
    changes = ("models.lora.r=4", "models.lora.alpha=8", "stages.student_rl.optim.lr=0.01")
    ended = run(tmp_path / "two", 2, *changes, options=("--arm", "direct_grpo"))
    assert [rank.code for rank in ended] == [0, 0], ended
    metrics = rows(node(tmp_path / "two", "direct_grpo", "student_rl") / "metrics.jsonl")
    assert max(row["sampler_gap"] for row in metrics) < 1e-4  # after large steps that the base weights do not have


def test_killed_rank_ends_engines_and_same_command_resumes(tmp_path: Path) -> None:
    ended = run(tmp_path / "out", 2, faults={1: "step.begun:6=kill"})
    assert [rank.code for rank in ended] == [4, -9], ended
    assert "another process of this run was lost; run the same command again" in ended[0].err
    again = run(tmp_path / "out", 2)
    assert [rank.code for rank in again] == [0, 0], again
    assert_alike(tmp_path / "out", one_process())


def test_full_device_of_one_rank_ends_run_with_its_sentence(tmp_path: Path) -> None:
    ended = run(tmp_path / "out", 2, f"compute.vllm.memory={fake_vllm.FULL}")
    assert "process 1 of 2: " in ended[1].err and "memory ran out in vLLM's engine of " in ended[1].err, ended
    assert ended[0].code == 4 and "another process of this run was lost" in ended[0].err, ended


def test_tensor_parallel_size_must_divide_ranks(tmp_path: Path) -> None:
    ended = run(tmp_path / "out", 2, "compute.vllm.tensor_parallel_size=3")
    assert [rank.code for rank in ended] == [2, 2], ended
    assert "compute.vllm.tensor_parallel_size: 3 does not divide the 2 processes of this run" in ended[0].err
