"""Table of training objectives: who samples, what scores, and the stages that accept each. Torch-free.

Recipe validation, the plan, the doctor, estimates and the report read this table. The loss of each row is in
`losses.objectives.LOSSES`. docs/extending.md adds an objective in three edits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from headwater import plugins

Source = Literal["policy", "teacher"]
Signal = Literal["reward", "teacher"]


@dataclass(frozen=True)
class ObjectiveSpec:
    """One row of the table.

    description    the loss in one line
    source         whose rollouts are trained on: the current policy's, or the teacher's, which are sampled before the stage
    signals        what scores a rollout: `reward` (a grader with labels), `teacher` (its next-token distributions)
    stages         stages of a recipe that accept the objective
    reference_kl   the loss adds `sparse.kl_coef` · KL to the stage's starting weights
    weighted       the recipe weighs the two signals with `sparse_share`; a signal of weight 0 is not computed
    report_title   replaces the stage's title in reports, where the objective is not the stage's usual one; `{stage}` is that title
    loss           the user's function (Stage) -> Objective; None for the objectives of the package (`losses.objectives.LOSSES`)
    """

    description: str
    source: Source
    signals: tuple[Signal, ...]
    stages: tuple[str, ...]
    reference_kl: bool = False
    weighted: bool = False
    report_title: str = ""
    loss: Callable[[Any], Any] | None = None


OBJECTIVES: dict[str, ObjectiveSpec] = {
    "grpo": ObjectiveSpec(
        "clipped policy gradient on group-relative rewards",
        source="policy",
        signals=("reward",),
        stages=("teacher_rl", "student_rl"),
        reference_kl=True,
    ),
    "opd": ObjectiveSpec(
        "divergence from the teacher on the policy's own rollouts (on-policy distillation)",
        source="policy",
        signals=("teacher",),
        stages=("opd",),
    ),
    "mixed": ObjectiveSpec(
        "(1−λ) · opd + λ · grpo, with λ = sparse_share",
        source="policy",
        signals=("reward", "teacher"),
        stages=("opd", "student_rl"),
        reference_kl=True,
        weighted=True,
        report_title="{stage} mixed with reward",
    ),
    "forward_kl": ObjectiveSpec(
        "KL(teacher ‖ student) on the teacher's rollouts",
        source="teacher",
        signals=("teacher",),
        stages=("warmup",),
    ),
    "sft": ObjectiveSpec(
        "cross-entropy on the teacher's rollouts",
        source="teacher",
        signals=(),
        stages=("warmup", "sft"),
    ),
    "constant": ObjectiveSpec(
        "policy gradient with advantage −1 on every token: a control without reward or teacher",
        source="policy",
        signals=(),
        stages=("opd",),
        report_title="Constant advantage",
    ),
}


def default_objective(stage: str) -> str:
    """The objective of a stage that names none: the first row that accepts it."""
    return next(name for name, spec in OBJECTIVES.items() if stage in spec.stages)


def objective(spec: ObjectiveSpec) -> Callable[[plugins.Function], plugins.Function]:
    """Declare a function (Stage) -> losses.objectives.Objective as an objective that a recipe can name (docs/python-api.md).

    Example: `@objective(ObjectiveSpec("…", source="policy", signals=("reward",), stages=("student_rl",)))`.
    """
    return plugins.declare("objective", spec)


def known_objective(name: str) -> str:
    """Validate the name of a row, and add the row of an objective that a user declared. Raises ValueError, which lists the rows."""
    if name not in OBJECTIVES:
        function, spec = plugins.find_declared("objective", name, OBJECTIVES)
        OBJECTIVES[name] = replace(spec, loss=function)
    return name
