"""Continuous batching: sequences enter and leave, cache slots are reused, and no sequence influences another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headwater.config.stage import Sampling
from headwater.kernels import kernels
from headwater.models.policy import Policy
from headwater.sampling import fast_decoder, torch_sampler
from headwater.sampling.base import Request, requests_for
from headwater.sampling.fast_decoder import FastDecoder
from headwater.sampling.kv_cache import KVCache
from headwater.sampling.torch_sampler import TorchSampler
from headwater.types import Rollout
from tiny import PROMPTS, tiny_policy

LONG = tuple(
    (1, *((5 + 3 * index + place) % 18 + 4 for place in range(length)), 2)
    for index, length in enumerate((1, 40, 7, 70, 2, 23))
)
MIXED = PROMPTS + LONG
"""Prompts of 3 to 72 tokens."""


def requests(samples: int = 4, prompts: tuple[tuple[int, ...], ...] = MIXED) -> list[Request]:
    return requests_for([(f"p{index}", prompt) for index, prompt in enumerate(prompts)], samples, 0, "batching", 1)


def outcomes(rollouts: list[Rollout]) -> list[tuple[str, int, tuple[int, ...], str]]:
    return [(rollout.problem_id, rollout.sample, rollout.completion_ids, rollout.finish) for rollout in rollouts]


def plain_logp(policy: Policy, rollout: Rollout) -> list[float]:
    """The completion's log-probs by the plain model, without cache, padding or other sequences."""
    with torch.no_grad():
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logp = torch.log_softmax(policy.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1], dim=-1)
    return logp[torch.arange(len(logp)), torch.tensor(rollout.completion_ids)].tolist()


def assert_plain_logp(policy: Policy, rollouts: list[Rollout]) -> None:
    for rollout in rollouts:
        assert rollout.sampler_logp == pytest.approx(plain_logp(policy, rollout), abs=2e-5)


@cache
def sampled_in_one_batch(name: str) -> tuple[Policy, list[Rollout], list[list[float]]]:
    """A policy, its rollouts of all requests at once, and their log-probs by the plain model."""
    policy = tiny_policy(name, seed=2, std=0.2)
    rollouts = TorchSampler(policy, batch=64).sample(requests(), Sampling(max_tokens=90))
    return policy, rollouts, [plain_logp(policy, rollout) for rollout in rollouts]


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2"])
@pytest.mark.parametrize("batch", [3, 8])
def test_batch_size_does_not_change_completions(name: str, batch: int) -> None:
    policy, whole, plain = sampled_in_one_batch(name)
    lengths = sorted(len(rollout.completion_ids) for rollout in whole)
    assert lengths[0] <= 6 and lengths[-1] == 90 and len(set(lengths)) > 8
    small_batch = TorchSampler(policy, batch=batch).sample(requests(), Sampling(max_tokens=90))
    assert outcomes(small_batch) == outcomes(whole)
    for rollout, expected in zip(small_batch, plain, strict=True):
        assert rollout.sampler_logp == pytest.approx(expected, abs=2e-5)


def test_reused_cache_slots_do_not_leak_earlier_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache columns past a row's end become huge and free slots NaN, so that any read of them changes the output."""
    policy = tiny_policy(seed=2, std=0.2)
    clean = TorchSampler(policy, batch=5).sample(requests(), Sampling(max_tokens=40))
    insert, reserve_column = KVCache.insert, KVCache.reserve_column
    spoilt = Counter[str]()

    def spoil_places(self: KVCache, *args: Any) -> torch.Tensor:
        for table in (*self.keys, *self.values):
            table[len(self) :] = torch.nan
            spoilt["places"] += table[len(self) :].numel()
        return insert(self, *args)

    def spoil_columns_past_the_end(self: KVCache) -> int:
        window = reserve_column(self)
        for row, length in enumerate(self.lengths):
            for table in (*self.keys, *self.values):
                table[row, :, length + 1 :] = 1e6
                spoilt["columns"] += table[row, :, length + 1 : window].numel()
        return window

    monkeypatch.setattr(KVCache, "insert", spoil_places)
    monkeypatch.setattr(KVCache, "reserve_column", spoil_columns_past_the_end)
    again = TorchSampler(policy, batch=5).sample(requests(), Sampling(max_tokens=40))
    assert spoilt["places"] > 0 and spoilt["columns"] > 0
    assert outcomes(again) == outcomes(clean)
    assert_plain_logp(policy, again)


def record_forward_ids(monkeypatch: pytest.MonkeyPatch, forward_ids: list[list[list[int]]]) -> None:
    """Record the ids (rows, tokens) of every forward pass."""
    forward: Callable[..., torch.Tensor] = FastDecoder._forward

    def watch(self: FastDecoder, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        forward_ids.append(ids.tolist())
        return forward(self, ids, *rest)

    monkeypatch.setattr(FastDecoder, "_forward", watch)


@pytest.mark.parametrize("budget", [1, 100, 4096])
def test_prefill_runs_each_distinct_prompt_once_within_token_budget(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(seed=2, std=0.2)
    forward_ids: list[list[list[int]]] = []
    record_forward_ids(monkeypatch, forward_ids)
    monkeypatch.setattr(fast_decoder, "PREFILL_TOKENS", budget)
    # Every prompt is requested under two names; its eight samples enter at different times.
    wanted_requests = [*requests(), *requests_for([(f"q{i}", prompt) for i, prompt in enumerate(MIXED)], 4, "other")]
    rollouts = TorchSampler(policy, batch=5).sample(wanted_requests, Sampling(max_tokens=12))
    prefills = [ids for ids in forward_ids if len(ids[0]) > 1]
    ran = Counter(
        tuple(row[: len(prompt)])
        for ids in prefills
        for row in ids
        for prompt in MIXED
        if tuple(row[: len(prompt)]) == prompt
    )
    assert ran == Counter(MIXED) and sum(map(len, prefills)) == len(MIXED)
    assert all(len(ids) == 1 or len(ids) * len(ids[0]) <= budget for ids in prefills)
    assert_plain_logp(policy, rollouts)


def test_batch_stays_full_and_finished_sequences_take_no_decode_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tiny_policy(seed=2, std=0.2)
    forward_ids: list[list[list[int]]] = []
    record_forward_ids(monkeypatch, forward_ids)
    size = 16
    rollouts = TorchSampler(policy, batch=size).sample(requests(samples=30), Sampling(max_tokens=30))
    steps = [len(ids) for ids in forward_ids if len(ids[0]) == 1]
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    assert sum(steps) == tokens - len(rollouts)  # a completion's first token needs no step of its own
    assert max(steps) <= size
    # Before the last request enters, fewer than 2 of the 16 slots are free, except in the step after a row ends.
    assert len(steps) <= tokens / (size - 2) * 1.1 + 30


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_check_interval_for_finished_sequences_does_not_change_completions(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(name, seed=2, std=0.2)
    often = TorchSampler(policy, batch=6).sample(requests(), Sampling(max_tokens=21))
    monkeypatch.setattr(torch_sampler, "CHECK_EVERY_CPU", 8)
    seldom = TorchSampler(policy, batch=6).sample(requests(), Sampling(max_tokens=21))
    assert outcomes(seldom) == outcomes(often)
    assert_plain_logp(policy, seldom)


def test_on_finished_reports_rollouts_in_deterministic_order() -> None:
    policy = tiny_policy(seed=2, std=0.2)
    orders: list[list[tuple[str, int]]] = [[], []]
    for order in orders:
        TorchSampler(policy, batch=7).sample(
            requests(), Sampling(max_tokens=20), lambda finished, order=order: order.extend((r.problem_id, r.sample) for r in finished)
        )  # fmt: skip
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted((request.problem_id, request.sample) for request in requests())


def test_wide_vocabulary_with_packed_head_gives_trainer_log_probs() -> None:
    policy = tiny_policy(seed=3, vocab_size=5000)
    rollouts = TorchSampler(policy, batch=6).sample(requests(samples=2), Sampling(max_tokens=12))
    assert len({token for rollout in rollouts for token in rollout.completion_ids}) > 50
    assert_plain_logp(policy, rollouts)


def test_kv_cache_grows_only_to_longest_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(seed=2, std=0.0)  # uniform distributions
    monkeypatch.setattr(fast_decoder, "INITIAL_COLUMNS", 4)
    columns: list[int] = []
    reserve_column = KVCache.reserve_column

    def watch(self: KVCache) -> int:
        window = reserve_column(self)
        columns.append(self.columns)
        return window

    monkeypatch.setattr(KVCache, "reserve_column", watch)
    rollouts = TorchSampler(policy, batch=4).sample(requests(samples=3, prompts=PROMPTS), Sampling(max_tokens=60))
    longest = max(rollout.length for rollout in rollouts)
    lanes = fast_decoder.LANES if kernels() else 1  # the number of columns is a multiple of this
    assert columns[0] == -(-(9 + 4) // lanes) * lanes and len(set(columns)) >= 3  # it grew twice
    assert longest - 1 <= max(columns) <= -(-(9 + 60) // lanes) * lanes
    assert_plain_logp(policy, rollouts)


def test_sample_of_no_requests_returns_no_rollouts() -> None:
    assert TorchSampler(tiny_policy()).sample([], Sampling(max_tokens=4)) == []


POLICY = tiny_policy("llama", seed=5, std=0.2)


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    order=st.permutations(range(12)),
    batch=st.integers(1, 13),
    limit=st.integers(1, 20),
    chosen=st.lists(st.integers(0, len(MIXED) - 1), min_size=12, max_size=12),
)
def test_completion_depends_only_on_its_own_request(
    order: list[int], batch: int, limit: int, chosen: list[int]
) -> None:
    own_requests = [Request(f"p{which}", index, MIXED[which], ("own", index)) for index, which in enumerate(chosen)]
    single = [TorchSampler(POLICY).sample([request], Sampling(max_tokens=limit))[0] for request in own_requests]
    rollouts = TorchSampler(POLICY, batch=batch).sample([own_requests[i] for i in order], Sampling(max_tokens=limit))
    assert outcomes(rollouts) == outcomes([single[i] for i in order])
