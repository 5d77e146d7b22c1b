"""Inputs and results of comparing student log-probs with teacher distributions, for every form of distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwater.losses import token_losses
from headwater.losses.token_losses import Divergence, LogitGradient


@dataclass(frozen=True)
class Student:
    """The student at N tokens.

    logp_NV  log-probs over the vocabulary
    logp_N   log-prob of each target
    p_NV     exp(logp_NV) of finite log-probs without graph, for closed forms; None: autograd differentiates `logp_NV`
    """

    logp_NV: Tensor
    logp_N: Tensor
    p_NV: Tensor | None = None


@dataclass(frozen=True)
class Comparison:
    """What a form measures at N tokens, each (N,); None where the form has no such number.

    divergence_N    of the loss
    teacher_logp_N  the teacher's log-prob of each target, from forms that know no other
    gradient        of `divergence_N` by the student's logits, if it was asked for
    """

    divergence_N: Tensor | None = None
    kl_student_teacher_N: Tensor | None = None
    kl_teacher_student_N: Tensor | None = None
    teacher_logp_N: Tensor | None = None
    gradient: LogitGradient | None = None


def compare_events(student_NE: Tensor, teacher_NE: Tensor, divergence: Divergence | None) -> Comparison:
    """Divergence and both KLs of log-probs over the same events (N, E). The KLs are measured without gradient."""
    divergence_N = None if divergence is None else divergence(student_NE, teacher_NE)
    with torch.no_grad():
        reverse_N, forward_N = (kl(student_NE, teacher_NE) for kl in (token_losses.reverse_kl, token_losses.forward_kl))
    return Comparison(divergence_N, reverse_N, forward_N)


def by_autograd(compare: Callable[[Tensor], Comparison], student: Student, gradient: bool) -> Comparison:
    """`compare` at the student's log-probs (N, V). With `gradient`, the gradient by the logits comes from autograd."""
    if not gradient:
        return compare(student.logp_NV)
    assert student.p_NV is not None
    with torch.enable_grad():
        leaf_NV = student.logp_NV.detach().requires_grad_()
        compared = compare(leaf_NV)
        if compared.divergence_N is None:
            return compared
        by_logp_NV = torch.autograd.grad(compared.divergence_N.sum(), leaf_NV)[0]
    # Through the softmax: d / d logit_j = g_j − p_j Σ_i g_i.
    by_logit_NV = by_logp_NV - student.p_NV * by_logp_NV.sum(dim=-1, keepdim=True)
    return replace(
        compared, divergence_N=compared.divergence_N.detach(), gradient=lambda outer_N1: by_logit_NV * outer_N1
    )
