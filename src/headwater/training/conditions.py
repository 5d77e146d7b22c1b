"""The paper's condition C2, which it never measures: how far student and teacher stand apart, both ways.

KL(π_T‖πθ) on prefixes that the teacher visits is what the warm-up lowers; KL(πθ‖π_T) on prefixes that the student visits is
what on-policy distillation lowers, and what it needs to be small already. Measured on held-out prompts, without labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from headwater.losses import token_losses
from headwater.losses.distributions import joined
from headwater.losses.logprobs import tokens_at_once
from headwater.models.fsdp import sharded_forward
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.teachers.scoring import ScoringTeacher, distributions_of, hidden_of
from headwater.types import Rollout


@dataclass(frozen=True)
class Apart:
    """Token means over one set of rollouts; divergences and entropies in nats."""

    kl_teacher_student: float
    kl_student_teacher: float
    overlap: float
    entropy_student: float
    entropy_teacher: float


def measure(
    student: Policy,
    teacher: Policy | ScoringTeacher,
    student_rollouts: Sequence[Rollout],
    teacher_rollouts: Sequence[Rollout],
    top_k: int,
    tokens: int,
) -> dict[str, float]:
    """C2 and its neighbours from a few rollouts of each.

    tokens  at most so many padded tokens in a scoring pass

    Returns kl_teacher_student and overlap_teacher_prefixes and entropy_teacher on the teacher's rollouts; kl_student_teacher,
    overlap_student_prefixes and entropy_student on the student's.
    """
    theirs = apart(student, teacher, teacher_rollouts, top_k, tokens)
    own = apart(student, teacher, student_rollouts, top_k, tokens)
    return {
        "kl_teacher_student": theirs.kl_teacher_student,
        "kl_student_teacher": own.kl_student_teacher,
        "overlap_teacher_prefixes": theirs.overlap,
        "overlap_student_prefixes": own.overlap,
        "entropy_student": own.entropy_student,
        "entropy_teacher": theirs.entropy_teacher,
    }


@torch.no_grad()
def apart(
    student: Policy, teacher: Policy | ScoringTeacher, rollouts: Sequence[Rollout], top_k: int, tokens: int
) -> Apart:
    """How the two models differ at every completion token of these rollouts, all sampled at one temperature."""
    budget, ranks = BatchBudget(tokens), student.ranks
    share = ranks.share(rollouts)
    own = budget.fit_passes(partial(hidden_of, student, share), share)
    theirs = budget.fit_passes(partial(distributions_of, teacher, share), share)

    def added() -> Tensor:
        sums = torch.zeros(5, dtype=torch.float64)
        if not own:
            return sums
        own_NH, told = torch.cat(own), joined(theirs, student.device)
        size = tokens_at_once(student.vocabulary, own_NH.device)
        for start in range(0, len(own_NH), size):
            logits_NV = student.logits(own_NH[start : start + size]).float() / rollouts[0].temperature
            known = told.rows(start, start + len(logits_NV)).ready()
            sums += _sums(*known.align(torch.log_softmax(logits_NV, dim=-1)), top_k)
        return sums

    names = [field.name for field in fields(Apart)]
    found = ranks.all_reduce_sum(dict(zip(names, sharded_forward(student, added).tolist(), strict=True)))
    count = sum(len(rollout.completion_ids) for rollout in rollouts)
    return Apart(**{name: found[name] / count for name in names})


def _sums(student_NV: Tensor, teacher_NV: Tensor, top_k: int) -> Tensor:
    """Sums over N tokens of (KL(T‖S), KL(S‖T), overlap, H(S), H(T))."""
    return torch.stack(
        [
            token_losses.forward_kl(student_NV, teacher_NV).sum(),
            token_losses.reverse_kl(student_NV, teacher_NV).sum(),
            overlap(student_NV, teacher_NV, top_k).sum(),
            _entropy(student_NV).sum(),
            _entropy(teacher_NV).sum(),
        ]
    ).to("cpu", torch.float64)


def overlap(student_NV: Tensor, teacher_NV: Tensor, top_k: int) -> Tensor:
    """Share of the teacher's k likeliest tokens that are among the student's k likeliest: (N, V), (N, V) -> (N,).

    k is at most half of the vocabulary: beyond that two orders must overlap, whatever they are.

    Example: likeliest two {a, b} and {b, c}: ½.
    """
    k = max(1, min(top_k, student_NV.shape[-1] // 2))
    chosen = torch.zeros_like(student_NV, dtype=torch.bool).scatter_(1, student_NV.topk(k, dim=-1).indices, True)
    return chosen.gather(1, teacher_NV.topk(k, dim=-1).indices).float().mean(dim=-1)


def _entropy(logp_NV: Tensor) -> Tensor:
    return -(logp_NV.exp() * logp_NV.clamp_min(token_losses.LOWEST)).sum(dim=-1)
