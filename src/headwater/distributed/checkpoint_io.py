"""Checkpoints that several ranks write and any number of them reads: torch.distributed.checkpoint on safetensors files.

Each rank writes one file with its parts of weights and optimizer, and where in the whole tensors they stand; whoever reads takes the
parts that it needs now. Nothing is pickled, so these files are as harmless as the ones of one process alone.
"""

from __future__ import annotations

import logging
import warnings
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
MODEL_FILE, ADAPTER_FILE = "model.safetensors", "adapter.safetensors"
"""What one process alone writes: all weights, or those of an adapter (`checkpoint`)."""


def save(folder: Path, model: Any, optimizer: torch.optim.Optimizer, ranks: ProcessGroup) -> None:
    """This rank's parts; all ranks must call it with the same folder."""
    held = {f"{WEIGHT}{name}": one.detach() for name, one in named(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        held |= {f"{STATE}{index}.{key}": value.detach() for key, value in state.items()}
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    dcp.save(
        held,
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        process_group=ranks.group,
    )


def load(folder: Path, state: Any, model: Any, optimizer: torch.optim.Optimizer, ranks: ProcessGroup) -> None:
    """A checkpoint of any number of ranks into the weights and the optimizer of this one."""
    whole = next((path for path in (folder / MODEL_FILE, folder / ADAPTER_FILE) if path.exists()), None)
    if whole is not None:
        _cut_from_whole(whole, model, optimizer, state)
        return
    weights = {f"{WEIGHT}{name}": one.detach() for name, one in named(model).items()}
    slots = blank(optimizer, keys_in(folder))
    load_tensors(
        weights | {f"{STATE}{index}.{key}": one for index, state_ in slots.items() for key, one in state_.items()},
        folder,
        ranks,
    )
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})


def load_tensors(wanted: dict[str, Tensor], folder: Path, ranks: ProcessGroup) -> None:
    """Fill tensors, or this rank's parts of them, with what safetensors files hold under their names; only those parts are read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without other processes it says that it assumes so
        dcp.load(
            wanted,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            process_group=ranks.group,
            no_dist=ranks.single_process,
        )


def tensors_with_names(model: Any) -> list[tuple[Tensor, list[str]]]:
    """Weights and saved buffers, each once with all of its names: tied ones have several."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, one in model.state_dict(keep_vars=True).items():
        found.setdefault(id(one), (one, []))[1].append(name)
    return list(found.values())


def named(model: Any) -> dict[str, Tensor]:
    """What a checkpoint holds of a model, by its first name: weights and saved buffers, or the adapter where the rest is frozen."""
    adapted = any(not one.requires_grad for one in model.parameters())
    return {names[0]: one for one, names in tensors_with_names(model) if one.requires_grad or not adapted}


def keys_in(folder: Path) -> set[str]:
    """Names of all tensors of a checkpoint."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update(file.keys())
    return found


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order in which the optimizer numbers them."""
    return [one for group in optimizer.param_groups for one in group["params"]]


def blank(optimizer: torch.optim.Optimizer, keys: set[str]) -> dict[int, dict[str, Tensor]]:
    """Room for what the optimizer held of each parameter: as large as the parameter, or a single number."""
    found: dict[int, dict[str, Tensor]] = {}
    every = parameters(optimizer)
    for key in sorted(one for one in keys if one.startswith(STATE)):
        index, name = key.removeprefix(STATE).split(".", 1)
        like = every[int(index)]
        room = torch.zeros((), device=like.device) if name == "step" else torch.zeros_like(like)
        found.setdefault(int(index), {})[name] = room.detach()
    return found


def _cut_from_whole(file: Path, model: Any, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """This rank's parts of what one process alone wrote."""
    wanted = named(model)
    with safe_open(file, framework="pt") as held, torch.no_grad():
        for one, names in tensors_with_names(model):
            if names[0] in wanted:
                known = next(name for name in names if name in held.keys())  # noqa: SIM118
                one.copy_(local_shard(held.get_tensor(known), one))
    per_parameter: dict[int, dict[str, Tensor]] = {}
    every, path = parameters(optimizer), file.with_name("optimizer.safetensors")
    if path.exists():
        with safe_open(path, framework="pt") as held:
            for name in held.keys():  # noqa: SIM118
                index, key = name.split(".", 1)
                value, like = held.get_tensor(name), every[int(index)]
                per_parameter.setdefault(int(index), {})[key] = value if value.ndim == 0 else local_shard(value, like)
    optimizer.load_state_dict({"state": per_parameter, "param_groups": state["param_groups"]})


def local_shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have, divided as another one is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
