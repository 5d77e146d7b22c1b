"""Sampling split over the ranks of a process group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from headwater.config.stage import Sampling
from headwater.distributed.process_group import ProcessGroup
from headwater.models.fsdp import unsharded
from headwater.models.policy import Policy
from headwater.sampling.base import OnFinished, Request, Sampler, SamplerFactory
from headwater.types import Rollout


@dataclass(frozen=True)
class ShardedSampler:
    """Each rank samples its shard of the requests; all ranks receive all rollouts, in the order of the requests.

    local        context manager that gives this rank's sampler
    on_sampled   receives this rank's own rollouts as they finish, before the other ranks have theirs; it must not raise
    """

    ranks: ProcessGroup
    local: Callable[[], contextlib.AbstractContextManager[Sampler]]
    on_sampled: OnFinished | None = None

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        with self.local() as sampler:
            shard = sampler.sample(self.ranks.shard(requests), sampling, self.on_sampled)
        rollouts = [rollout for part in self.ranks.all_gather(shard) for rollout in part]
        if on_finished is not None:
            on_finished(rollouts)
        return rollouts


def sharded(make_sampler: SamplerFactory) -> SamplerFactory:
    """A factory whose samplers also take policies that are sharded over ranks, which all call them together."""

    def make(policy: Policy) -> Sampler:
        if policy.ranks.single_process:
            return make_sampler(policy)
        return ShardedSampler(policy.ranks, partial(unsharded_sampler, policy, make_sampler))

    return make


@contextlib.contextmanager
def unsharded_sampler(policy: Policy, make_sampler: SamplerFactory) -> Iterator[Sampler]:
    """This rank's sampler, on the policy's gathered weights: matrices in the compute type, in which they are multiplied."""
    with unsharded(policy, linear_dtype=policy.compute_dtype) as gathered:
        yield make_sampler(gathered)
