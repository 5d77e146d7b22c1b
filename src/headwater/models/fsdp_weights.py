"""A model's own files read by several ranks, each its part of every weight: what no rank ever holds is the whole model.

The model is made with its buffers and without numbers in its weights, adapted and divided (`sharded`), and then filled. A model
whose files name its weights otherwise than it does itself is read whole by every rank before it is divided.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import AutoConfig

from headwater.distributed import checkpoint_io
from headwater.distributed.process_group import ProcessGroup
from headwater.models import policy as model

ADAPTED = ".base_layer"
"""What an adapter puts into the name of a matrix that it stands on."""


def outline(base: str, dtype: torch.dtype, trusted: bool, quantised: Any, device: torch.device, what: str) -> Any:
    """As `model.read_weights`, without numbers in the weights, to be filled; whole where the files do not fit name by name."""
    held = AutoConfig.from_pretrained(base, trust_remote_code=trusted)
    with weightless():
        made = AutoModelForCausalLM.from_config(
            held, dtype=dtype, trust_remote_code=trusted, attn_implementation="sdpa"
        )
    if not fits(made, sizes(folder_of(base))):
        return model.read_weights(base, dtype, trusted, quantised, device, what)
    made.generation_config = model.read_generation(base, held)
    return made


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Models that are made here get their buffers as usual, and weights that take no memory (on the device `meta`)."""
    usual = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is tied to another comes as that one
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        usual(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = usual  # type: ignore[method-assign]


def folder_of(base: str) -> Path:
    """Where a model's files are; those of a hub id are fetched, as `from_pretrained` would."""
    return Path(base) if Path(base).is_dir() else Path(snapshot_download(base, allow_patterns=["model*.safetensors"]))


def sizes(folder: Path) -> dict[str, list[int]]:
    """The shape of every tensor in a folder's safetensors files."""
    found: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


def fits(made: Any, found: dict[str, list[int]]) -> bool:
    """Whether files hold every weight and saved buffer of a model under its own name, in its shape, and all in one type."""
    if getattr(made, "_keep_in_fp32_modules", None) or getattr(made, "_keep_in_fp32_modules_strict", None):
        return False
    return all(
        any(found.get(name) == list(one.shape) for name in names)
        for one, names in checkpoint_io.tensors_with_names(made)
    )


@torch.no_grad()
def fill(held: Any, base: str, device: torch.device, ranks: ProcessGroup) -> None:
    """This rank's parts of every weight that has no numbers yet; all ranks must call it."""
    every = checkpoint_io.tensors_with_names(held)
    if not any(one.is_meta for one, _ in every):
        return
    folder, wanted = folder_of(base), dict[str, Tensor]()
    known = sizes(folder)
    for one, names in every:
        found = next((name for name in (name.replace(ADAPTED, "") for name in names) if name in known), None)
        if found is not None:
            wanted[found] = with_room(held, one, names, device).detach()
    checkpoint_io.load_tensors(wanted, folder, ranks)


def with_room(held: Any, one: Tensor, names: list[str], device: torch.device) -> Tensor:
    """A weight in the place of one that takes no memory yet, under all of its names; else that one."""
    if not one.is_meta:
        return one
    room = nn.Parameter(torch.empty_like(one, device=device), requires_grad=one.requires_grad)
    for name in names:
        put(held, name, room)
    return room


def put(held: nn.Module, name: str, value: nn.Parameter) -> None:
    """Make it the weight of that name."""
    where, _, last = name.rpartition(".")
    setattr(held.get_submodule(where), last, value)
