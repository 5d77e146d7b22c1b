"""Sampler protocol: requests in, rollouts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headwater import seeds
from headwater.config.stage import Sampling
from headwater.models.policy import Policy
from headwater.types import Rollout, RolloutKey


class HasFingerprint(Protocol):
    """A model that samples: a `Policy`, or a server's (`ServedTeacher`)."""

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample. `rng_key` names its random numbers, so they do not depend on the rest of the batch."""

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    rng_key: tuple[str | int, ...]

    @property
    def key(self) -> RolloutKey:
        return self.problem_id, self.sample

    @property
    def vllm_seed(self) -> int:
        """The request's seed for vLLM, which takes a signed 64-bit number."""
        return seeds.seed_of(*self.rng_key) % (1 << 63)

    def rollout(
        self, ids: tuple[int, ...], logp: tuple[float, ...], stopped: bool, policy: HasFingerprint, sampling: Sampling
    ) -> Rollout:
        """The rollout of these tokens. `stopped` says whether they end with a stop id."""
        return Rollout(
            problem_id=self.problem_id,
            sample=self.sample,
            prompt_ids=self.prompt_ids,
            completion_ids=ids,
            sampler_logp=logp,
            finish="stop" if stopped else "length",
            sampler=policy.fingerprint,
            temperature=sampling.temperature,
        )


OnFinished = Callable[[Sequence[Rollout]], None]


class Sampler(Protocol):
    """Samples completions from one set of weights, in this process or on a server."""

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        """Rollouts in the order of the requests, each with the log-probs that its tokens were drawn with.

        on_finished  called with rollouts as they finish, each exactly once, in any order, so that grading can start early; and now and
                     then with none, so that the caller can stop: what it raises ends the sampling
        """
        ...


SamplerFactory = Callable[[Policy], Sampler]
"""policy -> its sampler, with the weights that the policy has when `sample` is called."""


def requests_for(prompts: Sequence[tuple[str, tuple[int, ...]]], samples: int, *rng_key: str | int) -> list[Request]:
    """`samples` requests for every (problem id, prompt ids), with RNG keys (*rng_key, id, sample)."""
    return [
        Request(problem_id, sample, prompt_ids, (*rng_key, problem_id, sample))
        for problem_id, prompt_ids in prompts
        for sample in range(samples)
    ]
