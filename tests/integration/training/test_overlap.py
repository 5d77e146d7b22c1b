"""Rollouts sampled one step ahead (`compute.overlap`): what they are trained with, exact resume, ledger, refusals."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forked_ranks import run_ranks
from forked_runs import warm_runs
from headwater.config.stage import Sampling
from headwater.distributed.process_group import SINGLE_PROCESS
from headwater.models.policy import Policy
from headwater.sampling.ahead import AheadSampler, one_at_a_time
from headwater.sampling.base import OnFinished, Request, requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.types import Rollout
from runs import WHOLE_ARM, CommandResult, assert_same, node, rows, sets, temporary, tiny
from tiny import tiny_policy

OVERLAP = (
    "compute.overlap=1",
    "stages.opd.steps=5",
    "stages.opd.checkpoint_every=2",
    "stages.student_rl.steps=3",
    "stages.student_rl.checkpoint_every=1",
    "stages.student_rl.optim.lr=1e-3",
)


def go(out: Path, *changes: str) -> CommandResult:
    return tiny("run", out, changes=[*OVERLAP, *changes])


@cache
def undisturbed() -> Path:
    out = temporary() / "whole"
    result = go(out)
    assert result.code == 0, result.err
    return out


class Recorded:
    """A sampler that records which thread asked it and a weight of its policy at that time."""

    def __init__(self, policy: Policy, calls: list[tuple[bool, float]]) -> None:
        self.policy, self.calls = policy, calls

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        weight = next(self.policy.model.parameters()).flatten()[0].item()
        self.calls.append((threading.current_thread() is threading.main_thread(), weight))
        return TorchSampler(self.policy).sample(requests, sampling, on_finished)


def requests(step: int) -> list[Request]:
    return requests_for([("a", (5, 6, 7)), ("b", (6, 7))], 2, 0, "opd", step, 0)


def ahead_of(policy: Policy, calls: list[tuple[bool, float]], steps: int = 3) -> AheadSampler:
    return AheadSampler(policy, tiny_policy(seed=3), lambda own: Recorded(own, calls), Recorded(policy, calls), steps)


def test_each_step_trains_on_weights_before_previous_update(policy: Policy, tmp_path: Path) -> None:
    calls: list[tuple[bool, float]] = []
    ahead, sampling = ahead_of(policy, calls), Sampling(max_tokens=4)
    weight = next(policy.model.parameters())
    expected = []
    for step in range(3):
        ahead.prepare((requests(step + 1), sampling) if step < 2 else None)
        sampled = TorchSampler(policy).sample(requests(step), sampling) if step == 0 else expected.pop()
        expected.append(TorchSampler(policy).sample(requests(step + 1), sampling))
        finished: list[Rollout] = []
        assert ahead.sample(requests(step), sampling, finished.extend) == sampled
        assert sorted(finished, key=lambda rollout: (rollout.problem_id, rollout.sample)) == sampled
        with torch.no_grad():
            weight.add_(1.0)  # the update
    ahead.close()
    first = calls[0][1]
    # Step 0 in this thread; steps 1 and 2 in another one, on the weights before updates 0 and 1.
    assert calls == [(True, first), (False, first), (False, first + 1.0)]


def test_checkpoint_holds_next_rollouts_bit_for_bit(policy: Policy, tmp_path: Path) -> None:
    ahead, sampling = ahead_of(policy, []), Sampling(max_tokens=4)
    ahead.prepare((requests(1), sampling))
    ahead.sample(requests(0), sampling)
    pending = ahead.wait()
    ahead.save(tmp_path, SINGLE_PROCESS)
    ahead.close()
    calls: list[tuple[bool, float]] = []
    resumed = ahead_of(tiny_policy(seed=9), calls)
    resumed.load(tmp_path, SINGLE_PROCESS)
    resumed.prepare(None)
    assert resumed.sample(requests(1), sampling) == pending and calls == []
    resumed.close()
    other = ahead_of(policy, [])
    other.load(tmp_path, SINGLE_PROCESS)
    with pytest.raises(Exception, match="the checkpoint's rollouts are not those of the next step"):
        other.sample(requests(1)[:2], sampling)
    other.close()


def test_close_ends_running_sampling(policy: Policy) -> None:
    started = threading.Event()

    class Endless:
        def sample(self, requests: object, sampling: object, on_finished: OnFinished | None = None) -> list[Rollout]:
            started.set()
            assert on_finished is not None
            while True:
                on_finished([])

    ahead = AheadSampler(policy, tiny_policy(seed=3), lambda own: Endless(), TorchSampler(policy), 2)
    ahead.prepare((requests(1), Sampling(max_tokens=2)))
    ahead.sample(requests(0), Sampling(max_tokens=2))
    assert started.wait(20)
    ahead.close()  # returns, so the thread has ended


def test_engine_samples_for_measurement_after_rollouts_ahead(policy: Policy) -> None:
    order: list[str] = []
    release = threading.Event()

    class Engine:
        def __init__(self, policy: Policy) -> None:
            self.name = policy.fingerprint

        def sample(self, requests: object, sampling: object, on_finished: OnFinished | None = None) -> list[Rollout]:
            order.append(f"{self.name} begins")
            assert self.name != "ahead" or release.wait(20)
            order.append(f"{self.name} ends")
            return []

    factory = one_at_a_time(Engine)
    ahead, measured = (factory(replace(policy, fingerprint=name)) for name in ("ahead", "measured"))
    threads = [threading.Thread(target=sampler.sample, args=([], Sampling())) for sampler in (ahead, measured)]
    threads[0].start()
    while not order:
        time.sleep(0.001)
    threads[1].start()
    release.set()
    for thread in threads:
        thread.join(20)
    assert order == ["ahead begins", "ahead ends", "measured begins", "measured ends"]


def test_run_trains_on_stale_rollouts_with_importance_weights() -> None:
    metrics = rows(node(undisturbed(), "bridge_rl", "student_rl") / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert metrics[0]["sampler_gap"] < 1e-4 and metrics[0]["importance"] == pytest.approx(1.0, abs=1e-3)
    stale = [row for row in metrics[1:] if row["updates"]]  # a step after one without a gradient is not stale
    assert stale and any(row["sampler_gap"] > 1e-3 for row in stale)


def test_ledger_charges_labels_of_trained_steps_alone() -> None:
    for stage in ("teacher_rl", "student_rl", "opd"):
        folder = node(undisturbed(), "bridge_rl", stage)
        ledger = [row for row in rows(folder / "ledger.jsonl") if row["purpose"] == "train"]
        assert [row["step"] for row in ledger] == list(range(1, len(ledger) + 1))
        for row in ledger:
            kept = rows(folder / "rollouts" / f"{row['step']:06d}.jsonl")
            assert row["tokens_sampled"] == sum(line["tokens"] for line in kept)
            assert row["labels"] == (sorted({line["problem_id"] for line in kept}) if stage != "opd" else [])


@pytest.mark.parametrize(
    "fault",
    [
        "step.charged:8=kill",
        "step.gathered:8=term",
        *(pytest.param(fault, marks=pytest.mark.many) for fault in ("step.begun:7=kill", "checkpoint.weights:4=kill")),
    ],
)
def test_killed_run_with_overlap_resumes_bit_for_bit(fault: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = warm_runs().run("run", "pocket", *WHOLE_ARM, "--out", out, *sets(*OVERLAP), fault=fault)
    assert ended.code in (-signal.SIGKILL, 130), ended.err
    if ended.code == 130:
        stage = next(
            path
            for path in (out / "nodes").glob("*")
            if (path / "checkpoint").exists() and not (path / "DONE").exists()
        )
        assert list(stage.glob("checkpoint/*/ahead.json"))
    assert go(out).code == 0
    assert_same(out, undisturbed())


@pytest.mark.many
def test_two_ranks_equal_one_with_overlap_and_resume_from_other_size(tmp_path: Path) -> None:
    changes = [*OVERLAP, *(f"stages.{stage}.optim.lr=2e-5" for stage in ("teacher_rl", "warmup", "opd", "student_rl"))]
    argv = ["run", "pocket", *WHOLE_ARM]
    assert tiny("run", tmp_path / "one", changes=changes).code == 0
    ended = run_ranks(2, *argv, "--out", tmp_path / "two", *sets(*changes), faults={1: "step.begun:8=kill"})
    assert [rank.code for rank in ended] == [4, -signal.SIGKILL], ended
    ended = run_ranks(2, *argv, "--out", tmp_path / "two", *sets(*changes))
    assert [rank.code for rank in ended] == [0, 0], ended
    for stage in ("teacher_rl", "opd", "student_rl"):
        single, double = (node(tmp_path / name, "bridge_rl", stage) for name in ("one", "two"))
        a, b = load_file(single / "model/model.safetensors"), load_file(double / "model/model.safetensors")
        assert max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in a) < 1e-4
        costs = [
            [
                {key: row[key] for key in ("labels", "checks", "tokens_sampled", "flops", "step")}
                for row in rows(path / "ledger.jsonl")
            ]
            for path in (single, double)
        ]
        assert costs[0] == costs[1]


def test_overlap_is_refused_where_further_sampling_follows_grading(tmp_path: Path) -> None:
    result = go(tmp_path / "out", "stages.student_rl.sparse.dynamic_sampling=1")
    assert result.code == 2
    assert (
        "compute.overlap: stages.student_rl.sparse.dynamic_sampling samples again after grading; set one of them to 0"
        in result.err
    )
