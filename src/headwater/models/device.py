"""The device that a recipe names."""

from __future__ import annotations

import torch

from headwater.errors import UserError


def device_of(name: str) -> torch.device:
    """Raises UserError when a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("compute.device: cuda was asked for, but no CUDA device is available")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
