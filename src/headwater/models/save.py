"""Save a policy as a plain Hugging Face folder or a LoRA adapter; merge an adapter into its base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from headwater.config.recipe import Models
from headwater.errors import UserError
from headwater.models import fsdp
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.storage.run_dir import atomic_folder


def save_policy(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Write config, safetensors and tokenizer; or an adapter's files if the recipe asks for `output: adapter`.

    All ranks must call it: the first gathers sharded weights in CPU memory and writes. The model in memory is unchanged.
    """
    ranks = policy.ranks
    with fsdp.unsharded(
        policy, None if ranks.single_process else torch.device("cpu" if ranks.is_main else "meta")
    ) as whole:
        if ranks.is_main:
            _write(whole, folder, dtype)


def merge_adapter(folder: Path, out: Path, dtype: str) -> None:
    """Write an adapter and its base as one plain model folder; summed in float32 and rounded once.

    Raises UserError if `folder` holds no adapter, `out` exists, or the adapter does not fit its base.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"merge --dtype {dtype}: must be float32 or bfloat16")
    source = ModelFolder(str(folder), "merge", str(folder))
    if not source.is_adapter:
        raise UserError(f"merge {folder}: holds no adapter (adapter_config.json, and no config.json)")
    if out.exists():
        raise UserError(f"merge {folder}: {out} exists already")
    models = Models(student=str(folder), teacher=str(folder), dtype="float32")
    policy = load_policy(ModelFolder.open(str(folder), "merge"), LoadOptions(models, torch.device("cpu"), frozen=True))
    with atomic_folder(out) as aside:
        save_policy(policy, aside, getattr(torch, dtype))


def _write(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    if policy.adapter is not None and policy.adapter.lora.output == "adapter":
        policy.adapter.save(policy.model, folder)
    else:
        model = policy.model if policy.adapter is None else _without_adapter(policy.model)
        before = policy.model.config.dtype
        model.config.dtype = dtype
        try:
            weights = {name: tensor.to(dtype) for name, tensor in policy.merged_weights()}
            model.save_pretrained(folder, state_dict=weights)
            model.config.dtype = dtype  # save_pretrained wrote the type in memory, not the one in the file
            model.config.save_pretrained(folder)
        finally:
            policy.model.config.dtype = before
    policy.tokenizer.save_pretrained(folder)


def _without_adapter(model: Any) -> Any:
    """A model of the same kind without adapters or quantization, its weights on the meta device."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.generation_config = model.generation_config
    return plain
