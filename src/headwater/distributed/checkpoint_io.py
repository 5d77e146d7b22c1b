"""Sharded training checkpoints: torch.distributed.checkpoint (DCP) on safetensors files, readable by any number of ranks.

Each rank writes one file with its shards of weights and optimizer state and their offsets in the whole tensors. A reader takes only
the shards that it needs. Nothing is pickled, so these files are as safe as those of a single process.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from headwater.distributed.process_group import ProcessGroup

WEIGHT, STATE = "weight.", "optimizer."
"""Prefixes of tensor names in a sharded checkpoint."""
MODEL_FILE, ADAPTER_FILE, OPTIMIZER_FILE = "model.safetensors", "adapter.safetensors", "optimizer.safetensors"
"""What a single process writes (`training.checkpoint`): unsharded weights of the whole model or of its adapter; optimizer state."""


def save(folder: Path, model: Any, optimizer: torch.optim.Optimizer, ranks: ProcessGroup) -> None:
    """Write this rank's shards. All ranks must call it with the same folder."""
    tensors = {f"{WEIGHT}{name}": tensor.detach() for name, tensor in checkpoint_tensors(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{STATE}{index}.{key}": value.detach() for key, value in state.items()}
    save_tensors(tensors, folder, ranks)


def save_tensors(tensors: dict[str, Tensor], folder: Path, ranks: ProcessGroup) -> None:
    """Write this rank's shards of named tensors. All ranks must call it with the same folder."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    dcp.save(
        tensors,
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        process_group=ranks.group,
    )


def load(folder: Path, state: Any, model: Any, optimizer: torch.optim.Optimizer, ranks: ProcessGroup) -> None:
    """Load a checkpoint that any number of ranks wrote into this rank's weights and optimizer."""
    for path in (folder / MODEL_FILE, folder / ADAPTER_FILE):
        if path.exists():
            _load_unsharded(path, model, optimizer, state)
            return
    tensors = {f"{WEIGHT}{name}": tensor.detach() for name, tensor in checkpoint_tensors(model).items()}
    slots = empty_state(optimizer, tensor_names(folder))
    for index, slot in slots.items():
        tensors |= {f"{STATE}{index}.{key}": value for key, value in slot.items()}
    load_tensors(tensors, folder, ranks)
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})


def load_tensors(tensors: dict[str, Tensor], folder: Path, ranks: ProcessGroup) -> None:
    """Fill tensors (of sharded ones, this rank's shards) from safetensors files, by name; only the needed parts are read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP warns that it assumes a single process
        dcp.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            process_group=ranks.group,
            no_dist=ranks.single_process,
        )


def tensors_with_names(model: Any) -> list[tuple[Tensor, list[str]]]:
    """Weights and persistent buffers, each once with all of its names: tied weights have several."""
    tensors: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (tensor, []))[1].append(name)
    return list(tensors.values())


def checkpoint_tensors(model: Any) -> dict[str, Tensor]:
    """Tensors that a checkpoint stores, by first name: weights and persistent buffers, or the adapter if the rest is frozen."""
    adapter_only = any(not parameter.requires_grad for parameter in model.parameters())
    return {names[0]: tensor for tensor, names in tensors_with_names(model) if tensor.requires_grad or not adapter_only}


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors in a checkpoint's files."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters in the order in which the optimizer numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def empty_state(optimizer: torch.optim.Optimizer, names: set[str]) -> dict[int, dict[str, Tensor]]:
    """Zeroed optimizer state for the stored names: shaped as its parameter, or a scalar for `step`."""
    state: dict[int, dict[str, Tensor]] = {}
    numbered = parameters(optimizer)
    for name in sorted(name for name in names if name.startswith(STATE)):
        index, key = name.removeprefix(STATE).split(".", 1)
        parameter = numbered[int(index)]
        value = torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
        state.setdefault(int(index), {})[key] = value.detach()
    return state


def load_unsharded(path: Path, tensors: Iterable[tuple[Tensor, list[str]]]) -> None:
    """Fill tensors, each with all of its names, with this rank's shards of what a single process wrote."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for tensor, names in tensors:
            stored_name = next(name for name in names if name in file.keys())  # noqa: SIM118
            tensor.copy_(local_shard(file.get_tensor(stored_name), tensor))


def _load_unsharded(path: Path, model: Any, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Load this rank's shards of a checkpoint that a single process wrote."""
    wanted = checkpoint_tensors(model)
    load_unsharded(path, [(tensor, names) for tensor, names in tensors_with_names(model) if names[0] in wanted])
    slots: dict[int, dict[str, Tensor]] = {}
    numbered, optimizer_path = parameters(optimizer), path.with_name(OPTIMIZER_FILE)
    if optimizer_path.exists():
        with safe_open(optimizer_path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                index, key = name.split(".", 1)
                value, parameter = file.get_tensor(name), numbered[int(index)]
                slots.setdefault(int(index), {})[key] = value if value.ndim == 0 else local_shard(value, parameter)
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})


def local_shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a tensor that all ranks hold, placed like another tensor."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
