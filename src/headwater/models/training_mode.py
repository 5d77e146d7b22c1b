"""Deterministic training: no dropout, activation checkpointing without random layers, evaluation mode for inference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from headwater.errors import UserError


def disable_dropout(model: Any) -> None:
    """Set every dropout to 0: with one the trainer's log-probs would differ from the sampler's.

    Some models read the probability from their config, some from attributes of their layers (`dropout`, `resid_pdrop`,
    `layerdrop`, …), some have Dropout modules. Noise in routers is left: it is drawn in training mode only, which
    `checkpoint_activations` keeps from them, and PhiMoE's `router_jitter_noise` is a threshold at inference too.
    """
    modules = list(model.modules())
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    for owner in (*modules, *configs.values()):
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(owner, name, 0.0)
        if isinstance(owner, nn.modules.dropout._DropoutNd):
            owner.p = 0.0


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass.

    transformers does so for modules in training mode, so those that checkpoint are put into it; all others stay as at
    inference, where nothing is random (Mixtral's routers add noise in training mode, PhiMoE's draw the experts).

    Raises UserError if the model has no such modules.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"models.gradient_checkpointing: transformers has none for a {model.config.model_type} model; set it to false"
        ) from None
    model.eval()
    for module in model.modules():
        if module is model or hasattr(module, "gradient_checkpointing"):
            module.training = True


@contextlib.contextmanager
def at_inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration: with gradient checkpointing a model in training mode refuses a cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
