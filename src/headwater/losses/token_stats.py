"""What is known of the completion tokens of a batch, one number a token: all that a token loss may look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStats:
    """What the policy says of N tokens, and how far its distributions are from the teacher's. Only `logp_N` and
    `divergence_N` may carry gradients."""

    logp_N: Tensor
    entropy_N: Tensor
    divergence_N: Tensor | None = None
    kl_student_teacher_N: Tensor | None = None
    kl_teacher_student_N: Tensor | None = None
    teacher_logp_N: Tensor | None = None

    @staticmethod
    def joined(parts: Sequence[TokenStats]) -> TokenStats:
        """One after the other; all have the same fields filled."""
        if len(parts) == 1:
            return parts[0]
        columns = {one.name: [getattr(part, one.name) for part in parts] for one in fields(TokenStats)}
        joined = {name: None if one[0] is None else torch.cat(one) for name, one in columns.items()}
        return TokenStats(**joined)  # type: ignore[arg-type]

    def led_by(self, logp_N: Tensor, divergence_N: Tensor | None) -> TokenStats:
        """The same with other tensors in the places that carry gradients."""
        return replace(self, logp_N=logp_N, divergence_N=divergence_N)


@dataclass(frozen=True)
class Tokens:
    """N tokens as a token loss sees them.

    old_logp_N        the policy's own log-probs before the first update on this batch, without gradient
    advantages_N      each token's rollout's
    reference_logp_N  the log-probs of the weights that the stage began with, where the loss asks for them
    importance_N      how often a token counts in a policy gradient, where its sampler computes otherwise than the trainer
    """

    student: TokenStats
    old_logp_N: Tensor
    advantages_N: Tensor
    reference_logp_N: Tensor | None = None
    importance_N: Tensor | None = None

    def as_sampled(self, loss_N: Tensor) -> Tensor:
        """A policy gradient's loss (N,), corrected for the sampler's own probabilities."""
        return loss_N if self.importance_N is None else self.importance_N * loss_N
