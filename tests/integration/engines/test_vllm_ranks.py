"""vLLM's own engines on several ranks (CPU build, gloo): the run of one process, tensor parallelism, a lost rank."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from forked_ranks import run_ranks
from runs import environment, free_port, node, rows
from tests.integration.test_torchrun import assert_alike, command_of

HERE = importlib.util.find_spec("vllm") is not None
pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not HERE, reason="vLLM is not installed here: `make test-engines` runs these"),
]
if HERE:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
REAL = Path(__file__).parents[3] / ".real" / "SmolLM2-135M-Instruct"
CHANGES = (
    "models.student=pocket:qwen3-teacher",  # heads of 32, the smallest that vLLM's CPU kernels take
    "compute.sampler=vllm",
    "compute.vllm.compiled=false",
    "compute.vllm.cache_gb=0.1",
    "stages.opd.checkpoint_every=1",
    *(f"stages.{stage}.optim.lr=2e-5" for stage in ("teacher_rl", "warmup", "opd", "student_rl")),
)


def batches(model: str, ranks: int, size: int) -> list[dict[str, Any]]:
    """Lines of all ranks of `engine_ranks.py`."""
    script = Path(__file__).parents[2] / "support" / "engine_ranks.py"
    paths = os.pathsep.join([str(script.parent), *(entry for entry in sys.path if entry)])
    world = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PYTHONPATH": paths}
    world |= {"OMP_NUM_THREADS": 1, "TORCHDYNAMO_DISABLE": 1}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), model, str(size)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment(), **{key: str(value) for key, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    lines = []
    for process in processes:
        out, err = process.communicate(timeout=1500)
        assert process.returncode == 0, err
        lines += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return lines


@cache
def completions_of_one_process(model: str) -> dict[str, Any]:
    return {line["batch"]: line["ids"] for line in batches(model, 1, 1)}


@pytest.mark.parametrize(("ranks", "size"), [(2, 1), (2, 2), (4, 2)])
def test_engines_of_ranks_give_completions_of_one_process(ranks: int, size: int) -> None:
    """With one request and with three, some engines have none and the others unlike numbers."""
    model = "pocket:qwen3-teacher"
    lines = batches(model, ranks, size)
    print(f"{ranks} ranks, {size} for each engine:", max(line["largest"] for line in lines))
    assert len(lines) == 5 * ranks
    assert all(line["largest"] < 1e-4 for line in lines)  # the promise is 0.01
    assert all(line["ids"] == completions_of_one_process(model)[line["batch"]] for line in lines)
    first, _, _, _, changed = lines[:5]
    assert first["ids"] != changed["ids"]  # so weights of an earlier batch would have shown


@pytest.mark.skipif(not REAL.exists(), reason="SmolLM2-135M-Instruct is not here: `make real` fetches it")
def test_engines_of_two_ranks_have_log_probs_of_real_model() -> None:
    lines = batches(str(REAL), 2, 1)
    print("SmolLM2-135M:", max(line["largest"] for line in lines))
    assert len(lines) == 10 and all(line["gap"] < 0.01 for line in lines)


def test_run_on_two_ranks_survives_lost_rank_and_equals_one_process(tmp_path: Path) -> None:
    single, two = tmp_path / "one", tmp_path / "two"
    ended = run_ranks(1, *command_of(single, *CHANGES), patience=900)
    assert [rank.code for rank in ended] == [0], ended
    ended = run_ranks(2, *command_of(two, *CHANGES), faults={1: "step.begun:6=kill"}, patience=900)
    assert [rank.code for rank in ended] == [4, -9], ended
    assert "another process of this run was lost; run the same command again" in ended[0].err
    ended = run_ranks(2, *command_of(two, *CHANGES), patience=900)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert_alike(two, single)
    for stage in ("teacher_rl", "opd", "student_rl"):
        for row in rows(node(two, "bridge_rl", stage) / "metrics.jsonl"):
            assert row["sampler_gap"] < 1e-4 and row["token_mult_prob_error"] < 1.0 + 1e-3, row
