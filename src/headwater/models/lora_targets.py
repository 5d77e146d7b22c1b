"""Choose the layers of a model that get LoRA adapters, attach peft's layers to them, and name them as peft does."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from headwater.config.lora import Lora
from headwater.errors import UserError
from headwater.models.untrusted_files import as_user_error

TRAINED, START = "default", "start"
"""peft's names for the adapter that trains, and for a frozen copy of the one that training started from."""
BASE = ".base_layer"
"""What peft inserts into the name of an adapted weight; twice where two parameters of one module are adapted."""

MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Architectures whose `out_proj` peft refuses to adapt: fused kernels read its weight past any adapter."""


def inject(model: Any, config: Any, name: str = TRAINED) -> dict[str, Any]:
    """Add peft's layers to a model, in place; returns them by name.

    Raises UserError if the targets match no layer of the model, or one that is neither linear nor a matrix of experts: an adapter on
    an embedding or a convolution could not be merged here.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of fused experts, layouts of GPT-2, a second adapter: all intended
        with as_user_error("models.lora.targets: peft cannot adapt these layers"):
            inject_adapter_in_model(config, model, name)
    head = model.get_output_embeddings()
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        kind = layer.get_base_layer()
        if layer is head:
            raise UserError(f"models.lora.targets: {path} is the model's head, which gets no adapter here; name others")
        if not hasattr(layer, "parameter_name") and not isinstance(kind, (nn.Linear, Conv1D)):
            raise UserError(
                f"models.lora.targets: {path} is a layer of type {type(kind).__name__}, which gets no adapter here; name linear "
                "layers, or use all-linear"
            )
    return adapted_layers(model)


def peft_config(lora: Lora, model: Any) -> Any:
    """peft's config of a new adapter for a model. `all-linear` includes experts that are fused into one parameter.

    Layers whose output is no product with their weight get no adapter, whatever the targets: peft would add to something else.
    """
    from peft import LoraConfig

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        target_parameters=_fused_experts(model) if targets == "all-linear" else None,
        exclude_modules=_excluded(model, targets) or None,
        task_type="CAUSAL_LM",
    )


def _excluded(model: Any, targets: str | list[str]) -> list[str]:
    mixers = targets == "all-linear" and model.config.model_type in MAMBA
    return [
        path
        for path, module in model.named_modules()
        if not _is_product(module) or (mixers and path.endswith(".out_proj"))
    ]


def _is_product(module: nn.Module) -> bool:
    """False for a linear layer with a forward of its own, such as the routers of Llama 4 and Phi-MoE, which choose experts.

    Falcon's own forward is the product with another rounding.
    """
    own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return (
        not own_forward or type(module).__module__.startswith("bitsandbytes") or type(module).__name__ == "FalconLinear"
    )


def _fused_experts(model: Any) -> list[str] | None:
    """Names of the parameters of (experts, …, …) that hold one matrix for each expert; None if there are none.

    Other layers have parameters of three dimensions too: convolutions, RWKV's vectors, RecurrentGemma's gates.
    """
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "expert" in f"{path}.{type(module).__name__}".lower()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ] or None


def adapted_layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A") and layer.lora_A}


def weight_name(path: str, layer: Any) -> str:
    """Name, in a plain model, of the weight that a peft layer adapts."""
    return f"{path.replace(BASE, '')}.{getattr(layer, 'parameter_name', 'weight')}"


def layer_name(path: str, layer: Any) -> str:
    """The name that peft matches rank and alpha patterns against: a module's, or that of one of its parameters."""
    return weight_name(path, layer) if hasattr(layer, "parameter_name") else path.replace(BASE, "")


def saved_targets(model: Any, layers: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
    """Fields of a LoraConfig with which peft adapts these layers of the plain model and no others."""
    linear = {path.replace(BASE, ""): layer for path, layer in layers.items() if not hasattr(layer, "parameter_name")}
    fields: dict[str, Any] = {"target_modules": sorted(_suffixes(linear, model.named_modules()))}
    if any(layer.fan_in_fan_out for layer in linear.values()):
        fields["fan_in_fan_out"] = True
    other = {weight_name(path, layer): layer for path, layer in layers.items() if hasattr(layer, "parameter_name")}
    if other:
        suffixes = _suffixes(other, model.named_parameters())
        fields["target_parameters"] = sorted(suffixes)
        # peft gives experts whose two matrices were fused twice the rank, and so twice the alpha.
        fields["rank_pattern"] = {
            end: layer.r[TRAINED] for end, layer in suffixes.items() if layer.r[TRAINED] != lora.r
        }
        fields["alpha_pattern"] = {end: suffixes[end].lora_alpha[TRAINED] for end in fields["rank_pattern"]}
    return fields


def _suffixes(layers: Mapping[str, Any], named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Shortest ends of names that match the given layers and nothing else of the model -> one layer that they match."""
    others = {name.replace(BASE, "") for name, _ in named if ".lora_" not in name} - layers.keys()
    suffixes: dict[str, Any] = {}
    left, count = dict(layers), 0
    while left:
        count += 1
        ends = {_end(name, count) for name in others}
        suffixes |= {_end(name, count): layer for name, layer in left.items() if _end(name, count) not in ends}
        left = {name: layer for name, layer in left.items() if _end(name, count) in ends}
    return suffixes


def _end(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])
