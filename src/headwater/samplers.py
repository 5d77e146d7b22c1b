"""Who samples, as the recipe names it: a policy -> its sampler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from headwater.config import Recipe
from headwater.memory import Budget, Frugal
from headwater.model import Policy
from headwater.sampler import Sampler, TorchSampler
from headwater.sampler_vllm import Engines

Samplers = Callable[[Policy], Sampler]


def embedded(recipe: Recipe) -> Samplers:
    """The embedded sampler, with fewer sequences at once where memory runs out."""
    return lambda policy: Frugal(partial(TorchSampler, policy), Budget(recipe.compute.sample_batch))


def beside(recipe: Recipe) -> Samplers:
    """vLLM in this process; engines are started when first asked, and stay."""
    return Engines(recipe.compute, longest(recipe)).sampler


SAMPLERS: dict[str, Callable[[Recipe], Samplers]] = {"torch": embedded, "vllm": beside}


def samplers_of(recipe: Recipe) -> Samplers:
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
