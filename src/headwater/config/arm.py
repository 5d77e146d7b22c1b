"""What an arm is: stages of the teacher, then of the student, each on a part of the labelled pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from headwater.config.recipe import Recipe
from headwater.config.stage import Stage

Pool = Literal["all", "first_half", "second_half"]

Edit = Callable[[Recipe, Stage], Stage]
"""Changes a stage's settings: (the recipe, the stage as the recipe has it) -> the stage that runs."""


def unchanged(recipe: Recipe, stage: Stage) -> Stage:
    return stage


@dataclass(frozen=True)
class Step:
    """One stage of an arm and the part of the labelled pool that it trains on (dense stages use the problem texts only).

    pool  None in the table: `split_pool`
    """

    stage: Literal["teacher_rl", "warmup", "opd", "student_rl", "sft"]
    pool: Pool | None = None
    edit: Edit = unchanged


@dataclass(frozen=True)
class Arm:
    """One arm: stages of the teacher, then of the student. Without dense student stages the teacher is never trained.

    description   what the arm is, as reports and docs/arms.md print it
    question      the question that the arm answers (docs/arms.md)
    source        where the idea was published
    compare_with  arms whose accuracy is reported as a contrast with this one: each of them minus this arm
    same_compute  (like, as): the last stage takes as many steps as bring the whole arm to the FLOPs of arm `as`, where a step costs
                  what it cost in arm `like`; None keeps the recipe's number of steps
    """

    description: str
    question: str
    teacher: tuple[Step, ...]
    student: tuple[Step, ...]
    compare_with: tuple[str, ...] = ()
    same_compute: tuple[str, str] | None = None
    source: str = ""

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.teacher + self.student


def changed(stage: Stage, dense: Mapping[str, Any] | None = None, **fields: Any) -> Stage:
    """A copy of the stage with these fields, and these of its section `dense`, validated."""
    values = {**stage.model_dump(), **fields}
    return Stage.model_validate({**values, "dense": {**values["dense"], **(dense or {})}})


def grouped(stage: Stage, group: int, **fields: Any) -> Stage:
    """A copy of the stage with groups of this size, in batches of about its size, and with these fields."""
    batch = max(group, stage.batch_size // group * group)
    return changed(stage, group_size=group, batch_size=batch, prompts="pool", **fields)


TEACHER_RL, WARMUP, OPD, SFT = Step("teacher_rl"), Step("warmup"), Step("opd"), Step("sft")
RL_ON_ALL = Step("student_rl", "all")
TEACHER_RL_1H = Step("teacher_rl", "first_half")
BRIDGE_1H = (Step("warmup", "first_half"), Step("opd", "first_half"))
