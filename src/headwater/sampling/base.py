"""Sampler protocol: requests in, rollouts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headwater.config import recipe as config
from headwater.types import Rollout


@dataclass(frozen=True, slots=True)
class Request:
    """One completion wanted. `draw` names its random numbers, so they depend on nothing else in the batch."""

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    draw: tuple[str | int, ...]


OnFinished = Callable[[Sequence[Rollout]], None]


class Sampler(Protocol):
    """Whoever samples: the embedded sampler, or an engine beside the trainer."""

    def sample(
        self, requests: Sequence[Request], sampling: config.Sampling, arrived: OnFinished | None = None
    ) -> list[Rollout]:
        """Rollouts in the order of the requests; each records the log-probs that it was drawn with.

        arrived  is told of rollouts as they finish, each once, in any order, so that grading can begin
        """
        ...


def requests_for(
    problems: Sequence[tuple[str, tuple[int, ...]]], samples: int, first: int, *draw: str | int
) -> list[Request]:
    """`samples` requests for every (problem id, prompt ids), numbered from `first`; draws are named (*draw, id, sample)."""
    return [
        Request(name, sample, ids, (*draw, name, sample))
        for name, ids in problems
        for sample in range(first, first + samples)
    ]
