"""The canonical recipe's stages, and every control as a short edit of it: the diff is the experimental claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from headwater.config.recipe import Recipe, parse_recipe, read_recipe
from headwater.config.stage import Stage
from headwater.errors import UserError

Pool = Literal["all", "first_half", "second_half"]


Edit = Callable[[Recipe, Stage], Stage]
"""How an arm changes the settings of a stage: (the recipe, the stage as it stands there) -> the stage that runs."""


def as_it_is(recipe: Recipe, stage: Stage) -> Stage:
    return stage


@dataclass(frozen=True)
class Step:
    """A stage of the recipe and the part of the labelled pool that it works on (their texts alone, where it is dense)."""

    stage: Literal["teacher_rl", "warmup", "opd", "student_rl", "sft"]
    pool: Pool
    edit: Edit = as_it_is


@dataclass(frozen=True)
class Arm:
    """What happens to the teacher, then to the student.

    An arm without dense student steps never uses its teacher, which is then not made.

    same_compute  (like, as): the last step runs as long as makes the whole arm cost the FLOPs that arm `as` cost, a step
                  taken to cost what one did in arm `like`; None leaves the recipe's own number of steps
    """

    teacher: tuple[Step, ...]
    student: tuple[Step, ...]
    same_compute: tuple[str, str] | None = None


CANONICAL = Arm(
    teacher=(Step("teacher_rl", "first_half"),),
    student=(Step("warmup", "first_half"), Step("opd", "first_half"), Step("student_rl", "second_half")),
)
"""Sparse reward on the teacher, warm-up, on-policy distillation, sparse reward on the student: labels held out for each end."""


def on_pool(arm: Arm, pool: Pool) -> Arm:
    return Arm(
        tuple(replace(step, pool=pool) for step in arm.teacher), tuple(replace(step, pool=pool) for step in arm.student)
    )


def without(arm: Arm, *stages: str) -> Arm:
    return replace(arm, student=tuple(step for step in arm.student if step.stage not in stages))


def bridge(pool: Pool) -> Arm:
    """RL'd teacher -> warm-up -> OPD, all on one pool."""
    return on_pool(without(CANONICAL, "student_rl"), pool)


def edited(arm: Arm, stage: str, edit: Edit) -> Arm:
    """The same arm with the settings of one of the student's stages changed."""
    return replace(
        arm, student=tuple(replace(step, edit=edit) if step.stage == stage else step for step in arm.student)
    )


def changed(stage: Stage, **fields: Any) -> Stage:
    """The stage with these fields, checked anew."""
    return Stage.model_validate({**stage.model_dump(), **fields})


def constant(recipe: Recipe, stage: Stage) -> Stage:
    """Every sampled token is pushed down alike: no teacher, no labels (2608.31046)."""
    return changed(stage, objective="constant", sparse_share=None, until=None)


def forward(recipe: Recipe, stage: Stage) -> Stage:
    """Forward KL on the student's own prefixes: the warm-up's divergence where OPD has its occupancy (2605.16826)."""
    return changed(stage, dense={**stage.dense.model_dump(), "divergence": "forward"})


def mixture(recipe: Recipe, stage: Stage) -> Stage:
    """J_λ, with the recipe's λ where it has one, else ½; groups as in student RL, so that rewards can be compared."""
    if stage.objective == "mixed":
        return stage
    group = recipe.stages.student_rl.group_size
    batch = max(group, stage.batch_size // group * group)
    return changed(stage, objective="mixed", sparse_share=0.5, group_size=group, batch_size=batch)


ARMS: dict[str, Callable[[Pool], Arm]] = {
    # `pool` is what arms without stage 3 work on: every label (full split) or the first half.
    "direct_grpo": lambda pool: Arm(teacher=(), student=(Step("student_rl", "all"),)),
    "raw_teacher": lambda pool: replace(bridge(pool), teacher=()),
    "sft_teacher": lambda pool: replace(bridge(pool), teacher=(Step("sft", pool),)),
    "teacher_sft": lambda pool: replace(bridge(pool), student=(Step("sft", pool),)),
    "opd_only": lambda pool: without(bridge(pool), "warmup"),
    "warmup_only": lambda pool: without(bridge(pool), "opd"),
    "bridge": bridge,
    "bridge_rl": lambda pool: CANONICAL,
    "replay": lambda pool: on_pool(CANONICAL, "first_half"),
    "teacher_2h": lambda pool: replace(
        bridge("first_half"), teacher=(Step("teacher_rl", "first_half"), Step("teacher_rl", "second_half"))
    ),
    "bridge_1h": lambda pool: bridge("first_half"),  # what stage 3 and its replay begin from
    # The paper matches labels, not compute; these two match compute, and the second is 2609.04108's open question.
    "direct_grpo_compute": lambda pool: replace(ARMS["direct_grpo"](pool), same_compute=("direct_grpo", "bridge")),
    "opd_then_rl": lambda pool: Arm(teacher=(), student=(Step("opd", pool), Step("student_rl", "all"))),
    "opd_then_rl_compute": lambda pool: replace(ARMS["opd_then_rl"](pool), same_compute=("opd_then_rl", "bridge")),
    # Controls that could embarrass the method.
    "constant_advantage": lambda pool: Arm(teacher=(), student=(Step("opd", pool, constant),)),
    "bridge_constant": lambda pool: edited(bridge(pool), "opd", constant),
    "forward_kl_on_student": lambda pool: edited(bridge(pool), "opd", forward),
    "mixed": lambda pool: edited(bridge(pool), "opd", mixture),
}
DEFAULT_ARM = "bridge_rl"
DEFAULT_STUDY = ("direct_grpo", "raw_teacher", "bridge", "bridge_1h", "bridge_rl", "replay")


def arm_of(name: str, recipe: Recipe) -> Arm:
    """The stages of an arm under the recipe's split. Raises UserError for an unknown name."""
    if name not in ARMS:
        raise UserError(f"--arm {name}: no such arm; there are {', '.join(ARMS)}")
    return ARMS[name]("all" if recipe.labels.split == "full" else "first_half")


def stage_of(recipe: Recipe, step: Step) -> Stage:
    """The settings of a step; hard-label fine-tuning takes the warm-up's unless the recipe has its own."""
    if step.stage == "sft":
        return step.edit(
            recipe, recipe.stages.sft or recipe.stages.warmup.model_copy(update={"objective": "sft", "until": None})
        )
    return step.edit(recipe, getattr(recipe.stages, step.stage))


def builtin_names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in _builtin().iterdir() if path.name.endswith(".yaml"))


def builtin_text(name: str) -> str:
    """The commented YAML of a built-in recipe. Raises UserError for an unknown name."""
    path = _builtin() / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no recipe named {name}; there are {', '.join(builtin_names())}")
    return path.read_text(encoding="utf-8")


def find_recipe(name: str, overrides: list[str]) -> Recipe:
    """A YAML file, or the name of a built-in recipe. Raises UserError."""
    if Path(name).is_file():
        return read_recipe(Path(name), overrides)
    if (_builtin() / f"{name}.yaml").is_file():
        return read_recipe(_builtin() / f"{name}.yaml", overrides)
    raise UserError(f"recipe {name}: no such file, and no built-in recipe of that name ({', '.join(builtin_names())})")


def _builtin() -> Path:
    return Path(str(files("headwater"))) / "builtin"


__all__ = [
    "ARMS", "CANONICAL", "DEFAULT_ARM", "DEFAULT_STUDY", "Arm", "Pool", "Step", "arm_of", "bridge", "builtin_names",
    "builtin_text", "find_recipe", "on_pool", "parse_recipe", "stage_of", "without",
]  # fmt: skip
