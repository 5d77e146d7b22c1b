"""Lagged or EMA copy of the policy's weights, which teaches the policy while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor

from headwater.config.dense import StartUpdate
from headwater.distributed import checkpoint_io
from headwater.distributed.process_group import ProcessGroup, local_tensor
from headwater.models.lora import ReferenceBody
from headwater.models.policy import Policy

FILE, SHARDS = "start-copy.safetensors", "start-copy"
"""In a checkpoint's folder: what a single process writes, and the folder of what several ranks write."""


@dataclass(frozen=True)
class LaggedCopy:
    """Weights that follow those of the policy. A checkpoint holds them too. With several ranks each holds its shards.

    model     holds the copies: a model of the policy's architecture, or the values of an adapter
    followed  the policy's own, in the same order, sharded alike
    """

    model: Any
    followed: tuple[Tensor, ...]
    settings: StartUpdate

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take over weights after a step (from 1): all of them every `every` steps, or the share 1 − decay after each.

        Example: decay 0.9, copy 1, policy 2: 0.9 · 1 + 0.1 · 2 = 1.1.
        """
        share = 1.0 if self.settings.decay is None else 1.0 - self.settings.decay
        if self.settings.every is not None and step % self.settings.every:
            return
        for own, new in zip(self.model.parameters(), self.followed, strict=True):
            mine, policys = local_tensor(own), local_tensor(new)
            mine.lerp_(policys.to(mine), share) if share < 1.0 else mine.copy_(policys)

    def save(self, folder: Path, ranks: ProcessGroup) -> None:
        if ranks.single_process:
            save_model(self.model, str(folder / FILE))
        else:
            checkpoint_io.save_tensors(self._tensors(), folder / SHARDS, ranks)

    def load(self, folder: Path, ranks: ProcessGroup) -> None:
        if (folder / FILE).exists():
            checkpoint_io.load_unsharded(folder / FILE, checkpoint_io.tensors_with_names(self.model))
        else:
            checkpoint_io.load_tensors(self._tensors(), folder / SHARDS, ranks)

    def _tensors(self) -> dict[str, Tensor]:
        return {names[0]: tensor.detach() for tensor, names in checkpoint_io.tensors_with_names(self.model)}


def lagged_copy(policy: Policy, reference: Policy, settings: StartUpdate) -> LaggedCopy:
    """The weights in which a reference differs from the policy: all, or those of its adapter.

    An average of adapters averages the two matrices of each pair, and not their product.
    """
    if policy.adapter is None:
        return LaggedCopy(reference.model, tuple(policy.model.parameters()), settings)
    assert isinstance(reference.body, ReferenceBody) and reference.body.values is not None
    return LaggedCopy(reference.body.values, tuple(policy.adapter.matrices()), settings)
