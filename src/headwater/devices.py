"""Copies from the CPU's memory to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A copy to a GPU goes through pinned memory, so that the CPU does not wait for it.

    torch keeps the pinned memory until the copy is done; operations of the same stream wait for it.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
