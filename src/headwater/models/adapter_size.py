"""Count the weights of an adapter before any weights are read."""

from __future__ import annotations

import importlib.util

from headwater.config.lora import Lora
from headwater.errors import UserError
from headwater.models.lora import Adapter
from headwater.models.lora_targets import inject, peft_config
from headwater.models.shape import Shape, config_key, empty_model

_MEASURED: dict[tuple[str, Lora], tuple[int, float]] = {}
"""Sizes by config and adapter; shapes may be equal where models differ."""


def adapter_size(shape: Shape, lora: Lora) -> tuple[int, float]:
    """(weights of an adapter on a model of this shape, those of them that one token uses).

    Measured on the model itself, to which peft adds the adapter without memory: with `all-linear` experts and their routers get one
    too. Without peft, or where it refuses (the doctor says why), the linear layers are counted.
    """
    linear = shape.adapter_parameters(lora.r, None if isinstance(lora.targets, str) else lora.targets)
    if shape.config is None or importlib.util.find_spec("peft") is None:
        return linear, linear
    key = config_key(shape.config), lora
    if key not in _MEASURED:
        _MEASURED[key] = _measure(shape, lora) or (linear, linear)
    return _MEASURED[key]


def _measure(shape: Shape, lora: Lora) -> tuple[int, float] | None:
    model = empty_model(shape.config, shape.trust_remote_code)
    try:
        adapter = Adapter(lora, "", inject(model, peft_config(lora, model)))
    except UserError:
        return None
    return adapter.parameters, adapter.active_parameters(shape.experts_per_token)
