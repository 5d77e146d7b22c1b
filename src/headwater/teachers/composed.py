"""A teacher made of several frozen models: the weighted product of their distributions, or the gain of one over another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from headwater.losses.batch import Row
from headwater.losses.distributions import Composed, Distributions, Gain
from headwater.teachers.scoring import distributions_of
from headwater.teachers.translated import Supervisor
from headwater.types import Rollout


@dataclass(frozen=True)
class ComposedTeacher:
    """Scores rollouts with every model and combines their distributions. It does not sample.

    combine  distributions of all models at a rollout's tokens -> the teacher's, `Composed` or `Gain`
    """

    models: tuple[Supervisor, ...]
    combine: Callable[[tuple[Distributions, ...]], Distributions]

    @property
    def vocabulary(self) -> int:
        return self.models[0].vocabulary

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        return sum(model.pass_flops(rows, passes) for model in self.models)

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
        scored = [distributions_of(model, rollouts, tokens) for model in self.models]
        return [self.combine(parts) for parts in zip(*scored, strict=True)]


def product(weights: tuple[float, ...]) -> Callable[[tuple[Distributions, ...]], Distributions]:
    """Combine by the normalized product of the distributions, with these weights of the log-probs; they sum to 1."""
    return lambda parts: Composed(parts, weights)


def gain(parts: tuple[Distributions, ...]) -> Distributions:
    """Combine (the teacher's, another model's) distributions to the teacher's gain over the other model."""
    teacher, base = parts
    return Gain((teacher, base))
