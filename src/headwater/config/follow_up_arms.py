"""Arms of published follow-ups: the bridge with one thing changed, at the same labels (docs/arms.md).

An arm whose OPD steps cost more or less than the bridge's has a copy whose name ends in `_compute`, with as many steps as bring the
whole arm to the bridge's FLOPs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from headwater.config.arm import BRIDGE_1H, OPD, TEACHER_RL, TEACHER_RL_1H, WARMUP, Arm, Edit, Step, changed
from headwater.config.recipe import Recipe
from headwater.config.stage import Stage


def dense(**fields: Any) -> Edit:
    """Change fields of a stage's `dense`; what excludes them is reset."""
    reset = {"divergence": "reverse", "gain_over": None, "teacher_weights": None, "token_weights": None}
    return lambda recipe, stage: changed(stage, dense={**stage.dense.model_dump(), **reset, **fields})


def first_third(recipe: Recipe, stage: Stage) -> Stage:
    """Only the first third of `max_tokens` is compared with the teacher (2602.15260)."""
    return dense(token_weights={"first": max(1, stage.sampling.max_tokens // 3)})(recipe, stage)


def pass_rate(recipe: Recipe, stage: Stage) -> Stage:
    """Prompts weigh p·(1−p), from groups of at least four rollouts (2603.11178)."""
    group = max(4, stage.group_size)
    grouped = changed(stage, group_size=group, batch_size=max(group, stage.batch_size // group * group))
    return dense(token_weights={"prompts": "pass_rate"})(recipe, grouped)


def growing_length(recipe: Recipe, stage: Stage) -> Stage:
    """Completions grow from a quarter of `max_tokens` to all of it over the first 20 steps (2605.16826)."""
    longest = stage.sampling.max_tokens
    return changed(stage, length_schedule={"start": max(1, longest // 4), "steps": 20}) if longest > 1 else stage


def rescue(recipe: Recipe, stage: Stage) -> Stage:
    """GRPO, and the divergence from the teacher on groups that are all wrong, at a tenth of the weight (2608.00782)."""
    fields = {**stage.dense.model_dump(), "token_weights": {"prompts": "all_wrong"}}
    return changed(stage, objective="mixed", sparse_share=0.9, dense=fields)


def _bridge(description: str, question: str, edit: Edit) -> Arm:
    return Arm(description, question, teacher=(TEACHER_RL,), student=(WARMUP, replace(OPD, edit=edit)))


_ALONE: dict[str, Arm] = {
    "exopd": _bridge(
        "bridge whose OPD goes 1.25 times as far as the teacher's RL went",
        "does extrapolating the teacher's change help? (ExOPD, 2602.12125)",
        dense(teacher_weights={"teacher": 1.25, "base_teacher": -0.25}),
    ),
    "exopd_start": _bridge(
        "the same, extrapolated away from the stage's starting weights",
        "and with the student as the reference?",
        dense(teacher_weights={"teacher": 1.25, "start": -0.25}),
    ),
    "opd2": _bridge(
        "bridge whose OPD follows the teacher's gain over the teacher before RL, where both agree",
        "is the teacher's change a better target than the teacher? (OPD², 2607.15161)",
        dense(gain_over="base_teacher"),
    ),
    "entropy_aware": _bridge(
        "bridge whose OPD adds the forward KL where the teacher is uncertain",
        "does the forward KL keep what RL could use? (EOPD, 2603.07079)",
        dense(divergence="entropy_aware"),
    ),
    "proximal": _bridge(
        "bridge whose OPD compares with a mixture of 0.9 teacher and 0.1 student",
        "does a closer target help? (TOP-D, 2607.04751)",
        dense(divergence="skewed", beta=0.9),
    ),
    "first_tokens": _bridge(
        "bridge whose OPD trains the first third of max_tokens alone",
        "is the beginning of a completion enough? (2602.15260)",
        first_third,
    ),
    "soft_or": _bridge(
        "bridge whose OPD trains the half of the tokens with high entropy or high divergence",
        "do the other tokens matter? (TIP, 2604.14084)",
        dense(token_weights={"soft_or": 0.5}),
    ),
    "pass_rate": _bridge(
        "bridge whose OPD weighs prompts by p·(1−p), from labels that the teacher has spent",
        "do prompts of middling difficulty teach more? (PACED, 2603.11178)",
        pass_rate,
    ),
    "length_schedule": _bridge(
        "bridge whose OPD begins with short completions",
        "does a length curriculum help? (2605.16826)",
        growing_length,
    ),
    "rescue": Arm(
        "bridge_rl whose stage 3 learns from the teacher where a whole group is wrong",
        "can labels that give no gradient still teach? (RSTG, 2608.00782)",
        teacher=(TEACHER_RL_1H,),
        student=(*BRIDGE_1H, Step("student_rl", "second_half", rescue)),
    ),
}
_OTHER_COST = ("exopd", "exopd_start", "opd2", "soft_or", "length_schedule")

FOLLOW_UPS = _ALONE | {
    f"{name}_compute": replace(
        _ALONE[name],
        description=f"{name}, with as many OPD steps as take the bridge's FLOPs",
        question="and at equal compute?",
        same_compute=(name, "bridge"),
    )
    for name in _OTHER_COST
}
