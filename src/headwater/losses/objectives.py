"""Loss terms of each objective: the per-token loss as a weighted sum of terms.

`config.objectives` says who samples and what scores; a row here adds the loss. GRPO (λ = 1) and on-policy distillation (λ = 0) are
the endpoints of one axis, and `mixed` interpolates between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from headwater.config.dense import Dense
from headwater.config.objectives import Source
from headwater.config.stage import Sparse, Stage
from headwater.losses import token_losses
from headwater.losses.token_losses import Divergence
from headwater.losses.token_stats import Tokens

Term = Callable[[Tokens], Tensor]
"""Tokens -> loss (N,), unreduced."""


@dataclass(frozen=True)
class Objective:
    """The loss of a stage, and the inputs that the training loop computes for it.

    terms        (weight, token loss) pairs; the loss of a token is their weighted sum
    divergence   the exact divergence that a term reads from `student.divergence_N`
    """

    stage: Stage
    terms: tuple[tuple[float, Term], ...]
    divergence: Divergence | None = None
    teacher_tokens: bool = False
    """Whether a term reads the teacher's log-prob of each sampled token."""
    skip_zero_advantage: bool = False
    """Whether a rollout of advantage 0 has no gradient, so that its forward pass can be skipped."""
    importance_cap: float | None = None
    """Bound of `token_losses.truncated_importance`; None where the sampler's log-probs are those of the trainer."""

    @property
    def source(self) -> Source:
        return self.stage.spec.source

    @property
    def signals(self) -> tuple[str, ...]:
        """What each step computes for its rollouts: `reward`, `reference` (log-probs), `teacher`. Cached rollouts need nothing."""
        if not self.stage.on_policy:
            return ()
        needed = {
            "reward": self.stage.needs_labels,
            "reference": self.stage.needs_reference,
            "teacher": self.stage.needs_teacher,
        }
        return tuple(name for name, is_needed in needed.items() if is_needed)

    def token_loss(self, tokens: Tokens) -> Tensor:
        return sum((weight * term(tokens) for weight, term in self.terms), torch.zeros_like(tokens.old_logp_N))


def sparse_term(sparse: Sparse, tokens: Tokens) -> Tensor:
    """Clipped policy gradient on the rollout's advantage, plus kl_coef · KL to the reference."""
    loss_N = clipped_term(sparse, tokens, tokens.advantages_N)
    if tokens.reference_logp_N is not None:
        loss_N = loss_N + sparse.kl_coef * token_losses.reference_kl(tokens.student.logp_N, tokens.reference_logp_N)
    return loss_N


def constant_term(sparse: Sparse, tokens: Tokens) -> Tensor:
    """An advantage of −1 on every sampled token: no reward, no teacher (the control of 2608.31046)."""
    return clipped_term(sparse, tokens, torch.full_like(tokens.old_logp_N, -1.0))


def clipped_term(sparse: Sparse, tokens: Tokens, advantages_N: Tensor) -> Tensor:
    """Clipped policy gradient, with importance weights where the sampler's probabilities differ from the trainer's."""
    loss_N = token_losses.policy_gradient(
        tokens.student.logp_N, tokens.old_logp_N, advantages_N, sparse.clip_low, sparse.clip_high
    )
    return tokens.importance_weighted(loss_N)


def dense_term(dense: Dense, tokens: Tokens) -> Tensor:
    """The exact divergence between student and teacher at every token, min(D, clip) where the recipe bounds it.

    A token above the bound adds a constant to the loss and nothing to the gradient.
    """
    assert tokens.student.divergence_N is not None
    divergence_N = tokens.student.divergence_N
    return tokens.dense_weighted(divergence_N if dense.clip is None else divergence_N.clamp_max(dense.clip))


def sampled_term(sparse: Sparse, tokens: Tokens) -> Tensor:
    """Reverse KL estimated from the sampled token alone (k1)."""
    assert tokens.student.teacher_logp_N is not None
    loss_N = token_losses.sampled_reverse_kl(
        tokens.student.logp_N, tokens.old_logp_N, tokens.student.teacher_logp_N, sparse.clip_low, sparse.clip_high
    )
    return tokens.dense_weighted(tokens.importance_weighted(loss_N))


def cross_entropy_term(tokens: Tokens) -> Tensor:
    """Hard-label loss on the sampled tokens."""
    return token_losses.cross_entropy(tokens.student.logp_N)


def divergence_of(dense: Dense) -> Divergence | None:
    """The exact divergence that a recipe names; None for `sampled`, which reads the sampled tokens alone."""
    exact: dict[str, Divergence] = {
        "reverse": token_losses.REVERSE,
        "forward": token_losses.FORWARD,
        "jsd": token_losses.jensen_shannon(dense.beta),
        "skewed": token_losses.skewed(dense.beta),
        "entropy_aware": token_losses.entropy_aware(dense.entropy_above),
        "uld": token_losses.SORTED,
    }
    return exact.get(dense.divergence)


def off_policy_divergence(dense: Dense) -> Divergence:
    """Forward KL, whatever divergence OPD has; with `uld`, which compares no tokens, that."""
    return token_losses.SORTED if dense.divergence == "uld" else token_losses.FORWARD


def on_policy(stage: Stage, sparse_share: float) -> Objective:
    """J_λ = (1−λ) dense + λ sparse on the policy's own rollouts (2605.12483, v1).

    A term of weight 0 is left out, so λ=1 is GRPO itself and needs no teacher, and λ=0 is on-policy distillation itself and
    needs no labels.
    """
    terms: list[tuple[float, Term]] = []
    divergence = None
    if sparse_share > 0.0:
        terms.append((sparse_share, partial(sparse_term, stage.sparse)))
    if sparse_share < 1.0:
        divergence = divergence_of(stage.dense)
        dense = partial(sampled_term, stage.sparse) if divergence is None else partial(dense_term, stage.dense)
        terms.append((1.0 - sparse_share, dense))
    return Objective(
        stage,
        tuple(terms),
        divergence,
        teacher_tokens=sparse_share < 1.0 and divergence is None,
        skip_zero_advantage=sparse_share == 1.0 and stage.sparse.kl_coef == 0.0,
    )


LOSSES: dict[str, Callable[[Stage], Objective]] = {
    "grpo": lambda stage: on_policy(stage, 1.0),
    "opd": lambda stage: on_policy(stage, 0.0),
    "mixed": lambda stage: on_policy(stage, stage.sparse_share or 0.0),
    "forward_kl": lambda stage: Objective(
        stage, ((1.0, partial(dense_term, stage.dense)),), off_policy_divergence(stage.dense)
    ),
    "sft": lambda stage: Objective(stage, ((1.0, cross_entropy_term),)),
    "constant": lambda stage: Objective(stage, ((1.0, partial(constant_term, stage.sparse)),)),
}
"""One row for each row of `config.objectives.OBJECTIVES`; a user's objective is a function of its own."""


def objective_of(stage: Stage, importance_cap: float | None = None) -> Objective:
    """The objective of a stage, with the cap on importance weights for samplers that are not the trainer's own forward pass."""
    make = stage.spec.loss or LOSSES[stage.objective]
    objective: Objective = make(stage)
    return replace(objective, importance_cap=importance_cap)
