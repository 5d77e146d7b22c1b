"""Token losses: one unreduced number per token. They see no denominator, no config and no mask.

Tokens are flat: N is the number of completion tokens of a batch, so prompt and padding tokens cannot enter a loss. Log-probs are
natural, float32 or wider, at the sampling temperature, and named after the model that gives them. E is the number of events of a
distribution: the vocabulary, or the k kept tokens and their tail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

LOWEST = -1e30
"""A finite stand-in for the log of 0."""


def policy_gradient(
    student_logp_N: Tensor, old_logp_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Clipped policy-gradient loss −min(r·A, clip(r, 1−low, 1+high)·A), with r = exp(student − old).

    Where old is the student's own detached log-prob, r is 1 and the gradient is −A ∇log π.

    Shapes: all (N,) -> (N,). Source: PPO 1707.06347 eq. 7; GRPO 2402.03300 eq. 3; clip-higher DAPO 2503.14476.

    Example: r = 1.5, A = 2, high = 0.2 gives −min(3.0, 2.4) = −2.4.
    """
    ratio_N = torch.exp(student_logp_N - old_logp_N)
    clipped_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)


def reference_kl(student_logp_N: Tensor, reference_logp_N: Tensor) -> Tensor:
    """k3 estimate of KL(student ‖ reference) from sampled tokens: exp(d) − d − 1, with d = reference − student.

    Never negative, zero where the two agree. Shapes: (N,), (N,) -> (N,). Source: GRPO 2402.03300 eq. 4.

    Example: d = ln 2 gives 2 − 0.6931 − 1 = 0.3069.
    """
    difference_N = reference_logp_N - student_logp_N
    return torch.exp(difference_N) - difference_N - 1.0


def cross_entropy(student_logp_N: Tensor) -> Tensor:
    """Hard-label loss −log π(y), for fine-tuning on sampled tokens. Shapes: (N,) -> (N,)."""
    return -student_logp_N


def forward_kl(student_logp_NE: Tensor, teacher_logp_NE: Tensor) -> Tensor:
    """KL(teacher ‖ student) = Σ_e p_T (log p_T − log p_S), exact over the events; 0 where both are equal.

    The warm-up's loss L_F (2605.12483, stage 2a) when the tokens are the teacher's. Shapes: (N, E), (N, E) -> (N,).

    Example: teacher (½, ½), student (¼, ¾): ½ ln 2 + ½ ln ⅔ = 0.1438.
    """
    return (teacher_logp_NE.exp() * _difference(teacher_logp_NE, student_logp_NE)).sum(dim=-1)


def reverse_kl(student_logp_NE: Tensor, teacher_logp_NE: Tensor) -> Tensor:
    """KL(student ‖ teacher) = Σ_e p_S (log p_S − log p_T), exact over the events, differentiable.

    On-policy distillation's loss L_R (2605.12483, stage 2b) when the tokens are the student's; its negative is the
    dense-reward objective J_0 / β. Shapes: (N, E), (N, E) -> (N,).

    Example: student (¼, ¾), teacher (½, ½): ¼ ln ½ + ¾ ln 1.5 = 0.1308.
    """
    return (student_logp_NE.exp() * _difference(student_logp_NE, teacher_logp_NE)).sum(dim=-1)


def jsd(student_logp_NE: Tensor, teacher_logp_NE: Tensor, beta: float) -> Tensor:
    """Generalised Jensen–Shannon divergence β KL(T ‖ M) + (1−β) KL(S ‖ M), with M = β T + (1−β) S (GKD, 2306.13649).

    Shapes: (N, E), (N, E) -> (N,). Symmetric at β = ½; divided by β it tends to the forward KL as β -> 0.

    Example: β = ½, student (¼, ¾), teacher (½, ½): M = (⅜, ⅝); ½·0.0323 + ½·0.0354 = 0.0338.
    """
    mixture_NE = _mixture(student_logp_NE.clamp_min(LOWEST), teacher_logp_NE.clamp_min(LOWEST), beta)
    return beta * forward_kl(mixture_NE, teacher_logp_NE) + (1.0 - beta) * forward_kl(mixture_NE, student_logp_NE)


def skewed_reverse_kl(student_logp_NE: Tensor, teacher_logp_NE: Tensor, beta: float) -> Tensor:
    """Reverse KL to a proximal teacher, KL(S ‖ β T + (1−β) S): bounded by −log(1−β) at every token.

    Where the teacher excludes what the student says, the plain reverse KL is unbounded and one token can outweigh a batch.
    Shapes: (N, E), (N, E) -> (N,). Source: TOP-D 2607.04751; the skew divergence of Lee (1999).

    Example: β = ½, student (1, 0), teacher (0, 1): the mixture is (½, ½), and the divergence ln 2.
    """
    mixture_NE = _mixture(student_logp_NE.clamp_min(LOWEST), teacher_logp_NE.clamp_min(LOWEST), beta)
    return reverse_kl(student_logp_NE, mixture_NE)


def entropy_aware_kl(student_logp_NE: Tensor, teacher_logp_NE: Tensor, above: float) -> Tensor:
    """KL(S ‖ T) + 1[H(T) > above] · KL(T ‖ S): the forward KL is added where the teacher itself sees several ways on.

    above  entropy of the teacher in nats

    Shapes: (N, E), (N, E) -> (N,). Source: EOPD 2603.07079, there with the one-token estimate of the reverse KL and the forward KL
    over the teacher's top 16; here both are exact, so the teacher itself is a stationary point.

    Example: above 0.5, teacher (½, ½) of entropy 0.6931, student (¼, ¾): 0.1308 + 0.1438 = 0.2746; above 0.8: 0.1308.
    """
    uncertain_N = entropy(teacher_logp_NE) > above
    return reverse_kl(student_logp_NE, teacher_logp_NE) + uncertain_N * forward_kl(student_logp_NE, teacher_logp_NE)


def sorted_difference(student_logp_NE: Tensor, teacher_logp_NE: Tensor) -> Tensor:
    """L1 distance of sorted probabilities, Σ_i |p_S(i) − p_T(i)| over ranks i: ULD (2402.12030 eq. 5), the Wasserstein distance under
    equal costs. It needs no common vocabulary and cannot tell apart distributions that differ by a permutation of tokens.

    Shapes: (N, E), (N, E) -> (N,), sorted in descending order.

    Example: student (¾, ¼), teacher (½, ½): ¼ + ¼ = ½.
    """
    return (student_logp_NE.exp() - teacher_logp_NE.exp()).abs().sum(dim=-1)


@torch.no_grad()
def gain_target(student_logp_NV: Tensor, teacher_logp_NV: Tensor, base_logp_NV: Tensor) -> Tensor:
    """Log-probs of T̂ ∝ S · exp(g): the student's distribution S moved by the gated gain g of T over T₀, without gradient.

    With A^Δ = log T − log T₀ and A = log T − log S, each minus its mean under S, g is A^Δ where both have the same sign and 0
    elsewhere. The gradient of KL(S ‖ T̂) at a constant T̂ is p_S(j) · (Σ_v p_S(v) g(v) − g(j)): the expectation over S of the
    policy gradient with advantage g, without sampling noise (OPD², 2607.15161; there the mean is over the top 1,024 tokens).

    Shapes: all (N, V) -> (N, V).

    Example: S = (½, ½), T = (¾, ¼), T₀ = (¼, ¾) give A^Δ = ±1.0986 and A = ±0.5493, so T̂ ∝ (½ · 3, ½ / 3) = (0.9, 0.1).
    """
    student_NV, teacher_NV, base_NV = (
        logp_NV.to(student_logp_NV).clamp_min(LOWEST) for logp_NV in (student_logp_NV, teacher_logp_NV, base_logp_NV)
    )
    p_NV = student_NV.exp()
    gain_NV, distance_NV = (
        ratio_NV - torch.linalg.vecdot(p_NV, ratio_NV)[:, None]
        for ratio_NV in (teacher_NV - base_NV, teacher_NV - student_NV)
    )
    gated_NV = torch.where(gain_NV * distance_NV > 0.0, gain_NV, torch.zeros_like(gain_NV))
    return torch.log_softmax(student_NV + gated_NV, dim=-1)


def sampled_reverse_kl(
    student_logp_N: Tensor, old_logp_N: Tensor, teacher_logp_N: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """On-policy distillation from the sampled tokens alone (k1): a policy gradient with advantage log p_T − log p_S.

    Averaged over tokens drawn from the student, its gradient is that of the full reverse KL. Shapes: all (N,) -> (N,).
    """
    advantages_N = teacher_logp_N - student_logp_N.detach()
    return policy_gradient(student_logp_N, old_logp_N, advantages_N, clip_low, clip_high)


def truncated_importance(old_logp_N: Tensor, sampler_logp_N: Tensor, cap: float) -> Tensor:
    """Truncated importance weight min(p_old / p_sampler, cap) of tokens that an inference engine sampled. No gradient.

    The engine's kernels give slightly other probabilities than the trainer's, and the weights make averages those of the trainer.
    The cap bounds their variance, at the price of a bias where it binds. Shapes: (N,), (N,) -> (N,).
    Source: the ρ of IMPALA 1802.01561 eq. 1, token by token for rollout engines (Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training").

    Example: p_old 0.3, p_sampler 0.1, cap 2 gives 2; p_old 0.1, p_sampler 0.2 gives 0.5.
    """
    return torch.exp(old_logp_N - sampler_logp_N).clamp_max(cap).detach()


@dataclass(frozen=True)
class Pair:
    """Student and teacher distributions over the same E events at N tokens, and the terms that all divergences share.

    log_ratio_NE  log p_S − log p_T
    reverse_N     KL(student ‖ teacher)
    forward_N     KL(teacher ‖ student)
    """

    student_logp_NE: Tensor
    student_p_NE: Tensor
    teacher_logp_NE: Tensor
    teacher_p_NE: Tensor
    log_ratio_NE: Tensor
    reverse_N: Tensor
    forward_N: Tensor

    @staticmethod
    def of(student_logp_NE: Tensor, student_p_NE: Tensor, teacher_logp_NE: Tensor) -> Pair:
        """From finite log-probs: `LOWEST` stands for events that the teacher excludes."""
        teacher_p_NE, log_ratio_NE = teacher_logp_NE.exp(), student_logp_NE - teacher_logp_NE
        reverse_N = torch.linalg.vecdot(student_p_NE, log_ratio_NE)
        forward_N = -torch.linalg.vecdot(teacher_p_NE, log_ratio_NE)
        return Pair(student_logp_NE, student_p_NE, teacher_logp_NE, teacher_p_NE, log_ratio_NE, reverse_N, forward_N)


LogitGradient = Callable[[Tensor], Tensor]
"""dL/dD of each token (N, 1) -> dL/dlogits of the student (N, E)."""


@dataclass(frozen=True)
class Divergence:
    """A divergence D: a definition that autograd can differentiate, and its closed-form gradient by the student's logits.

    value        (student_logp (N, E), teacher_logp (N, E)) -> (N,); also what a call returns
    closed_form  a pair -> values (N,), and the gradient
    """

    value: Callable[[Tensor, Tensor], Tensor]
    closed_form: Callable[[Pair], tuple[Tensor, LogitGradient]]

    def __call__(self, student_logp_NE: Tensor, teacher_logp_NE: Tensor) -> Tensor:
        return self.value(student_logp_NE, teacher_logp_NE)


def _reverse_closed_form(pair: Pair) -> tuple[Tensor, LogitGradient]:
    """d KL(S ‖ T) / d logit_j = p_S(j) · (log p_S(j) − log p_T(j) − KL(S ‖ T))."""
    return pair.reverse_N, _weighted_deviation(pair.student_p_NE, pair.log_ratio_NE, pair.reverse_N)


def _forward_closed_form(pair: Pair) -> tuple[Tensor, LogitGradient]:
    """d KL(T ‖ S) / d logit_j = p_S(j) − p_T(j)."""
    return pair.forward_N, lambda outer_N1: (pair.student_p_NE - pair.teacher_p_NE).mul_(outer_N1)


def _jsd_closed_form(pair: Pair, beta: float) -> tuple[Tensor, LogitGradient]:
    """d JSD / d logit_j = (1−β) · p_S(j) · (log p_S(j) − log M(j) − KL(S ‖ M)); the terms by M itself cancel."""
    mixture_NE = _mixture(pair.student_logp_NE, pair.teacher_logp_NE, beta)
    student_ratio_NE = pair.student_logp_NE - mixture_NE
    student_N = torch.linalg.vecdot(pair.student_p_NE, student_ratio_NE)
    teacher_N = torch.linalg.vecdot(pair.teacher_p_NE, mixture_NE.neg_().add_(pair.teacher_logp_NE))
    gradient = _weighted_deviation(pair.student_p_NE, student_ratio_NE, student_N)
    return beta * teacher_N + (1.0 - beta) * student_N, lambda outer_N1: gradient(outer_N1 * (1.0 - beta))


def _skewed_closed_form(pair: Pair, beta: float) -> tuple[Tensor, LogitGradient]:
    """d KL(S ‖ M) / d logit_j = p_S(j) · (a_j − Σ_i p_S(i) a_i), with a = log p_S − log M − (1−β) p_S / M."""
    ratio_NE = pair.student_logp_NE - _mixture(pair.student_logp_NE, pair.teacher_logp_NE, beta)
    value_N = torch.linalg.vecdot(pair.student_p_NE, ratio_NE)
    by_p_NE = ratio_NE - (1.0 - beta) * ratio_NE.exp()
    mean_N = torch.linalg.vecdot(pair.student_p_NE, by_p_NE)
    return value_N, _weighted_deviation(pair.student_p_NE, by_p_NE, mean_N)


def _entropy_aware_closed_form(pair: Pair, above: float) -> tuple[Tensor, LogitGradient]:
    """The closed forms of both KLs, the forward one where the teacher's entropy is above the threshold."""
    uncertain_N = (-torch.linalg.vecdot(pair.teacher_p_NE, pair.teacher_logp_NE) > above).to(pair.reverse_N.dtype)
    (reverse_N, reverse), (forward_N, forward) = _reverse_closed_form(pair), _forward_closed_form(pair)
    return reverse_N + uncertain_N * forward_N, lambda outer_N1: reverse(outer_N1).add_(
        forward(outer_N1 * uncertain_N[:, None])
    )


def _sorted_closed_form(pair: Pair) -> tuple[Tensor, LogitGradient]:
    """d ULD / d logit_j = p_S(j) · (sign_j − Σ_i p_S(i) sign_i), with sign the sign of p_S − p_T at each rank."""
    difference_NE = pair.student_p_NE - pair.teacher_p_NE
    sign_NE = difference_NE.sign()
    mean_N = torch.linalg.vecdot(pair.student_p_NE, sign_NE)
    return difference_NE.abs().sum(dim=-1), _weighted_deviation(pair.student_p_NE, sign_NE, mean_N)


def _weighted_deviation(p_NE: Tensor, value_NE: Tensor, mean_N: Tensor) -> LogitGradient:
    """p_j · (a_j − Σ_i p_i a_i) times the outer derivative: the gradient by the logits of p where that by p_j is a_j."""
    return lambda outer_N1: (value_NE - mean_N[:, None]).mul_(p_NE).mul_(outer_N1)


REVERSE = Divergence(reverse_kl, _reverse_closed_form)
FORWARD = Divergence(forward_kl, _forward_closed_form)
SORTED = Divergence(sorted_difference, _sorted_closed_form)


def jensen_shannon(beta: float) -> Divergence:
    """`jsd` at a fixed β, the teacher's share of the mixture."""
    return Divergence(partial(jsd, beta=beta), partial(_jsd_closed_form, beta=beta))


def skewed(beta: float) -> Divergence:
    """`skewed_reverse_kl` at a fixed β, the teacher's share of the mixture."""
    return Divergence(partial(skewed_reverse_kl, beta=beta), partial(_skewed_closed_form, beta=beta))


def entropy_aware(above: float) -> Divergence:
    """`entropy_aware_kl` at a fixed threshold in nats."""
    return Divergence(partial(entropy_aware_kl, above=above), partial(_entropy_aware_closed_form, above=above))


def entropy(logp_NE: Tensor) -> Tensor:
    """Entropy in nats; events of log-prob −inf add 0. Shapes: (N, E) -> (N,)."""
    return -(logp_NE.exp() * logp_NE.clamp_min(LOWEST)).sum(dim=-1)


def _mixture(student_logp_NE: Tensor, teacher_logp_NE: Tensor, beta: float) -> Tensor:
    """Log-probs of β T + (1−β) S. Both must be finite: the gradient of logaddexp(−inf, −inf) is NaN."""
    return torch.logaddexp(teacher_logp_NE + math.log(beta), student_logp_NE + math.log1p(-beta))


def _difference(a: Tensor, b: Tensor) -> Tensor:
    # An event of probability 0 under the first distribution adds 0·log 0 = 0 to a divergence, not NaN. Its log may be −inf or LOWEST.
    return torch.where(a <= LOWEST, torch.zeros_like(a), a - b)
