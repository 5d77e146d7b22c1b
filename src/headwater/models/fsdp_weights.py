"""Read a model's safetensors files directly into FSDP2 shards: no rank ever holds the whole model.

The model is built with its buffers and with its weights on the meta device, adapted and sharded (`fsdp`), and then filled. If the
files name weights differently from the model, every rank reads the whole model before it is sharded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from headwater.distributed import checkpoint_io
from headwater.distributed.process_group import ProcessGroup
from headwater.models.architecture import attention_of
from headwater.models.folder import ModelFolder
from headwater.models.lora_targets import BASE
from headwater.models.weight_files import WeightFiles, unused_weights


def build_without_weights(base: ModelFolder, dtype: torch.dtype) -> Any | None:
    """The model with its weights on the meta device, for `load_shards`; None if the files do not match it name by name."""
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            base.config,
            dtype=dtype,
            trust_remote_code=base.trust_remote_code,
            attn_implementation=attention_of(base.config),
        )
    if not _matches(model, base.weight_files):
        return None
    model.generation_config = base.generation_config
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Models built here get buffers as usual, and parameters on the meta device, which take no memory."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # a tied parameter is passed as the one it is tied to
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _matches(model: Any, files: WeightFiles) -> bool:
    """Whether the files hold every weight and saved buffer under one of the model's own names, in its shape, and no others.

    A tied weight that is stored under both names may have two values; then transformers decides.
    """
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return False
    if set(files.folder.glob("*.safetensors")) != set(files.paths):
        return False  # the reader of shards reads every file
    stored, known = files.tensors, set[str]()
    for tensor, names in checkpoint_io.tensors_with_names(model):
        if [stored[name].shape for name in names if name in stored] != [tuple(tensor.shape)]:
            return False
        known.update(names)
    return not unused_weights(stored.keys() - known, stored, model.config)


@torch.no_grad()
def load_shards(model: Any, base: ModelFolder, device: torch.device, ranks: ProcessGroup) -> None:
    """Read this rank's shard of every weight that is still on the meta device. All ranks must call it."""
    tensors = checkpoint_io.tensors_with_names(model)
    if not any(tensor.is_meta for tensor, _ in tensors):
        return
    files, shards = base.weight_files, dict[str, Tensor]()
    stored = files.tensors
    for tensor, names in tensors:
        name = next((name for name in (name.replace(BASE, "") for name in names) if name in stored), None)
        if name is not None:
            shards[name] = _allocated(model, tensor, names, device).detach()
    checkpoint_io.load_tensors(shards, files.folder, ranks)


def _allocated(model: Any, tensor: Tensor, names: list[str], device: torch.device) -> Tensor:
    """The tensor itself, or memory that replaces one on the meta device, under all of its names."""
    if not tensor.is_meta:
        return tensor
    parameter = nn.Parameter(torch.empty_like(tensor, device=device), requires_grad=tensor.requires_grad)
    for name in names:
        set_parameter(model, name, parameter)
    return parameter


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the model's parameter of that dotted name."""
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, parameter)
