"""Teacher scoring in a background thread, while the student is still sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType

import torch

from headwater.losses.distributions import Distributions
from headwater.types import Rollout, RolloutKey

Score = Callable[[Sequence[Rollout]], list[Distributions]]


class AsyncScorer:
    """Scores rollouts in chunks as they finish; use it as a context manager.

    Chunks follow from the order in which rollouts finish and not from timing, so the same sampler gives bit-identical scores.

    score   rollouts -> their teacher's distributions, in order
    size    rollouts of a chunk
    calls   least number of calls of `score`, the last of them without rollouts: where ranks score together, each calls it
            equally often, also when this one stops with an error
    device  GPU that the thread uses

    Example: with size 2, rollouts that finish as a, b, c are scored as (a, b) while c is sampled, and then (c).
    """

    def __init__(self, score: Score, size: int, calls: int = 0, device: torch.device | None = None) -> None:
        self.score, self.size, self.calls = torch.no_grad()(score), size, calls
        gpu = device is not None and device.type == "cuda"
        self.thread = ThreadPoolExecutor(1, initializer=partial(torch.cuda.set_device, device) if gpu else None)
        self.pending: list[Rollout] = []
        self.chunks: list[tuple[list[RolloutKey], Future[list[Distributions]]]] = []

    def __enter__(self) -> AsyncScorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and self.calls:
            self._finish_calls()
        self.thread.shutdown(wait=True, cancel_futures=not self.calls)

    def submit(self, finished: Sequence[Rollout]) -> None:
        for rollout in finished:
            self.pending.append(rollout)
            if len(self.pending) == self.size:
                self._start_chunk()

    def results(self) -> dict[RolloutKey, Distributions]:
        """Wait for all submitted rollouts: distributions by (problem id, sample). Raises what `score` raised."""
        self._finish_calls()
        scores: dict[RolloutKey, Distributions] = {}
        for keys, future in self.chunks:
            scores.update(zip(keys, future.result(), strict=True))
        self.chunks, self.calls = [], 0
        return scores

    def _finish_calls(self) -> None:
        while self.pending or len(self.chunks) < self.calls:
            self._start_chunk()

    def _start_chunk(self) -> None:
        chunk, self.pending = self.pending, []
        keys = [rollout.key for rollout in chunk]
        self.chunks.append((keys, self.thread.submit(self.score, chunk)))
