"""Sampling split over the ranks of a process group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from headwater.config import recipe as config
from headwater.distributed.process_group import ProcessGroup
from headwater.models.fsdp import unsharded
from headwater.models.policy import Policy
from headwater.sampling.base import OnFinished, Request, Sampler
from headwater.types import Rollout


@dataclass(frozen=True)
class ShardedSampler:
    """A sampler of which each rank samples its share of the requests; every rank is then handed all rollouts, in their order.

    alone  the sampler of one rank, as long as it is needed
    """

    ranks: ProcessGroup
    alone: Callable[[], contextlib.AbstractContextManager[Sampler]]

    def sample(
        self, requests: Sequence[Request], sampling: config.Sampling, arrived: OnFinished | None = None
    ) -> list[Rollout]:
        with self.alone() as sampler:
            found = sampler.sample(self.ranks.share(requests), sampling)
        every = [one for part in self.ranks.all_gather(found) for one in part]
        if arrived is not None:
            arrived(every)
        return every


@contextlib.contextmanager
def sampling(policy: Policy, make: Callable[[Policy], Sampler]) -> Iterator[Sampler]:
    """The sampler of one rank, from the whole policy."""
    with unsharded(policy) as held:
        yield make(held)
