"""Simulated memory exhaustion: errors of CUDA, the CPU allocator and Python, raised in chosen backward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from headwater.models.policy import Policy
from headwater.training import update as training

CPU_SAYS = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
OUT = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError(CPU_SAYS),
    "python": MemoryError,
}


@dataclass
class Room:
    """Replaces `update.backward`: memory runs out in its nth call, and in every one with more tokens than fit."""

    nth: int = 0
    most: int = 1 << 30
    error: Callable[[], BaseException] = OUT["cuda"]
    sizes: list[int] = field(default_factory=list)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = training.backward

        def backward(policy: Policy, objective: Any, batch: Any, *rest: Any) -> None:
            self.sizes.append(batch.ids_BT.numel())
            if len(self.sizes) == self.nth or batch.ids_BT.numel() > self.most:
                real(policy, objective, batch, *rest)  # the gradient of the attempt that fails must be dropped
                raise self.error()
            real(policy, objective, batch, *rest)

        monkeypatch.setattr(training, "backward", backward)
