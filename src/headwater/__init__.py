"""Headwater: sparse reward upstream, dense teacher supervision downstream, every label accounted for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.api import run, study

__version__ = "0.1.0"
__all__ = ["__version__", "run", "study"]


def __getattr__(name: str) -> Any:
    """`run` and `study` on first use: reading a recipe or a report then needs no tensor library."""
    if name in ("run", "study"):
        return getattr(importlib.import_module("headwater.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
