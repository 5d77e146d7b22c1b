"""The table: every objective is who samples × what scores × how densely.

A row names the source of its rollouts, the signals that annotate them, and a weighted sum of token losses. GRPO and on-policy
distillation differ here exactly where they differ in the paper, and the λ axis between them is their weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from headwater.config.stage import Dense, Sparse, Stage
from headwater.losses import token_losses
from headwater.losses.token_losses import Divergence
from headwater.losses.token_stats import Tokens

Term = Callable[[Tokens], Tensor]
"""Tokens -> loss (N,), unreduced."""


@dataclass(frozen=True)
class Objective:
    """One row of the table.

    source       whose samples are trained on
    signals      what is written on the rows before the update, in this order
    terms        (weight, token loss) pairs; the loss of a token is their weighted sum
    divergence   the exact divergence that a term reads from `student.divergence_N`
    """

    source: Literal["policy", "teacher"]
    signals: tuple[Literal["reward", "reference", "teacher"], ...]
    terms: tuple[tuple[float, Term], ...]
    divergence: Divergence | None = None
    teacher_tokens: bool = False
    idle_without_advantage: bool = False
    """A rollout of advantage 0 cannot change the gradient, so it need not be run."""
    importance_cap: float | None = None
    """Where the sampler is not the trainer's own forward pass: the bound of `losses.truncated_importance`."""

    def token_loss(self, tokens: Tokens) -> Tensor:
        return sum((weight * term(tokens) for weight, term in self.terms), torch.zeros_like(tokens.old_logp_N))


def sparse_term(sparse: Sparse, tokens: Tokens) -> Tensor:
    """Clipped policy gradient on the rollout's advantage, plus kl_coef · KL to the reference."""
    student_logp_N = tokens.student.logp_N
    loss_N = tokens.as_sampled(
        token_losses.policy_gradient(
            student_logp_N, tokens.old_logp_N, tokens.advantages_N, sparse.clip_low, sparse.clip_high
        )
    )
    if tokens.reference_logp_N is not None:
        loss_N = loss_N + sparse.kl_coef * token_losses.reference_kl(student_logp_N, tokens.reference_logp_N)
    return loss_N


def dense_term(tokens: Tokens) -> Tensor:
    """The exact divergence between student and teacher at every token."""
    assert tokens.student.divergence_N is not None
    return tokens.student.divergence_N


def sampled_term(sparse: Sparse, tokens: Tokens) -> Tensor:
    """Reverse KL from the sampled token alone (k1)."""
    assert tokens.student.teacher_logp_N is not None
    return tokens.as_sampled(
        token_losses.sampled_reverse_kl(
            tokens.student.logp_N, tokens.old_logp_N, tokens.student.teacher_logp_N, sparse.clip_low, sparse.clip_high
        )
    )


def constant_term(sparse: Sparse, tokens: Tokens) -> Tensor:
    """An advantage of −1 on every sampled token: no reward, no teacher (the control of 2608.31046)."""
    down_N = torch.full_like(tokens.old_logp_N, -1.0)
    return tokens.as_sampled(
        token_losses.policy_gradient(
            tokens.student.logp_N, tokens.old_logp_N, down_N, sparse.clip_low, sparse.clip_high
        )
    )


def hard_term(tokens: Tokens) -> Tensor:
    return token_losses.cross_entropy(tokens.student.logp_N)


def divergence_of(dense: Dense) -> Divergence | None:
    """The exact divergence a recipe names; None for the sampled form, which needs no distribution of the student."""
    exact: dict[str, Divergence] = {
        "reverse": token_losses.REVERSE,
        "forward": token_losses.FORWARD,
        "jsd": token_losses.jensen_shannon(dense.beta),
    }
    return exact.get(dense.divergence)


def on_policy(stage: Stage, sparse_share: float) -> Objective:
    """J_λ = (1−λ) dense + λ sparse on the policy's own rollouts (2605.12483, v1).

    A term of weight 0 is left out with its signals, so λ=1 is GRPO itself and needs no teacher, and λ=0 is on-policy
    distillation itself and needs no labels.
    """
    signals: list[Literal["reward", "reference", "teacher"]] = []
    terms: list[tuple[float, Term]] = []
    if sparse_share > 0.0:
        signals.append("reward")
        if stage.sparse.kl_coef > 0.0:
            signals.append("reference")
        terms.append((sparse_share, partial(sparse_term, stage.sparse)))
    divergence = None
    if sparse_share < 1.0:
        signals.append("teacher")
        divergence = divergence_of(stage.dense)
        terms.append(
            (1.0 - sparse_share, dense_term if divergence is not None else partial(sampled_term, stage.sparse))
        )
    return Objective(
        source="policy",
        signals=tuple(signals),
        terms=tuple(terms),
        divergence=divergence,
        teacher_tokens=sparse_share < 1.0 and divergence is None,
        idle_without_advantage=sparse_share == 1.0 and stage.sparse.kl_coef == 0.0,
    )


TABLE: dict[str, Callable[[Stage], Objective]] = {
    "grpo": lambda stage: on_policy(stage, 1.0),
    "opd": lambda stage: on_policy(stage, 0.0),
    "mixed": lambda stage: on_policy(stage, stage.sparse_share if stage.sparse_share is not None else 0.5),
    "forward_kl": lambda stage: Objective("teacher", (), ((1.0, dense_term),), token_losses.FORWARD),
    "sft": lambda stage: Objective("teacher", (), ((1.0, hard_term),)),
    "constant": lambda stage: Objective("policy", (), ((1.0, partial(constant_term, stage.sparse)),)),
}


def objective_of(stage: Stage, importance_cap: float | None = None) -> Objective:
    """The row of a stage. `importance_cap` is for samplers that compute otherwise than the trainer."""
    return replace(TABLE[stage.objective](stage), importance_cap=importance_cap)
