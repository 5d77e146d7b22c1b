"""Who samples, as the recipe names it: a policy -> its sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from headwater.config.recipe import Recipe
from headwater.config.stage import Sampling
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.sampling.base import OnFinished, Request, Sampler
from headwater.sampling.torch_sampler import TorchSampler
from headwater.sampling.vllm_sampler import EnginePool
from headwater.types import Rollout

SamplerFactory = Callable[[Policy], Sampler]


def embedded(recipe: Recipe) -> SamplerFactory:
    """The embedded sampler, with fewer sequences at once where memory runs out."""
    return lambda policy: OomRetrySampler(partial(TorchSampler, policy), BatchBudget(recipe.compute.sample_batch))


def beside(recipe: Recipe) -> SamplerFactory:
    """vLLM in this process; engines are started when first asked, and stay."""
    return EnginePool(recipe.compute, longest(recipe)).sampler


SAMPLERS: dict[str, Callable[[Recipe], SamplerFactory]] = {"torch": embedded, "vllm": beside}


def sampler_factory(recipe: Recipe) -> SamplerFactory:
    """The recipe's own; what it returns may be kept for as long as the process lives."""
    return SAMPLERS[recipe.compute.sampler](recipe)


def importance_cap(recipe: Recipe) -> float | None:
    """The embedded sampler's log-probs are the trainer's own up to rounding, so that only an engine's are corrected for."""
    return None if recipe.compute.sampler == "torch" else recipe.compute.vllm.importance_cap


def longest(recipe: Recipe) -> int:
    """Tokens of the longest sequence, prompt and completion, that the recipe allows."""
    stages = [getattr(recipe.stages, name) for name in type(recipe.stages).model_fields]
    asked = [recipe.evaluate.sampling, *(stage.sampling for stage in stages if stage is not None)]
    return recipe.prompt.max_tokens + max(one.max_tokens for one in asked)


@dataclass(frozen=True)
class OomRetrySampler:
    """A sampler that decodes fewer sequences at once when memory runs out; what had arrived by then is kept.

    make  a sampler that decodes so many at once
    """

    make: Callable[[int], Sampler]
    batch: BatchBudget

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, arrived: OnFinished | None = None
    ) -> list[Rollout]:
        held: dict[tuple[str, int], Rollout] = {}

        def told(found: Sequence[Rollout]) -> None:
            held.update({(one.problem_id, one.sample): one for one in found})
            if arrived is not None:
                arrived(found)

        def attempt(batch: int) -> list[Rollout]:
            rest = [one for one in requests if (one.problem_id, one.sample) not in held]
            found = self.make(batch).sample(rest, sampling, told) if rest else []
            known = {**held, **{(one.problem_id, one.sample): one for one in found}}
            return [known[one.problem_id, one.sample] for one in requests]

        remedy = "shorten sampling.max_tokens or prompt.max_tokens, or take a larger device"
        return self.batch.fit(attempt, max(1, len(requests)), 1, "sequence", remedy)
