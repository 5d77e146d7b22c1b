"""From readiness measures to advice: where the labels go, whether to warm up, when to go on to student RL. Numbers in, words out.

The rule for the labels asks three things, in this order.

1. Where is there a signal? GRPO learns from groups whose rewards differ, and from nothing else. A model with next to none
   cannot spend a label; if that is so of both, nobody can yet.
2. Does the teacher need labels? Where C1 holds as it is, its reward near that of its own best of k, there is little that they
   could raise; they go to the student, after a bridge from the teacher as it is.
3. Where both have a signal, and the teacher room, what would the teacher bring that the student's own reinforcement would
   not? Reinforcement makes a model take the right way more often; how well it walks it, it must mostly know. So both models
   are put on the teacher's right way (`Finish`): the teacher's lead there is what a bridge can carry over, and it must be
   larger than what the student's own RL and the bridge's losses take of it:

       lead − TOLL · toll > LEAD,    toll = KL(π_T‖πθ) on the teacher's right rollouts · times each of them is trained on

   Much to learn from few rollouts, gone through many times, is learnt by heart and not held out.

LEAD, TOLL and SIGNAL were chosen on other models, budgets, seeds and problems than the settings that test them; ENOUGH was added
when the rule without it had missed the countdown task (docs/probe.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from headwater.stats import Interval

SIGNAL = 0.15
"""Least share of informative groups. Guessing one of a hundred right by luck gives 0.08 at group size 8."""
ENOUGH = 0.9
"""C1, reward over best of k, from which on a teacher counts as one that RL has little to add to."""
LEAD = 0.3
CLOSE = 0.05
"""A margin smaller than this is within the noise of 128 problems: the advice is then called close."""
FAR = 0.1
"""Nats a token on student prefixes up to which C2 holds as it is: there is nothing to warm up."""
WORN = 0.12
"""A toll beyond which a warm-up on so few rollouts costs the student more than it brings."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """One model on the sampled problems, at the sampling of its own RL stage; shares between 0 and 1.

    pass_at              k -> chance that one of k samples is right (`stats.pass_at_k`)
    informative          share of groups of `group_size` whose rewards differ, over all groups that the samples hold
    informative_formula  1 − p^G − (1−p)^G at each problem's own measured p, averaged; too low, for a measured p lies nearer
                         to 0 or 1 than the true one
    c1                   reward ÷ best of k: 1 is C1, a policy that already gets what its best sample gets
    entropy              nats a token on its own rollouts
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


@dataclass(frozen=True, slots=True)
class Finish:
    """What becomes of the teacher's right answers when a model goes on from their first quarter: shares that end right.

    Example: `Finish(100, Interval(0.45, …), Interval(0.95, …), 0.04)`: the teacher knows the way, the student loses it.

    problems  how many the teacher got right at least once; each gives one beginning
    kl        KL(π_T‖πθ) a token on all of the teacher's right rollouts, in nats
    """

    problems: int
    student: Interval
    teacher: Interval
    kl: float

    @property
    def lead(self) -> float:
        return self.teacher.mean - self.student.mean

    def toll(self, passes: float) -> float:
        """What a bridge would lose of the lead: `kl` for each doubling of the times that a cached rollout is trained on.

        Example: 0.04 nats and 8 passes cost 0.12; at one pass or fewer nothing is lost.
        """
        return self.kl * max(0.0, math.log2(passes)) if passes > 0.0 else 0.0


@dataclass(frozen=True, slots=True)
class Measures:
    """What the probe measured.

    kl_student_prefixes  KL(πθ‖π_T), nats a token: C2 where OPD works
    finish               None where the teacher got nothing right
    passes               times that the warm-up goes through each of the teacher's cached rollouts
    """

    student: Readiness
    teacher: Readiness
    kl_student_prefixes: float
    finish: Finish | None
    passes: float


Where = Literal["teacher", "student", "nowhere"]
ARM: Mapping[Where, str | None] = {"teacher": "bridge", "student": "direct_grpo", "nowhere": None}


@dataclass(frozen=True, slots=True)
class Labels:
    """Where the labels go, and why. `margin` is lead − toll − LEAD; None where the signal decides alone."""

    where: Where
    because: str
    margin: float | None = None

    @property
    def arm(self) -> str | None:
        return ARM[self.where]

    @property
    def close(self) -> bool:
        return self.margin is not None and abs(self.margin) < CLOSE


def labels(found: Measures) -> Labels:
    """Where the labels go.

    Example: the teacher ends 95 % of its right answers right again, the student 45 %, at 0.04 nats and 4 passes: the lead is
    0.50, the toll 0.08, the margin 0.50 − 0.08 − 0.30 = 0.12, so the teacher.
    """
    student, teacher, finish = found.student, found.teacher, found.finish
    shares = f"{_share(teacher)} of the teacher's groups are informative, {_share(student)} of the student's"
    if not has_signal(teacher) and not has_signal(student):
        return Labels("nowhere", f"{shares}; below {SIGNAL:.0%} a label buys next to nothing. {_remedy(found)}")
    if not has_signal(teacher):
        if teacher.pass_rate.mean > student.pass_rate.mean and teacher.pass_rate.mean > 0.5:
            return Labels(
                "student",
                f"{shares}: the teacher is right {teacher.pass_rate.mean:.0%} of the time as it is and needs no labels. Bridge "
                "from it without any (opd_then_rl), and spend them on the student",
            )
        return Labels("student", f"{shares}: sparse reward would find nothing to reinforce in this teacher")
    if teacher.c1 is not None and teacher.c1 >= ENOUGH and has_signal(student):
        k = max(teacher.pass_at)
        return Labels(
            "student",
            f"the teacher is right {teacher.pass_rate.mean:.0%} of the time and its best of {k} {teacher.pass_at[k]:.0%}, so that C1 "
            f"holds as it is ({teacher.c1:.2f}, from {ENOUGH:g} on) and labels could hardly raise it. Bridge from it without any "
            "(raw_teacher), and spend them on the student",
        )
    if not has_signal(student):
        return Labels("teacher", f"{shares}: only the teacher's samples are right often enough to learn from")
    if finish is None:
        return Labels(
            "student", f"{shares}, but the teacher got too little right to say what a student would learn from it"
        )
    toll = finish.toll(found.passes)
    margin = finish.lead - toll - LEAD
    said = (
        f"from the first quarter of the teacher's right answers the teacher ends right {finish.teacher.mean:.0%} of the time, the "
        f"student {finish.student.mean:.0%}; of this lead of {100 * finish.lead:.0f} points the bridge would lose about "
        f"{100 * toll:.0f} ({finish.kl:.2f} nats a token to learn, each cached rollout trained on {found.passes:.1f} times), and "
        f"{100 * LEAD:.0f} are what the student's own RL would make up"
    )
    return Labels("teacher" if margin > 0 else "student", said, margin)


def has_signal(one: Readiness) -> bool:
    return one.informative.mean >= SIGNAL


def _share(one: Readiness) -> str:
    return f"{one.informative.mean:.0%}"


def _remedy(found: Measures) -> str:
    if min(found.student.pass_rate.mean, found.teacher.pass_rate.mean) > 0.5:
        return "Both models are right nearly always: take harder problems, or distil without labels (raw_teacher)"
    if found.teacher.pass_rate.mean > 0.5:
        return (
            "The teacher is right nearly always: distil it without labels (raw_teacher), then probe the student again"
        )
    best = max(found.teacher.group_size, found.student.group_size)
    return (
        "Take easier problems, a stronger teacher, worked examples for either model (sft_teacher), or look whether a larger "
        f"group than {best} finds a right answer: pass@k says how fast it would"
    )


@dataclass(frozen=True, slots=True)
class Warmup:
    needed: bool
    because: str


def warmup(found: Measures) -> Warmup:
    """Whether 2a comes before 2b.

    Not where C2 holds on the prefixes that the student visits. Beyond that, always where the student hardly ever goes the
    teacher's way by itself; else only where the teacher's rollouts are not so few that it would learn them by heart.
    """
    said = f"KL(student‖teacher) on the student's own prefixes is {found.kl_student_prefixes:.2f} nats a token"
    if found.kl_student_prefixes <= FAR:
        return Warmup(False, f"{said}, not above {FAR:g}: on-policy distillation can begin at once")
    if not has_signal(found.student):
        return Warmup(
            True,
            f"{said}, above {FAR:g}, and only {_share(found.student)} of the student's groups are informative: it must be shown "
            "what its own samples hardly ever hold",
        )
    toll = 0.0 if found.finish is None else found.finish.toll(found.passes)
    if toll > WORN:
        return Warmup(
            False,
            f"{said}, above {FAR:g}, but the warm-up would go {found.passes:.1f} times through too few rollouts and cost about "
            f"{100 * toll:.0f} points: leave it out (opd_only), or give it further prompts, which need no labels (data.unlabeled)",
        )
    return Warmup(True, f"{said}, above {FAR:g}: the teacher would judge text that it would hardly write itself")


def switch(found: Measures) -> str:
    """When to go on from OPD to student RL, and with which labels: a rule that names its metrics."""
    group = found.student.group_size
    return (
        "Leave OPD when it has stopped helping: validation accuracy flat over two windows "
        "(stages.opd.until: {metric: validation, every: 10, patience: 2}), or, without validation problems, kl_student_teacher in "
        f"the stage's metrics. Go on to student RL with labels that the teacher has not used, while at least {SIGNAL:.0%} of the "
        f"student's groups of {group} are informative (`informative` in the metrics of student_rl; now {_share(found.student)})"
    )
