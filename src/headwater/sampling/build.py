"""The sampler that a recipe names."""

from __future__ import annotations

import importlib

from headwater.config.recipe import Recipe
from headwater.config.samplers import SAMPLERS
from headwater.sampling.ahead import one_at_a_time
from headwater.sampling.base import SamplerFactory
from headwater.sampling.sharded_sampler import sharded


def sampler_factory(recipe: Recipe) -> SamplerFactory:
    """Factory of the recipe's samplers; keep it for the life of the process, since it may own engines."""
    spec = SAMPLERS[recipe.compute.sampler]
    factory: SamplerFactory = getattr(importlib.import_module(spec.module), spec.function)(recipe)
    factory = factory if spec.collective else sharded(factory)
    # The embedded sampler serves several models at once; an engine holds the weights of a single one.
    return one_at_a_time(factory) if recipe.compute.overlap and recipe.compute.sampler != "torch" else factory


def importance_cap(recipe: Recipe) -> float | None:
    """Cap of the importance ratio p_trainer / p_sampler; None where the sampler's log-probs are the trainer's own."""
    own = SAMPLERS[recipe.compute.sampler].trainer_logp and not recipe.compute.overlap
    return None if own else recipe.compute.vllm.importance_cap
