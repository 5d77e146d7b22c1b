"""Merge a saved adapter into a model's own weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from headwater.distributed.checkpoint_io import local_shard
from headwater.errors import UserError, require_package
from headwater.models import adapter_files
from headwater.models.adapter_files import CONFIG, PREFIX, WEIGHTS
from headwater.models.folder import ModelFolder
from headwater.models.untrusted_files import as_user_error

PASSED = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "modules_to_save", "bias", "lora_bias",
    "target_parameters", "trainable_token_indices", "fan_in_fan_out",
)  # fmt: skip
"""Entries of an adapter's config that peft needs to merge it. Which layers it adapts follows from the names in its file."""


@torch.no_grad()
def merge_into(model: Any, folder: ModelFolder) -> None:
    """Add a saved adapter to the model's own weights, in place, with the same sum as peft's `merge_and_unload`.

    Pairs of matrices on linear layers are added in float32, also to FSDP2 shards. Everything else that LoRA knows (DoRA, experts,
    embeddings, biases, whole modules, trained tokens) is merged by peft.

    Raises UserError that names the folder and the tensor if it does not fit its base, or needs peft, which is not installed.
    """
    path = Path(folder.path, WEIGHTS)
    with as_user_error(f"{folder.field}: {path} cannot be read"):
        tensors = adapter_files.read_weights(path)
    config, layers = folder.json(CONFIG), _linear_layers(model)
    embedding_names = _embedding_names(model)
    on_linear = all(
        name.rpartition(".lora_")[0] in layers and name.endswith((".lora_A.weight", ".lora_B.weight"))
        for name in tensors
    )
    plain = not any(config.get(key) for key in ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices"))
    if on_linear and plain and config.get("bias", "none") == "none" and not _touched(tensors, embedding_names):
        _add_pairs(layers, tensors, folder)
        return
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UserError(
            f"{folder.field}: {folder.path} adapts more than linear layers, which several processes cannot merge; merge it first "
            "(`headwater merge`)"
        )
    whole = list(config.get("modules_to_save") or ())
    for module in [*whole, "token_adapter"] if config.get("trainable_token_indices") else whole:
        if not any(f".{module}." in f".{name}" for name in tensors):
            raise UserError(f"{folder.field}: {folder.path} says that it trained {module}, but holds no weights of it")
    _refuse_other_vocabulary(tensors, embedding_names, folder)
    adapted_embeddings = {name: tensor for name, tensor in tensors.items() if ".token_adapter." not in name}
    if _touched(adapted_embeddings, embedding_names):
        if config.get("trainable_token_indices") and _is_tied(model):
            raise UserError(
                f"{folder.field}: {folder.path} trains single tokens and adapts the head or embedding of a model whose head is tied to "
                "its embedding, which cannot be merged exactly here; merge it with peft and name the merged folder"
            )
        _untie(model)
    _merge_with_peft(model, tensors, folder)


def _linear_layers(model: Any) -> dict[str, nn.Module]:
    """Dotted name -> layer whose weight is a matrix that multiplies its input."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        or isinstance(getattr(module, "base_layer", None), (nn.Linear, Conv1D))
    }


def _add_pairs(layers: Mapping[str, Any], tensors: dict[str, Tensor], folder: ModelFolder) -> None:
    config = folder.json(CONFIG)
    while tensors:
        name = next(iter(tensors))
        path = name.rpartition(".lora_")[0]
        down, up = (tensors.pop(f"{path}.lora_{part}.weight", None) for part in "AB")
        layer = layers[path]
        weight = layer.weight
        rank, scaling = adapter_files.rank_and_scaling(config, path)
        transposed = isinstance(getattr(layer, "base_layer", layer), Conv1D)  # GPT-2's weights are (inputs, outputs)
        outputs, inputs = reversed(weight.shape) if transposed else weight.shape
        if down is None or up is None or down.shape != (rank, inputs) or up.shape != (outputs, rank):
            raise _unfit(folder, name)
        update = scaling * (up.float() @ down.float()).to(weight.device)
        update = update.t() if transposed else update
        if isinstance(weight, DTensor):
            weight.copy_(weight.float() + local_shard(update, weight))  # in place: FSDP2 gathers from this memory
        else:
            weight.data = (weight.float() + update).to(weight.dtype)


def _unfit(folder: ModelFolder, name: str) -> UserError:
    return UserError(
        f"{folder.field}: {Path(folder.path, WEIGHTS)} does not fit its base model {folder.base.name} (at {name:.120}); name the "
        f"base that it was trained on in {CONFIG}"
    )


def _embedding_names(model: Any) -> dict[str, Tensor]:
    """Dotted name -> weight of the input embedding and of the head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {
        name: module.weight
        for name, module in model.named_modules(remove_duplicate=False)
        if any(module is adapted for adapted in modules)
    }


def _touched(tensors: Mapping[str, Tensor], modules: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{module}.") for name in tensors for module in modules)


def _refuse_other_vocabulary(
    tensors: Mapping[str, Tensor], embeddings: Mapping[str, Tensor], folder: ModelFolder
) -> None:
    for name, tensor in tensors.items():
        owner = next((module for module in embeddings if name.startswith(f"{module}.")), None)
        if owner is None or ".lora_" in name or not name.endswith(".weight"):
            continue
        if tensor.shape != embeddings[owner].shape:
            rows, base_rows = len(tensor), len(embeddings[owner])
            raise UserError(
                f"{folder.field}: {folder.path} was trained on a resized vocabulary ({name} has {rows} rows, its base "
                f"{base_rows}); call resize_token_embeddings({rows}) on the base, merge the adapter into it with peft and name the "
                "merged folder"
            )


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _untie(model: Any) -> None:
    """Give the head a weight of its own: an adapter on one of two tied layers moves only that one."""
    if not _is_tied(model):
        return
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _merge_with_peft(model: Any, tensors: Mapping[str, Tensor], folder: ModelFolder) -> None:
    require_package(folder.field, "peft", "lora")
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    saved = folder.json(CONFIG)
    adapted = {name.rpartition(".lora_")[0].replace(".base_layer", "") for name in tensors if ".lora_" in name}
    with (
        as_user_error(f"{folder.field}: {folder.path} cannot be merged into its base {folder.base.name}"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        config = LoraConfig(
            **{key: saved[key] for key in PASSED if key in saved},
            target_modules=_targets(model, adapted, saved.get("target_parameters") or ()),
            init_lora_weights=True,  # layers without weights in the file then change nothing
            inference_mode=True,
            task_type="CAUSAL_LM",
        )
        adapted_model = get_peft_model(model, config)
        named = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
        result: Any = set_peft_model_state_dict(adapted_model, named)
        missing = (name for name in result.missing_keys if _belongs(name.removeprefix(PREFIX), adapted, config.bias))
        unfit = next(iter([*result.unexpected_keys, *missing]), None)
        if unfit is not None:
            raise _unfit(folder, unfit.removeprefix(PREFIX))
        adapted_model.merge_and_unload()


def _targets(model: Any, adapted: Iterable[str], parameters: Iterable[str]) -> list[str]:
    """The modules that peft must adapt, besides the parameters that the config names.

    By full name, but by the last part of it where transformers has since fused layers into one parameter, as it has the experts
    of Mixtral: peft converts such names itself.
    """
    modules, parameter_names = dict(model.named_modules()), {name.rpartition(".")[2] for name in parameters}
    targets = set()
    for path in adapted:
        module = modules.get(path)
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d)):
            targets.add(path)
        elif module is None or not any(name in parameter_names for name, _ in module.named_parameters(recurse=False)):
            targets.add(path.rpartition(".")[2])
    return sorted(targets)


def _belongs(name: str, adapted: set[str], bias: str) -> bool:
    """Whether a tensor that the file lacks is part of the adapter: without it the sum would be another one."""
    path, lora, _ = name.replace(".base_layer", "").rpartition(".lora_")
    if lora:
        return path in adapted
    if name.endswith(".bias"):
        return bias == "all" or (bias == "lora_only" and name.endswith(".base_layer.bias"))
    return ".modules_to_save." in name
