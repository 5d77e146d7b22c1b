"""Readiness measures of a student and a teacher, as numbers without models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from headwater.stats import Counts, Floats, Interval, pass_at_k
from headwater.tasks.outcomes import Outcomes


@dataclass(frozen=True, slots=True)
class Readiness:
    """One model on the sampled problems, sampled as in its own RL stage; shares between 0 and 1.

    pass_at              k -> chance that one of k samples is right (`stats.pass_at_k`)
    informative          share of groups of `group_size` whose rewards differ, over all groups that the samples hold
    informative_formula  1 − p^G − (1−p)^G at each problem's measured p, averaged; biased low, because a measured p is nearer
                         to 0 or 1 than the true one
    c1                   reward ÷ best of k: 1 is C1, a policy that already gets what its best sample gets
    entropy              nats a token on its own rollouts
    outcomes             how its completions ended
    stage, max_tokens    its RL stage (`stages.teacher_rl`) and that stage's token limit
    """

    pass_rate: Interval
    pass_at: Mapping[int, float]
    group_size: int
    informative: Interval
    informative_formula: float
    c1: float | None
    truncated: float
    ended: float
    entropy: float
    tokens: float
    outcomes: Outcomes
    stage: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Continuations:
    """Accuracy of both models when they continue the first quarter of the teacher's right answers.

    problems  number of problems that the teacher got right at least once; each gives one prefix
    kl        KL(π_T‖πθ) a token on all of the teacher's right rollouts, in nats

    Example: `Continuations(100, Interval(0.45, …), Interval(0.95, …), 0.04)`: the student fails where the teacher succeeds.
    """

    problems: int
    student: Interval
    teacher: Interval
    kl: float

    @property
    def lead(self) -> float:
        return self.teacher.mean - self.student.mean

    def memorization_cost(self, passes: float) -> float:
        """The part of the lead that a bridge loses: `kl` for each doubling of the times that a cached rollout is trained on.

        Example: 0.04 nats and 8 passes cost 0.12; at one pass or fewer nothing is lost.
        """
        return self.kl * max(0.0, math.log2(passes)) if passes > 0.0 else 0.0


@dataclass(frozen=True, slots=True)
class PairMeasures:
    """What the probe measures on a student and its teacher.

    kl_student_prefixes  KL(πθ‖π_T), nats a token: C2 where on-policy distillation works
    continuations        None if the teacher got nothing right
    passes               times that the warm-up trains on each of the teacher's cached rollouts
    same_weights         whether student and teacher are the same model
    spare_prompts        labelled problems that the budget does not buy: prompts for dense stages
    """

    student: Readiness
    teacher: Readiness
    kl_student_prefixes: float
    continuations: Continuations | None
    passes: float
    same_weights: bool = False
    spare_prompts: int = 0

    @property
    def teacher_is_better(self) -> bool:
        return not self.same_weights and self.teacher.pass_rate.mean > self.student.pass_rate.mean


def informative_share(right_P: Counts, samples: int, group: int) -> Floats:
    """(P,) share of the groups of `group` among each problem's samples whose rewards differ; unbiased.

        1 − C(c, G)/C(n, G) − C(n−c, G)/C(n, G) = pass@G + (pass@G of the wrong ones) − 1,   c right of n samples

    Example: one of four right, groups of two: three of six pairs hold it, ½.
    """
    right_P, samples_P = np.asarray(right_P), np.full(len(right_P), samples)
    some_right, some_wrong = (pass_at_k(count_P, samples_P, group) for count_P in (right_P, samples_P - right_P))
    return np.clip(some_right + some_wrong - 1.0, 0.0, 1.0)
