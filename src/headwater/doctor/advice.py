"""Advice from readiness measures: where the labels go, whether to warm up, when to start student RL.

The rule for the labels asks three questions, in this order.

1. Is there a signal? GRPO learns only from groups whose rewards differ. A model with almost none cannot use a label; if that is
   true of both, nobody can yet.
2. Does the teacher need labels? If C1 holds already (its reward is near that of its own best of k), labels could raise it
   little; they go to the student, after a bridge from the teacher as it is.
3. If both have a signal and the teacher has room: what would the teacher transfer that the student's own RL would not find? RL
   makes a model choose the right path more often, but it must mostly be able to complete that path already. So both models
   continue prefixes of the teacher's right answers (`Continuations`). The teacher's lead there is what a bridge can transfer,
   and must exceed what the student's own RL and the bridge's losses take of it:

       lead − cost > MIN_LEAD,    cost = KL(π_T‖πθ) on the teacher's right rollouts · log2(times each of them is trained on)

   Much to learn from few rollouts, repeated many times, is memorized and does not generalize.

MIN_LEAD, the cost and MIN_INFORMATIVE were chosen on other models, budgets, seeds and problems than the settings that test them;
C1_SATURATED was added when the rule without it had failed on the countdown task (docs/probe.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from headwater.doctor.evidence import best_evidence
from headwater.doctor.readiness import PairMeasures, Readiness

MIN_INFORMATIVE = 0.15
"""Least share of informative groups. Guessing one of a hundred right by chance gives 0.08 at group size 8."""
C1_SATURATED = 0.9
"""C1, reward over best of k, from which RL has little to add to a teacher."""
MIN_LEAD = 0.3
CLOSE_MARGIN = 0.05
"""A smaller margin is within the noise of 128 problems: the advice is then called close."""
MAX_KL_WITHOUT_WARMUP = 0.1
"""Nats a token on student prefixes up to which C2 holds already, so that no warm-up is needed."""
MAX_WARMUP_COST = 0.12
"""Memorization cost above which a warm-up on so few rollouts costs the student more than it brings."""

Target = Literal["teacher", "student", "nowhere"]
ARM: Mapping[Target, str | None] = {"teacher": "bridge", "student": "direct_grpo", "nowhere": None}


@dataclass(frozen=True, slots=True)
class LabelAdvice:
    """Where the labels go, and why. `margin` is lead − cost − MIN_LEAD; None if an earlier question decides."""

    where: Target
    because: str
    margin: float | None = None

    @property
    def arm(self) -> str | None:
        return ARM[self.where]

    @property
    def close(self) -> bool:
        return self.margin is not None and abs(self.margin) < CLOSE_MARGIN


def label_advice(measures: PairMeasures) -> LabelAdvice:
    """Where the labels go.

    Example: the teacher completes 95 % of its right answers, the student 45 %, at 0.04 nats and 4 passes: the lead is 0.50, the
    cost 0.08, the margin 0.50 − 0.08 − 0.30 = 0.12, so the teacher.
    """
    student, teacher, continuations = measures.student, measures.teacher, measures.continuations
    shares = f"{_share(teacher)} of the teacher's groups are informative, {_share(student)} of the student's"
    if not has_signal(teacher) and not has_signal(student):
        return LabelAdvice(
            "nowhere", f"{shares}; below {_percent(MIN_INFORMATIVE)} a label is of little use. {_remedy(measures)}"
        )
    if not has_signal(teacher):
        if teacher.pass_rate.mean > student.pass_rate.mean and teacher.pass_rate.mean > 0.5:
            return LabelAdvice(
                "student",
                f"{shares}: the teacher is right {_percent(teacher.pass_rate.mean)} of the time already and needs no labels. Bridge "
                "from it without labels (opd_then_rl), and spend them on the student",
            )
        return LabelAdvice("student", f"{shares}: sparse reward would find nothing to reinforce in this teacher")
    if teacher.c1 is not None and teacher.c1 >= C1_SATURATED and has_signal(student) and measures.teacher_is_better:
        k = max(teacher.pass_at)
        return LabelAdvice(
            "student",
            f"the teacher is right {_percent(teacher.pass_rate.mean)} of the time and its best of {k} {_percent(teacher.pass_at[k])}: "
            f"C1 holds already ({teacher.c1:.2f}, at least {C1_SATURATED:g}) and labels could hardly raise it. Bridge from it "
            "without labels (raw_teacher), and spend them on the student",
        )
    if not has_signal(student):
        return LabelAdvice("teacher", f"{shares}: only the teacher's samples are right often enough to learn from")
    if continuations is None:
        return LabelAdvice(
            "student",
            f"{shares}, but the teacher got too few problems right to measure what a student would learn from it",
        )
    cost = continuations.memorization_cost(measures.passes)
    margin = continuations.lead - cost - MIN_LEAD
    because = (
        f"continuing the first quarter of the teacher's right answers, the teacher is right "
        f"{_percent(continuations.teacher.mean)} of the time, the student "
        f"{_percent(continuations.student.mean)}; of this lead of {100 * continuations.lead:.0f} points the bridge "
        f"would lose about {100 * cost:.0f} ({continuations.kl:.2f} nats a token to learn, each cached rollout trained on "
        f"{measures.passes:.1f} times), and {100 * MIN_LEAD:.0f} are what the student's own RL would recover"
    )
    return LabelAdvice("teacher" if margin > 0 else "student", because, margin)


def arm_to_run(measures: PairMeasures) -> tuple[str | None, str]:
    """(arm, why) for a `run` that names none: `label_advice`; where that is close, half of the labels for either model."""
    labels = label_advice(measures)
    if labels.close and has_signal(measures.student):
        return "bridge_rl", (
            f"the labels are worth about as much on the teacher as on the student (margin {labels.margin:+.2f}), so each gets half"
        )
    return labels.arm, f"the labels go to the {labels.where}" if labels.arm else "neither model can use labels yet"


@dataclass(frozen=True, slots=True)
class FollowUpAdvice:
    arm: str
    because: str


def follow_up_advice(measures: PairMeasures) -> FollowUpAdvice | None:
    """The follow-up arm with the best evidence where the labels go to the teacher; None where nothing measured applies.

    Every follow-up changes the bridge, so none applies where the labels belong on the student.
    """
    evidence = best_evidence(measures.spare_prompts) if label_advice(measures).where == "teacher" else None
    if evidence is None:
        return None
    prompts = (
        f"{measures.spare_prompts:,} problems whose labels the budget does not buy can still be prompts of warm-up and OPD "
        f"(the warm-up would train {measures.passes:.1f} times on each cached rollout); "
        if evidence.needs_prompts
        else ""
    )
    return FollowUpAdvice(
        evidence.arm, f"{prompts}measured {evidence.sentence()} (docs/results.md); not tried at other sizes"
    )


def has_signal(model: Readiness) -> bool:
    return model.informative.mean >= MIN_INFORMATIVE


def _share(model: Readiness) -> str:
    return _percent(model.informative.mean)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def outcome_advice(measures: PairMeasures) -> dict[str, str]:
    """Why a model's completions earn little, by role: of one without a signal, or whose answers mostly cannot be judged.

    Example: `{"teacher": "96 % of the completions were cut at max_tokens = 48, 4 % were wrong: raise stages.teacher_rl…"}`.
    """
    return {
        role: f"{model.outcomes.because(model.max_tokens)}: {model.outcomes.remedy(model.stage)}"
        for role, model in (("student", measures.student), ("teacher", measures.teacher))
        if not has_signal(model) or _unjudged(model)
    }


def _unjudged(model: Readiness) -> bool:
    """Whether most completions say nothing about what the model can solve: no answer of theirs was compared with a gold one."""
    return model.outcomes.largest in ("cut", "no_answer", "ungraded")


def teacher_advice(measures: PairMeasures) -> str | None:
    """That a teacher is not better than its student, if so: distilling it first teaches nothing that is graded right."""
    student, teacher = measures.student.pass_rate.mean, measures.teacher.pass_rate.mean
    if measures.teacher_is_better:
        return None
    seen = (
        f"student and teacher are the same weights: KL(student‖teacher) is {measures.kl_student_prefixes:.3f} nats a token"
        if measures.same_weights
        else f"the teacher is right {_percent(teacher)} of the time, the student {_percent(student)}"
    )
    return (
        f"{seen}, so distilling it as it is (raw_teacher, opd_then_rl) teaches little; train it on the labels first "
        "(bridge), spend them on the student (direct_grpo), or name a stronger teacher"
    )


def _remedy(measures: PairMeasures) -> str:
    student, teacher = measures.student, measures.teacher
    if _unjudged(student) or _unjudged(teacher):
        return "First fix what prevents their answers from being graded, then probe again"
    if min(student.pass_rate.mean, teacher.pass_rate.mean) > 0.5:
        return "Both models are nearly always right: use harder problems, or distill without labels (raw_teacher)"
    if teacher.pass_rate.mean > 0.5:
        return (
            "The teacher is nearly always right: distill it without labels (raw_teacher), then probe the student again"
        )
    return (
        "Use easier problems, a stronger teacher, or worked examples for either model (sft_teacher), or check whether a larger "
        f"group than {max(teacher.group_size, student.group_size)} finds a right answer: pass@k shows how soon it would"
    )


@dataclass(frozen=True, slots=True)
class WarmupAdvice:
    needed: bool
    because: str


def warmup_advice(measures: PairMeasures) -> WarmupAdvice:
    """Whether the warm-up (2a) comes before on-policy distillation (2b).

    Not if C2 holds on the prefixes that the student visits. Otherwise yes if the student hardly ever produces what the teacher
    writes; else only if the teacher's rollouts are not so few that the student would memorize them.
    """
    distance = f"KL(student‖teacher) on the student's own prefixes is {measures.kl_student_prefixes:.2f} nats a token"
    if measures.kl_student_prefixes <= MAX_KL_WITHOUT_WARMUP:
        return WarmupAdvice(
            False, f"{distance}, not above {MAX_KL_WITHOUT_WARMUP:g}: on-policy distillation can start at once"
        )
    distance += f", above {MAX_KL_WITHOUT_WARMUP:g}"
    if not has_signal(measures.student):
        return WarmupAdvice(
            True,
            f"{distance}, and only {_share(measures.student)} of the student's groups are informative: it must first see text "
            "that its own samples rarely contain",
        )
    continuations = measures.continuations
    cost = 0.0 if continuations is None else continuations.memorization_cost(measures.passes)
    if cost > MAX_WARMUP_COST:
        return WarmupAdvice(
            False,
            f"{distance}, but the warm-up would train {measures.passes:.1f} times on too few rollouts and cost about "
            f"{100 * cost:.0f} points: leave it out (opd_only), or add prompts, which need no labels (data.unlabeled)",
        )
    return WarmupAdvice(True, f"{distance}: the teacher would score text that it would rarely write itself")


def student_rl_advice(measures: PairMeasures) -> str:
    """When to switch from OPD to student RL, and with which labels: a rule that names its metrics."""
    student = measures.student
    return (
        "Stop OPD when it no longer helps: validation accuracy flat over two windows "
        "(stages.opd.until: {metric: validation, every: 10, patience: 2}) or, without validation problems, kl_student_teacher in "
        "the stage's metrics. Continue with student RL on labels that the teacher has not used, as long as at least "
        f"{_percent(MIN_INFORMATIVE)} of the student's groups of {student.group_size} are informative (`informative` in the metrics "
        f"of student_rl; now {_share(student)})"
    )
