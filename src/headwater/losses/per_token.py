"""Length, slicing and concatenation for dataclasses with one row per token.

A field holds one row per token if its name ends in a shape that begins with N (`logp_NV`, `size_N`); all others belong to every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def _fields(form: object) -> dict[str, Any]:
    shaped = {name: value for name, value in vars(form).items() if name.rpartition("_")[2].startswith("N")}
    return {name: value for name, value in shaped.items() if value is not None}


def length(form: object) -> int:
    return len(next(iter(_fields(form).values())))


def rows(form: T, start: int, stop: int) -> T:
    return select_rows(form, slice(start, stop))


def select_rows(form: T, index: slice | Tensor) -> T:
    return replace(form, **{name: value[index] for name, value in _fields(form).items()})  # type: ignore[type-var]


def concatenate(form: T, others: Sequence[T], device: torch.device | None) -> T:
    """The rows of this value and of others that share its other fields, on a device; None: on theirs."""
    columns = {name: [value, *(vars(other)[name] for other in others)] for name, value in _fields(form).items()}
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    return to_device(replace(form, **joined), device)  # type: ignore[type-var]


def to_device(form: T, device: torch.device | None) -> T:
    moved = {name: value.to(device) for name, value in vars(form).items() if isinstance(value, Tensor)}
    return replace(form, **moved)  # type: ignore[type-var]


def itself(form: T) -> T:
    """`materialize` of a form that holds log-probs."""
    return form
