"""Teacher scoring while the student is still sampling: what has finished is scored in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from headwater.losses.distributions import Distributions
from headwater.types import Rollout

Key = tuple[str, int]
Score = Callable[[Sequence[Rollout]], list[Distributions]]


class AsyncScorer:
    """Scores rollouts part by part as they finish.

    Which rollouts form a part follows from the order in which they finish and from nothing that depends on time, so the
    same sampler gives the same scores to the last bit.

    score  rollouts -> their teacher's distributions, in order
    size   rollouts of a part

    Example: with size 2, rollouts that finish as a, b, c are scored as (a, b) while c is sampled, and then (c).
    """

    def __init__(self, score: Score, size: int) -> None:
        self.score, self.size = score, size
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: list[Rollout] = []
        self.parts: list[tuple[list[Key], Future[list[Distributions]]]] = []

    def __enter__(self) -> AsyncScorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)

    def submit(self, finished: Sequence[Rollout]) -> None:
        for rollout in finished:
            self.pending.append(rollout)
            if len(self.pending) == self.size:
                self._begin()

    def results(self) -> dict[Key, Distributions]:
        """The scores of all that arrived, by (problem id, sample); waits for what is still to be done."""
        if self.pending:
            self._begin()
        done: dict[Key, Distributions] = {}
        for keys, future in self.parts:
            done.update(zip(keys, future.result(), strict=True))
        self.parts = []
        return done

    def _begin(self) -> None:
        part, self.pending = self.pending, []
        keys = [(rollout.problem_id, rollout.sample) for rollout in part]
        self.parts.append((keys, self.thread.submit(self._scored, part)))

    @torch.no_grad()
    def _scored(self, part: list[Rollout]) -> list[Distributions]:
        return self.score(part)
