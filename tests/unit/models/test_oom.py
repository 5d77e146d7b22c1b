"""Out of memory: retry in smaller pieces with the same result, and keep the size that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from headwater.config.stage import Sampling, Stage
from headwater.errors import TrainingStoppedError
from headwater.losses.batch import Row, packed_microbatches
from headwater.losses.objectives import objective_of
from headwater.models.oom import BatchBudget, is_out_of_memory
from headwater.models.policy import Policy
from headwater.sampling.base import OnFinished, Request, requests_for
from headwater.sampling.torch_sampler import OomRetrySampler, TorchSampler
from headwater.teachers.scoring import logp_of
from headwater.training.update import make_optimizer, update
from simulated_oom import OUT, Room
from tiny import PROMPTS, copied, furthest, same_bits, sampled_rows, stage_of, taught, tiny_policy, weights_of


@cache
def undisturbed_step(objective: str) -> tuple[Policy, list[Row], Stage, Policy, dict[str, float]]:
    """(policy, rows, stage, policy after an optimizer step, its statistics) where memory suffices. Tests must not change them."""
    policy, teacher = tiny_policy("qwen3", seed=0), tiny_policy("qwen3", seed=1)
    rows_ = taught(sampled_rows(policy, groups=4), teacher)
    stage = stage_of(objective, batch_size=16, optim={"lr": 1e-3, "eps": 1e-4, "grad_clip": 0.5})
    whole = copied(policy)
    expected = update(whole, make_optimizer(whole, stage.optim), rows_, objective_of(stage), 48)
    assert len(packed_microbatches(rows_, 48)) >= 3
    return policy, rows_, stage, whole, expected


@pytest.mark.parametrize("error", OUT)
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("objective", ["grpo", "opd"])
def test_optimizer_step_is_retried_on_oom_with_same_result(
    objective: str, nth: int, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, rows_, stage, whole, expected = undisturbed_step(objective)
    hurt = copied(policy)
    room = Room(nth=nth, error=OUT[error])
    room.patch(monkeypatch)
    stats = update(hurt, make_optimizer(hurt, stage.optim), rows_, objective_of(stage), 48)
    moved = furthest(weights_of(whole), weights_of(policy))
    assert furthest(weights_of(hurt), weights_of(whole)) < 1e-3 * moved
    assert stats["microbatch_tokens"] == 24 and expected["microbatch_tokens"] == 48
    same = ("loss", "grad_norm", "entropy", "tokens_trained", "updates", "sampler_gap")
    assert {key: stats[key] for key in same} == {key: pytest.approx(expected[key], rel=1e-4, abs=1e-6) for key in same}
    assert max(room.sizes[nth:]) <= 24 < max(room.sizes[:nth])


def test_optimizer_steps_on_batch_halve_and_keep_microbatch_on_oom(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_, stage = sampled_rows(policy, groups=4), stage_of("grpo", batch_size=16, minibatches=2, passes=2)
    whole, hurt = copied(policy), copied(policy)
    update(whole, make_optimizer(whole, stage.optim), rows_, objective_of(stage), 4096)
    room = Room(most=60)
    room.patch(monkeypatch)
    stats = update(hurt, make_optimizer(hurt, stage.optim), rows_, objective_of(stage), 4096)
    moved = furthest(weights_of(whole), weights_of(policy))
    assert furthest(weights_of(hurt), weights_of(whole)) < 2e-2 * moved and stats["updates"] == 4
    assert stats["microbatch_tokens"] <= 60
    failed = [place for place, size in enumerate(room.sizes) if size > 60]
    assert failed and max(failed) < 4  # all in the first optimizer step; the others know what fits


def test_oom_of_single_row_stops_without_changing_state(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_, stage = sampled_rows(policy, groups=4), stage_of("grpo", batch_size=16)
    optimizer = make_optimizer(policy, stage.optim)
    update(policy, optimizer, rows_, objective_of(stage), 4096)
    before, state = weights_of(policy), state_of(optimizer)
    Room(most=3).patch(monkeypatch)
    with pytest.raises(
        TrainingStoppedError, match=r"memory ran out even with 17 tokens \(the longest row alone\)"
    ) as stopped:
        update(policy, optimizer, rows_, objective_of(stage), 4096)
    assert stopped.value.exit_code == 4 and "gradient_checkpointing" in str(stopped.value)
    assert same_bits(weights_of(policy), before) and same_bits(state_of(optimizer), state)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state_by_index = optimizer.state_dict()["state"]
    return {f"{place}.{key}": value.clone() for place, state in state_by_index.items() for key, value in state.items()}


def test_other_errors_are_not_treated_as_oom(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of("grpo", batch_size=8)
    Room(nth=1, error=lambda: RuntimeError("a matrix is singular")).patch(monkeypatch)
    with pytest.raises(RuntimeError, match="singular"):
        update(policy, make_optimizer(policy, stage.optim), sampled_rows(policy), objective_of(stage), 4096)
    assert all(is_out_of_memory(make()) for make in OUT.values())
    assert not is_out_of_memory(ValueError("out of memory")) and not is_out_of_memory(RuntimeError("shape"))


def test_scoring_halves_batch_on_oom_with_same_result(policy: Policy) -> None:
    rollouts = [row.rollout for row in sampled_rows(policy, groups=4)]
    token_budgets: list[int] = []

    def score(tokens: int) -> list[torch.Tensor]:
        token_budgets.append(tokens)
        if tokens > 50:
            raise OUT["cpu"]()
        return logp_of(policy, rollouts, tokens)

    budget = BatchBudget(4096)
    scores = budget.fit_passes(score, rollouts)
    longest = max(rollout.length for rollout in rollouts)
    assert (
        token_budgets == [4096, 16 * longest // 2, 16 * longest // 4, 16 * longest // 8]
        and budget.size == token_budgets[-1]
    )
    for ours, expected in zip(scores, logp_of(policy, rollouts, 4096), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TrainingStoppedError, match="the longest row alone"):
        budget.fit_passes(lambda tokens: (_ for _ in ()).throw(MemoryError), rollouts)


@dataclass(frozen=True)
class Cramped:
    """A sampler that has room for so many sequences, and fails on a batch after it has told of the ones before."""

    policy: Policy
    batch: int
    room: int
    decoded: list[int]

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Any]:
        finished: list[Any] = []
        for start in range(0, len(requests), self.batch):
            part = requests[start : start + self.batch]
            if len(part) > self.room and start:
                raise OUT["cuda"]()
            self.decoded.append(len(part))
            finished += TorchSampler(self.policy).sample(part, sampling, on_finished)
        return finished


def test_sampler_halves_batch_on_oom_and_reports_rollouts_once(policy: Policy) -> None:
    wanted = requests_for([(str(place), prompt) for place, prompt in enumerate(PROMPTS)], 8, 0, "memory")
    expected = TorchSampler(policy).sample(wanted, Sampling(max_tokens=6))
    reported: list[tuple[str, int]] = []
    decoded: list[int] = []
    frugal = OomRetrySampler(lambda batch: Cramped(policy, batch, 5, decoded), BatchBudget(12))
    rollouts = frugal.sample(
        wanted, Sampling(max_tokens=6), lambda done: reported.extend((r.problem_id, r.sample) for r in done)
    )
    assert [(r.problem_id, r.sample, r.completion_ids) for r in rollouts] == [
        (r.problem_id, r.sample, r.completion_ids) for r in expected
    ]
    assert sorted(reported) == sorted((request.problem_id, request.sample) for request in wanted)
    # 12 fit at first, since only later batches lack room; then 6 do once; the rest comes by threes.
    assert frugal.batch.size == 3 and decoded == [12, 6, *[3] * 4, 2]


def test_sampler_without_memory_for_one_sequence_stops(policy: Policy) -> None:
    def nothing_fits(batch: int) -> TorchSampler:
        raise OUT["cpu"]()

    wanted = requests_for([("a", PROMPTS[0])], 4, 0, "memory")
    with pytest.raises(TrainingStoppedError, match="even with 1 sequence at a time"):
        OomRetrySampler(nothing_fits, BatchBudget(256)).sample(wanted, Sampling(max_tokens=4))


def test_optimizer_without_memory_for_its_state_stops(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of("grpo", batch_size=8)
    optimizer = make_optimizer(policy, stage.optim)

    def no_room() -> None:
        raise OUT["cuda"]()

    monkeypatch.setattr(optimizer, "step", no_room)
    with pytest.raises(TrainingStoppedError, match="memory ran out in the optimizer's step"):
        update(policy, optimizer, sampled_rows(policy), objective_of(stage), 4096)
