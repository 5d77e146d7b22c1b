"""Per-token inputs and outputs of the loss: what is compared, what was measured, what a token loss reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from headwater.losses import per_token
from headwater.losses.comparison import Comparison, Student
from headwater.losses.distributions import Distributions, HoldsTokens
from headwater.losses.token_losses import Divergence


@dataclass(frozen=True)
class TokenInputs:
    """N target tokens and the teacher that they are compared with.

    temperature     the one that sampled the tokens; logits are divided by it
    divergence      the loss's divergence; with a teacher both KLs are always measured, without gradient
    teacher_tokens  also measure the teacher's log-prob of each target
    """

    targets_N: Tensor
    temperature: float
    teacher: Distributions | None = None
    divergence: Divergence | None = None
    teacher_tokens: bool = False

    def rows(self, start: int, stop: int) -> TokenInputs:
        teacher = None if self.teacher is None else self.teacher.rows(start, stop)
        return replace(self, targets_N=self.targets_N[start:stop], teacher=teacher)

    def compare(self, student: Student, gradient: bool) -> Comparison:
        """The student compared with the teacher at these tokens; `gradient` as in `distributions.Known.compare`."""
        if self.teacher is None:
            return Comparison()
        known = self.teacher.materialize()
        compared = known.compare(student, self.divergence, gradient)
        if self.teacher_tokens and compared.teacher_logp_N is None and isinstance(known, HoldsTokens):
            compared = replace(compared, teacher_logp_N=known.token_logp(self.targets_N))
        return compared


@dataclass(frozen=True)
class TokenStats:
    """Statistics of N tokens under the policy, and their divergences from the teacher. Only `logp_N` and `divergence_N` may
    carry gradients."""

    logp_N: Tensor
    entropy_N: Tensor
    divergence_N: Tensor | None = None
    kl_student_teacher_N: Tensor | None = None
    kl_teacher_student_N: Tensor | None = None
    teacher_logp_N: Tensor | None = None

    @staticmethod
    def of(logp_N: Tensor, entropy_N: Tensor, compared: Comparison) -> TokenStats:
        kls = compared.kl_student_teacher_N, compared.kl_teacher_student_N
        return TokenStats(logp_N, entropy_N, compared.divergence_N, *kls, compared.teacher_logp_N)

    concatenate = per_token.concatenate


@dataclass(frozen=True)
class Tokens:
    """N tokens as a token loss reads them.

    old_logp_N        the policy's log-probs before the first update on this batch, without gradient
    advantages_N      the advantage of each token's rollout
    reference_logp_N  log-probs under the weights that the stage started with, if the loss has a KL penalty
    importance_N      importance weight of each token, if its sampler's probabilities differ from the trainer's
    dense_weights_N   weight of the teacher's signal at each token, if the recipe weighs them
    """

    student: TokenStats
    old_logp_N: Tensor
    advantages_N: Tensor
    reference_logp_N: Tensor | None = None
    importance_N: Tensor | None = None
    dense_weights_N: Tensor | None = None

    def importance_weighted(self, loss_N: Tensor) -> Tensor:
        """A policy-gradient loss (N,), corrected for the sampler's probabilities."""
        return loss_N if self.importance_N is None else self.importance_N * loss_N

    def dense_weighted(self, loss_N: Tensor) -> Tensor:
        """The loss (N,) of comparing with the teacher, with the weights of the tokens."""
        return loss_N if self.dense_weights_N is None else self.dense_weights_N * loss_N
