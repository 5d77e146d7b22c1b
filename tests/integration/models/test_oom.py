"""Runs that exhaust memory, simulated and real."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from forked_runs import Place, warm_runs
from headwater.models.policy import Policy
from runs import node, rows, tiny
from simulated_oom import OUT, Room


def test_run_records_batch_reduced_on_oom_and_keeps_it_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["stages.student_rl.steps=3", "stages.student_rl.checkpoint_every=1", "compute.microbatch_tokens=2000"]
    room = Room(nth=1)
    room.patch(monkeypatch)
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "direct_grpo", changes=changes).code == 0
    path = node(out, "direct_grpo", "student_rl")
    noted = [row["microbatch_tokens"] for row in rows(path / "metrics.jsonl")]
    assert noted[0] < 1000 and len(set(noted)) == 1
    # As if killed after step 2: what fitted then is what step 3 begins with, though there would be room for more now.
    (path / "DONE").unlink()
    shutil.rmtree(path / "checkpoint" / "000003")
    room.nth, before = 0, len(room.sizes)
    assert tiny("run", out, "--arm", "direct_grpo", changes=changes).code == 0
    assert [row["microbatch_tokens"] for row in rows(path / "metrics.jsonl")] == noted
    assert max(room.sizes[before:]) <= noted[0]


def test_scoring_out_of_memory_retries_with_smaller_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's cache, its live scores, the reference and the conditions: every pass without a gradient."""
    changes = ["stages.student_rl.sparse.kl_coef=0.1"]
    assert tiny("run", tmp_path / "whole", changes=changes).code == 0
    real, failed = Policy.completion_hidden, []

    def completion_hidden(policy: Policy, batch: Any) -> torch.Tensor:
        if batch.ids_BT.numel() > 250 and not torch.is_grad_enabled():
            failed.append(batch.ids_BT.numel())
            raise OUT["cpu"]()
        return real(policy, batch)

    monkeypatch.setattr(Policy, "completion_hidden", completion_hidden)
    assert tiny("run", tmp_path / "out", changes=changes).code == 0
    assert len(failed) >= 4
    for name in ("opd", "student_rl"):
        pairs = zip(
            *(rows(node(tmp_path / out, "bridge_rl", name) / "metrics.jsonl") for out in ("out", "whole")), strict=True
        )
        for ours, expected in pairs:
            assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-2, abs=1e-4)


LIMITED = """
import resource
from headwater.losses.batch import Row
from headwater.losses.objectives import objective_of
from headwater.training.update import make_optimizer, update
from tiny import rollout_of, stage_of, tiny_policy

policy = tiny_policy(intermediate_size=4096)
rows = [Row(rollout_of((1, 6, 2), tuple(5 + (i + j) % 10 for j in range(120)), sample=i), advantage=1.0) for i in range(128)]
stage = stage_of("sft", batch_size=128)
update(policy, make_optimizer(policy, stage.optim), rows[:2], objective_of(stage), 300)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 300 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = update(policy, make_optimizer(policy, stage.optim), rows, objective_of(stage), 1 << 20)
print(int(found["microbatch_tokens"]), int(found["tokens_trained"]))
"""


def test_cpu_out_of_memory_is_retried_with_smaller_microbatches(tmp_path: Path) -> None:
    """128 rows of 123 tokens want gigabytes for their activations at once; the process may take 300 MiB more."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED, encoding="utf-8")
    result = warm_runs().run(place=Place(script=script))
    assert result.code == 0, result.err[-2000:]
    fitted, trained = map(int, result.out.split())
    assert trained == 128 * 120
    assert 123 <= fitted <= 128 * 123 // 2


def test_freed_memory_is_reused_without_new_pages() -> None:
    """In processes of their own: it is for the whole process. 64 MiB are 16,384 pages, which come anew each time without it."""
    program = """
import os, resource, sys, torch
from headwater.models.oom import keep_freed_memory
for how in ("kept", "left"):
    if os.fork():
        if os.waitstatus_to_exitcode(os.wait()[1]) == 77:
            sys.exit(77)
        continue
    if how == "kept" and not keep_freed_memory():
        sys.exit(77)
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    counts = []
    for _ in range(3):  # the kernel may reclaim idle pages meanwhile, which only adds faults
        before = faults()
        for _ in range(20):
            torch.ones(1 << 24)
        counts.append(faults() - before)
    print(how, min(counts))
    sys.exit(0)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if result.returncode == 77:
        pytest.skip("NOT tested: this C library is not glibc")
    faults = {how: int(count) for how, count in map(str.split, result.stdout.splitlines())}
    assert 4 * faults["kept"] < faults["left"]
