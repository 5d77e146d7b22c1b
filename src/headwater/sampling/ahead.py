"""Sample the next step's rollouts in a thread while the policy trains (`compute.overlap`): rollouts are one step stale.

Step n, from 0, trains on rollouts of the weights before update n − 1, and step 0 on those of the initial weights. The loss corrects for
it with truncated importance weights (`losses.token_losses.truncated_importance`). A copy of the weights samples, so sampling and
training do not wait for each other, and what is measured between steps is measured on the current weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock

from headwater.config.stage import Sampling
from headwater.distributed.process_group import ProcessGroup
from headwater.errors import UserError
from headwater.models.fsdp import copy_weights
from headwater.models.policy import Policy
from headwater.sampling.base import OnFinished, Request, Sampler, SamplerFactory
from headwater.storage.files import read_json, write_json
from headwater.types import Rollout

FILE = "ahead.json"
"""In a checkpoint's folder: the rollouts of the next step. The weights that sampled them are in no checkpoint."""

Job = tuple[Sequence[Request], Sampling]


class AheadSampler:
    """Sampler of one training stage. Each call returns rollouts sampled during the step before, then starts the next ones.

    copy          a frozen model of the policy's architecture, whole on this rank, which receives the policy's weights
    make_sampler  samples from the copy, in the thread
    now           samples from the policy itself where nothing was sampled ahead: in a stage's first step
    steps         number of the stage's steps

    Grading and scoring start when the rollouts are taken, so a label is used in the step that trains on it.
    """

    def __init__(self, policy: Policy, copy: Policy, make_sampler: SamplerFactory, now: Sampler, steps: int) -> None:
        self.steps = steps
        self._policy, self._copy, self._make_sampler, self._now = policy, copy, make_sampler, now
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._next: Job | None = None
        self._future: Future[list[Rollout]] | None = None
        self._rollouts: list[Rollout] | None = None
        self._closed = False

    def prepare(self, job: Job | None) -> None:
        """Set what the next call of `sample` starts once it has its own rollouts; None after the last step."""
        self._next = job

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        rollouts, self._rollouts = self.wait(), None
        if rollouts is None:
            rollouts = self._now.sample(requests, sampling, on_finished)
            self._start()
            return rollouts
        if [rollout.key for rollout in rollouts] != [request.key for request in requests]:
            raise UserError(f"{FILE}: the checkpoint's rollouts are not those of the next step; delete the checkpoint")
        self._start()
        if on_finished is not None:
            on_finished(rollouts)
        return rollouts

    def wait(self) -> list[Rollout] | None:
        """The rollouts sampled ahead, those of all ranks on every rank; None if there are none. Raises what sampling raised."""
        if self._future is not None:
            own = self._future.result()
            self._future = None
            self._rollouts = [rollout for part in self._policy.ranks.all_gather(own) for rollout in part]
        return self._rollouts

    def save(self, folder: Path, ranks: ProcessGroup) -> None:
        """Write the rollouts that `wait` returned into a checkpoint's folder; all ranks hold the same."""
        if ranks.is_main and self._rollouts is not None:
            write_json(folder / FILE, [asdict(rollout) for rollout in self._rollouts])

    def load(self, folder: Path, ranks: ProcessGroup) -> None:
        """Continue with a checkpoint's rollouts: what is resumed equals what was not interrupted."""
        if (folder / FILE).exists():
            self._rollouts = [Rollout.from_json(fields) for fields in read_json(folder / FILE)]

    def close(self) -> None:
        """End the thread, and drop what it samples."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        if self._next is None:
            return
        requests, sampling = self._next
        copy_weights(self._policy, self._copy)
        # A new value for new weights: an engine keeps those of a frozen policy that it has loaded.
        sampler = self._make_sampler(replace(self._copy, fingerprint=self._policy.fingerprint))
        own = self._policy.ranks.shard(requests)
        self._future = self._thread.submit(sampler.sample, own, sampling, self._end_if_closed)

    def _end_if_closed(self, finished: Sequence[Rollout]) -> None:
        if self._closed:
            raise InterruptedError


@dataclass(frozen=True)
class LockedSampler:
    """A sampler that waits until no other one of its factory samples."""

    sampler: Sampler
    lock: Lock

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        with self.lock:
            return self.sampler.sample(requests, sampling, on_finished)


def one_at_a_time(make_sampler: SamplerFactory) -> SamplerFactory:
    """A factory whose samplers take turns: a measurement waits for the rollouts that are sampled ahead."""
    lock = Lock()
    return lambda policy: LockedSampler(make_sampler(policy), lock)
