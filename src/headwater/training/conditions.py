"""Condition C2 of the paper (minimal deviation): divergence between student and teacher, in both directions.

The warm-up lowers KL(π_T‖πθ) on teacher prefixes. On-policy distillation lowers KL(πθ‖π_T) on student prefixes, and needs it
to be small at its start. Measured on held-out prompts, without labels; the paper argues from C2 but does not measure it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from headwater.losses import token_losses
from headwater.losses.distributions import Distributions, concatenate
from headwater.losses.logprobs import tokens_at_once
from headwater.losses.materialized import Exact, Grouped, TopK
from headwater.models.fsdp import sharded_forward
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.teachers.scoring import ScoringTeacher, distributions_of, hidden_of
from headwater.types import Rollout

PASS_ROLLOUTS = 8
"""Rollouts that a model scores between two chances for the caller to stop: seconds, also for a large model on a CPU."""
MIN_PROBLEMS = 4
"""Fewest problems that C2 is measured on: a mean over fewer says little."""


@dataclass(frozen=True)
class Schedule:
    """When C2 is measured, and on how many problems: before the first step, every `every` steps, and after the last."""

    problems: int
    every: int

    def due(self, step: int, last: bool) -> bool:
        """Whether to measure after `step` steps."""
        return self.problems > 0 and (step % self.every == 0 or last)

    def measurements(self, steps: int) -> int:
        """Number of measurements in a stage of this many steps. Example: every 25 of 60 steps: at 0, 25, 50 and 60."""
        return 0 if self.problems == 0 else -(-steps // self.every) + 1

    def within(self, budget: float, cost: float, steps: int) -> Schedule:
        """The schedule, or one with fewer measurements (at least two), then fewer problems, or none, that costs at most `budget`.

        cost  of one problem in one measurement, in the unit of `budget`

        Example: 4 measurements of 64 problems at 1 each within 150: two, of 64 problems; within 100: two, of 50; within 6: none.
        """
        measurements = self.measurements(steps)
        if measurements * self.problems * cost <= budget:
            return self
        affordable = int(budget / cost)
        measurements = min(measurements, max(2, affordable // self.problems))
        problems = min(self.problems, affordable // measurements)
        return Schedule(problems if problems >= MIN_PROBLEMS else 0, max(1, -(-steps // max(1, measurements - 1))))


@dataclass(frozen=True)
class Divergences:
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
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Measure C2, top-k overlap and entropies on rollouts of both models.

    tokens      maximum tokens in a scoring pass
    check_stop  called between passes; what it raises ends the measurement

    Returns kl_teacher_student, overlap_teacher_prefixes and entropy_teacher on the teacher's rollouts; kl_student_teacher,
    overlap_student_prefixes and entropy_student on the student's.
    """
    on_teacher = divergences(student, teacher, teacher_rollouts, top_k, tokens, check_stop)
    on_student = divergences(student, teacher, student_rollouts, top_k, tokens, check_stop)
    return {
        "kl_teacher_student": on_teacher.kl_teacher_student,
        "kl_student_teacher": on_student.kl_student_teacher,
        "overlap_teacher_prefixes": on_teacher.overlap,
        "overlap_student_prefixes": on_student.overlap,
        "entropy_student": on_student.entropy_student,
        "entropy_teacher": on_teacher.entropy_teacher,
    }


@torch.no_grad()
def divergences(
    student: Policy,
    teacher: Policy | ScoringTeacher,
    rollouts: Sequence[Rollout],
    top_k: int,
    tokens: int,
    check_stop: Callable[[], None] = lambda: None,
) -> Divergences:
    """Compare the two models at every completion token of rollouts that share one sampling temperature."""
    budget, ranks = BatchBudget(tokens), student.ranks
    share = ranks.shard(rollouts)
    student_hidden: list[Tensor] = []
    teacher_distributions: list[Distributions] = []
    for start in ranks.lockstep(range(0, len(share), PASS_ROLLOUTS)):
        part = [] if start is None else share[start : start + PASS_ROLLOUTS]
        student_hidden += budget.fit_passes(partial(hidden_of, student, part), part)
        check_stop()
        teacher_distributions += budget.fit_passes(partial(distributions_of, teacher, part), part)
        check_stop()

    def sum_over_tokens() -> Tensor:
        sums = torch.zeros(5, dtype=torch.float64)
        if not student_hidden:
            return sums
        hidden_NH, teacher_NV = torch.cat(student_hidden), concatenate(teacher_distributions, student.device)
        size = tokens_at_once(student.vocabulary, hidden_NH.device)
        for start in range(0, len(hidden_NH), size):
            logits_NV = student.logits(hidden_NH[start : start + size]).float() / rollouts[0].temperature
            known = teacher_NV.rows(start, start + len(logits_NV)).materialize()
            assert isinstance(known, (Exact, TopK, Grouped))
            sums += _sums(*known.align(torch.log_softmax(logits_NV, dim=-1)), top_k)
        return sums

    names = [field.name for field in fields(Divergences)]
    totals = ranks.all_reduce_sum(dict(zip(names, sharded_forward(student, sum_over_tokens).tolist(), strict=True)))
    count = sum(len(rollout.completion_ids) for rollout in rollouts)
    return Divergences(**{name: totals[name] / count for name in names})


def _sums(student_NV: Tensor, teacher_NV: Tensor, top_k: int) -> Tensor:
    """Sums over N tokens of (KL(T‖S), KL(S‖T), overlap, H(S), H(T))."""
    return torch.stack(
        [
            token_losses.forward_kl(student_NV, teacher_NV).sum(),
            token_losses.reverse_kl(student_NV, teacher_NV).sum(),
            overlap(student_NV, teacher_NV, top_k).sum(),
            token_losses.entropy(student_NV).sum(),
            token_losses.entropy(teacher_NV).sum(),
        ]
    ).to("cpu", torch.float64)


def overlap(student_NV: Tensor, teacher_NV: Tensor, top_k: int) -> Tensor:
    """Share of the teacher's top-k tokens that are in the student's top k: (N, V), (N, V) -> (N,).

    k is at most half of the vocabulary: beyond that any two rankings overlap.

    Example: top two {a, b} and {b, c}: ½.
    """
    k = max(1, min(top_k, student_NV.shape[-1] // 2))
    chosen = torch.zeros_like(student_NV, dtype=torch.bool).scatter_(1, student_NV.topk(k, dim=-1).indices, True)
    return chosen.gather(1, teacher_NV.topk(k, dim=-1).indices).float().mean(dim=-1)
