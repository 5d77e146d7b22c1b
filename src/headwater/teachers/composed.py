"""A teacher composed of several frozen models: the normalized weighted product of their distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from headwater.distributed.process_group import ProcessGroup
from headwater.losses.batch import Row
from headwater.losses.distributions import Composed, Distributions
from headwater.models.shape import Shape
from headwater.teachers.build import Teacher
from headwater.teachers.scoring import distributions_of
from headwater.types import Rollout


@dataclass(frozen=True)
class ComposedTeacher:
    """Scores rollouts with every model and returns `Composed` distributions. It does not sample.

    weights  of each model's log-probs, summing to 1
    """

    models: tuple[Teacher, ...]
    weights: tuple[float, ...]

    @property
    def tokenizer(self) -> Any:
        return self.models[0].tokenizer

    @property
    def vocabulary(self) -> int:
        return self.models[0].vocabulary

    @property
    def device(self) -> torch.device:
        return self.models[0].device

    @property
    def ranks(self) -> ProcessGroup:
        return self.models[0].ranks

    @property
    def shape(self) -> Shape:
        return self.models[0].shape

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        return sum(model.pass_flops(rows, passes) for model in self.models)

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
        scored = [distributions_of(model, rollouts, tokens) for model in self.models]
        return [Composed(parts, self.weights) for parts in zip(*scored, strict=True)]
