"""The sampler that a recipe names."""

from __future__ import annotations

import importlib

from headwater.config.recipe import Recipe
from headwater.config.samplers import SAMPLERS
from headwater.sampling.base import SamplerFactory
from headwater.sampling.sharded_sampler import sharded


def sampler_factory(recipe: Recipe) -> SamplerFactory:
    """Factory of the recipe's samplers; keep it for the life of the process, since it may own engines."""
    spec = SAMPLERS[recipe.compute.sampler]
    factory: SamplerFactory = getattr(importlib.import_module(spec.module), spec.function)(recipe)
    return factory if spec.collective else sharded(factory)


def importance_cap(recipe: Recipe) -> float | None:
    """Cap of the importance ratio p_trainer / p_sampler; None where the sampler's log-probs are the trainer's own."""
    return None if SAMPLERS[recipe.compute.sampler].trainer_logp else recipe.compute.vllm.importance_cap
