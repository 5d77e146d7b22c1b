"""A frozen copy of the policy that follows it while it trains: a lagged teacher, or a moving average of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from headwater.config.dense import StartUpdate

FILE = "start-copy.safetensors"
"""In a checkpoint's folder."""


@dataclass(frozen=True)
class MovingCopy:
    """A model of the policy's architecture, whose weights follow the policy's. A checkpoint holds them too."""

    model: Any
    settings: StartUpdate

    @torch.no_grad()
    def follow(self, policy_model: Any, step: int) -> None:
        """Take over weights after a step (from 1): all of them every `every` steps, or the share 1 − decay after each.

        Example: decay 0.9, copy 1, policy 2: 0.9 · 1 + 0.1 · 2 = 1.1.
        """
        share = 1.0 if self.settings.decay is None else 1.0 - self.settings.decay
        if self.settings.every is not None and step % self.settings.every:
            return
        for own, new in zip(self.model.parameters(), policy_model.parameters(), strict=True):
            own.lerp_(new.to(own), share) if share < 1.0 else own.copy_(new)

    def save(self, folder: Path) -> None:
        save_model(self.model, str(folder / FILE))

    def load(self, folder: Path) -> None:
        load_model(self.model, str(folder / FILE))
