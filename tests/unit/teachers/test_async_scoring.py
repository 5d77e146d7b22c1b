"""Asynchronous scoring: the teacher scores finished rollouts while the student samples, with the same results."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from headwater.errors import TrainingStoppedError
from headwater.losses.materialized import Exact
from headwater.teachers.async_scoring import AsyncScorer
from headwater.types import Rollout
from tiny import rollout_of


def rollouts(count: int) -> list[Rollout]:
    return [rollout_of((5, 6), (7,) * (1 + index), sample=index) for index in range(count)]


def lengths(part: Sequence[Rollout]) -> list[Any]:
    """Stands for a teacher: each rollout's score holds its number of tokens."""
    return [Exact(torch.full((1, 1), float(len(rollout.completion_ids)))) for rollout in part]


def test_async_scores_belong_to_their_rollouts() -> None:
    parts: list[int] = []

    def score(part: Sequence[Rollout]) -> list[Any]:
        parts.append(len(part))
        return lengths(part)

    some = rollouts(7)
    with AsyncScorer(score, 3) as ahead:
        for batch in (some[4:6], some[:4], some[6:]):
            ahead.submit(batch)
        results = ahead.results()
    assert parts == [3, 3, 1]
    assert {key: score.logp_NV.item() for key, score in results.items()} == {  # type: ignore[attr-defined]
        (rollout.problem_id, rollout.sample): len(rollout.completion_ids) for rollout in some
    }


def test_async_scoring_starts_before_last_rollout() -> None:
    begun = threading.Event()

    def score(part: Sequence[Rollout]) -> list[Any]:
        begun.set()
        return lengths(part)

    some = rollouts(4)
    with AsyncScorer(score, 2) as ahead:
        ahead.submit(some[:2])
        assert begun.wait(timeout=20)
        ahead.submit(some[2:])
        assert len(ahead.results()) == 4


def test_async_scoring_raises_thread_errors_in_caller() -> None:
    def score(part: Sequence[Rollout]) -> list[Any]:
        raise TrainingStoppedError("no room")

    with AsyncScorer(score, 1) as ahead:
        ahead.submit(rollouts(1))
        with pytest.raises(TrainingStoppedError, match="no room"):
            ahead.results()


@pytest.mark.parametrize("fails", [False, True])
def test_scoring_together_makes_equal_numbers_of_calls(fails: bool) -> None:
    parts: list[int] = []

    def score(part: Sequence[Rollout]) -> list[Any]:
        parts.append(len(part))
        return lengths(part)

    def sample() -> None:
        with AsyncScorer(score, 2, calls=4) as ahead:
            ahead.submit(rollouts(3))
            if fails:
                raise TrainingStoppedError("not finite")
            assert len(ahead.results()) == 3

    if fails:
        with pytest.raises(TrainingStoppedError, match="not finite"):
            sample()
    else:
        sample()
    assert parts == [2, 1, 0, 0]  # other ranks have more rollouts, and wait in the calls that this one lacks
