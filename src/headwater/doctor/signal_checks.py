"""Doctor checks of what a run could learn from: answers that a grader finds, and a teacher that differs from its student.

They use no label: `headwater probe` measures whether the answers are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from headwater.doctor.advice import MIN_INFORMATIVE
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, note, warning
from headwater.doctor.weight_checks import SELF_KL, scored_rollouts, self_kl
from headwater.errors import UserError
from headwater.runs.node import Node
from headwater.storage.files import read_json
from headwater.storage.run_dir import RunDir
from headwater.tasks.outcomes import REMEDIES

MAX_WITHOUT_ANSWER = 0.5
MAX_STOPPED = 0.1
"""Chance of being stopped by the guard `no_signal` from which on the user is warned."""
MIN_ENDED = 4
"""Completions that must have ended by themselves for a share of them to be judged."""


def answers_found(context: DoctorContext) -> Iterator[Finding]:
    """Whether the grader finds an answer in completions of the models that are rewarded for right ones from their first step."""
    rewarded = [node for node, stage in context.training if stage.needs_labels]
    extract = context.inputs.task.extract if rewarded else None
    for role in context.sampled_roles:
        stages = [node.stage for node in rewarded if node.start == role]
        if extract is None or not stages:
            continue
        completion, rollouts = context.prompter(role).completion, context.sample(role).rollouts
        ended = [completion(rollout.completion_ids) for rollout in rollouts if rollout.finish == "stop"]
        missing = sum(extract(text) is None for text in ended)
        if len(ended) >= MIN_ENDED and missing > MAX_WITHOUT_ANSWER * len(ended):
            yield warning(
                "no-answers",
                f"models.{role}: the grader of task {context.recipe.task} finds no answer in {missing} of {len(ended)} sampled "
                f"completions that ended by themselves, and stage {stages[0]} rewards right answers alone",
                REMEDIES["no_answer"],
            )


def distillation_first(context: DoctorContext) -> Iterator[Finding]:
    """Arms that distill the teacher as it is, although there are labels that could train it first."""
    if len(context.local("teacher")) != 1 or any(node.role == "teacher" for node, _ in context.training):
        return  # a teacher that is not trained here, or a study that compares both
    labels, stages = len(context.inputs.pools.all), untrained_distillations(context)
    if labels and stages:
        yield note(
            "teacher-not-trained",
            f"{stages} distill models.teacher as it is; {labels} labels could train it first",
            "nothing if it solves these problems much better than the student (`headwater probe` measures both and advises); else "
            "--arm bridge",
        )


def early_stop(context: DoctorContext) -> Iterator[Finding]:
    """Stages whose first steps hold so few groups that the guard `no_signal` may stop them by chance.

    It estimates from the share of informative groups that a probe in the run's folder measured, else from MIN_INFORMATIVE.
    """
    guards = context.recipe.guards
    for node, stage in context.training if guards.no_signal == "stop" else ():
        if not stage.needs_labels or context.steps(node) < guards.patience:
            continue
        base = node.start
        measured = None if isinstance(base, Node) else probed_share(context.out, base)
        share, groups = measured if measured is not None else MIN_INFORMATIVE, guards.patience * stage.prompts_per_step
        chance = (1.0 - share) ** groups
        if chance <= MAX_STOPPED:
            continue
        source = (
            f"{share:.0%} of models.{base}'s groups, as `headwater probe` measured"
            if measured is not None
            else f"{share:.0%} of the groups (fewer are of little use; `headwater probe` measures how many there are)"
        )
        yield warning(
            "early-stop-likely",
            f"stages.{node.stage}: the guard no_signal stops the stage if the rewards differ in none of its first {groups} groups "
            f"({guards.patience} steps of {stage.prompts_per_step} problems); where they differ in {source}, chance alone does that "
            f"in {chance:.0%} of runs",
            f"raise stages.{node.stage}.batch_size or guards.patience, or set guards.no_signal=continue, as for a first try",
        )


def probed_share(out: Path, role: str) -> float | None:
    """Share of informative groups of a base model in the probe.json of a run's folder; None where there is none."""
    path = RunDir(out).probe
    try:
        return float(read_json(path)["models"][role]["informative"]["mean"]) if path.exists() else None
    except (KeyError, TypeError, ValueError, UserError):
        return None  # of an earlier version


def teacher_is_student(context: DoctorContext) -> Iterator[Finding]:
    """Student and teacher that give the same distributions: distilled as it is, the teacher has nothing to teach."""
    pairs = [pair for pair in context.distillations if pair[0] == "student" and pair not in context.aligned_pairs]
    for _, teacher in pairs:
        student, rollouts = context.policy("student", False), scored_rollouts(context)
        kl = self_kl(student, context.policy(teacher, True), rollouts, context.recipe.compute.microbatch_tokens)
        if not abs(kl) < SELF_KL[student.compute_dtype]:
            continue
        evidence = (
            f"models.student and models.{teacher}: on {len(rollouts)} sampled completions KL(student‖teacher) is {abs(kl):.2g} nats "
            "a token, so they are the same model"
        )
        stages = untrained_distillations(context)
        if stages:
            yield warning(
                "teacher-is-student",
                f"{evidence}, and {stages} distill it as it is: they would change nothing",
                "name a stronger teacher, or train the student on the labels (--arm direct_grpo)",
            )
        else:
            yield note(
                "teacher-is-student",
                f"{evidence} until the teacher is trained on the labels",
                "nothing if that is intended; --arm direct_grpo trains the student itself on the same labels, at a lower cost",
            )


def own_start(context: DoctorContext) -> Iterator[Finding]:
    """A dense stage whose only teacher is the student as the stage begins, in the same words: every gradient of it is 0."""
    if context.recipe.prompt.teacher is not None:
        return
    for node, stage in context.training:
        if not stage.needs_labels and set(node.scorers()) == {node.start}:
            yield warning(
                "start-teaches-nothing",
                f"stages.{node.stage}.dense.teacher_weights: the only teacher is the student as the stage begins, and it reads the "
                "same prompt, so every gradient is 0 and the stage changes nothing",
                "give the teacher another prompt or a context (prompt.teacher), or give another model a weight",
            )


def untrained_distillations(context: DoctorContext) -> str:
    """The student's stages that distill a base teacher, with their steps; empty without any.

    Example: `warmup (40 steps) and opd (80 steps)`.
    """
    steps = {node.stage: context.steps(node) for node, _ in context.training if node.supervisor == "teacher"}
    return " and ".join(f"{stage} ({count} step{'s' if count != 1 else ''})" for stage, count in steps.items())
