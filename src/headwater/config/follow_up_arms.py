"""Arms of published follow-ups: the bridge with one thing changed, at the same labels, and their combination (docs/arms.md).

An arm that costs more or less than the bridge has a copy whose name ends in `_compute`, with OPD steps set so that the whole
arm matches the bridge's FLOPs. Arms that spend the bridge's FLOPs differently set their own steps in the same way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from headwater.config.arm import BRIDGE_1H, OPD, TEACHER_RL, TEACHER_RL_1H, WARMUP, Arm, Edit, Step, changed, grouped
from headwater.config.recipe import Recipe
from headwater.config.stage import Stage
from headwater.errors import UserError


def dense(**fields: Any) -> Edit:
    """Change fields of a stage's `dense`; what excludes them is reset."""
    reset = {"divergence": "reverse"} | dict.fromkeys(("gain_over", "teacher_weights", "token_weights", "start_update"))
    return lambda recipe, stage: changed(stage, dense={**reset, **fields})


def first_third(recipe: Recipe, stage: Stage) -> Stage:
    """Only the first third of `max_tokens` is compared with the teacher (2602.15260)."""
    return dense(token_weights={"first": max(1, stage.sampling.max_tokens // 3)})(recipe, stage)


def pass_rate(recipe: Recipe, stage: Stage) -> Stage:
    """Prompts weigh p·(1−p), from groups of at least four rollouts (2603.11178)."""
    return dense(token_weights={"prompts": "pass_rate"})(recipe, grouped(stage, max(4, stage.group_size)))


def growing_length(recipe: Recipe, stage: Stage) -> Stage:
    """Completions grow from a quarter of `max_tokens` to all of it over the first 20 steps (2605.16826)."""
    longest = stage.sampling.max_tokens
    return changed(stage, length_schedule={"start": max(1, longest // 4), "steps": 20}) if longest > 1 else stage


def adapter_to_saturation(recipe: Recipe, stage: Stage) -> Stage:
    """An adapter of rank 16 instead of all weights, for twice the steps and at three times the rate (2608.06802)."""
    optim = {**stage.optim.model_dump(), "lr": 3 * stage.optim.lr}
    return changed(stage, lora={"r": 16, "alpha": 32}, optim=optim, **scaled_length(stage, 2.0))


def quarter(recipe: Recipe, stage: Stage) -> Stage:
    """A quarter of the stage's steps."""
    return changed(stage, **scaled_length(stage, 0.25))


def every_prompt(recipe: Recipe, stage: Stage) -> Stage:
    """Every problem of data.labeled as a prompt; of the teacher one cached rollout each. A stage that grades keeps its pool.

    Raises UserError for a recipe whose teacher reads privileged contexts: they may hold answers that the budget does not buy.
    """
    if stage.needs_labels:
        return stage
    if recipe.prompt.teacher is not None and recipe.prompt.teacher.privileged is not None:
        raise UserError(
            "prompt.teacher.privileged: contexts may hold answers that the budget does not buy, so no arm samples every prompt; "
            "run another arm"
        )
    return changed(stage, prompts="every", group_size=stage.group_size if stage.on_policy else 1)


def scaled_length(stage: Stage, factor: float) -> dict[str, Any]:
    """The fields that make a stage `factor` times as long. Example: 80 steps times ¼ are `{"steps": 20}`."""
    if stage.steps is not None:
        return {"steps": round(factor * stage.steps) or min(1, stage.steps)}
    return {"epochs": factor * (stage.epochs or 0.0)}


def rescue(recipe: Recipe, stage: Stage) -> Stage:
    """GRPO, and the divergence from the teacher on groups that are all wrong, at a tenth of the weight (2608.00782)."""
    return changed(stage, dense={"token_weights": {"prompts": "all_wrong"}}, objective="mixed", sparse_share=0.9)


def _bridge(description: str, question: str, source: str, edit: Edit) -> Arm:
    student = (WARMUP, replace(OPD, edit=edit))
    return Arm(description, question, teacher=(TEACHER_RL,), student=student, source=source)


_ALONE: dict[str, Arm] = {
    "exopd": _bridge(
        "bridge whose OPD goes 1.25 times as far as the teacher's RL went",
        "does extrapolating the teacher's change help?",
        "ExOPD, 2602.12125",
        dense(teacher_weights={"teacher": 1.25, "base_teacher": -0.25}),
    ),
    "exopd_start": _bridge(
        "the same, extrapolated away from the stage's starting weights",
        "and with the student as the reference?",
        "ExOPD, 2602.12125",
        dense(teacher_weights={"teacher": 1.25, "start": -0.25}),
    ),
    "opd2": _bridge(
        "bridge whose OPD follows the teacher's gain over the teacher before RL, where both agree",
        "is the teacher's change a better target than the teacher?",
        "OPD², 2607.15161",
        dense(gain_over="base_teacher"),
    ),
    "entropy_aware": _bridge(
        "bridge whose OPD adds the forward KL where the teacher is uncertain",
        "does the forward KL keep what RL could use?",
        "EOPD, 2603.07079",
        dense(divergence="entropy_aware"),
    ),
    "proximal": _bridge(
        "bridge whose OPD compares with a mixture of 0.9 teacher and 0.1 student",
        "does a closer target help?",
        "TOP-D, 2607.04751",
        dense(divergence="skewed", beta=0.9),
    ),
    "first_tokens": _bridge(
        "bridge whose OPD trains the first third of max_tokens alone",
        "is the beginning of a completion enough?",
        "2602.15260",
        first_third,
    ),
    "soft_or": _bridge(
        "bridge whose OPD trains the half of the tokens with high entropy or high divergence",
        "do the other tokens matter?",
        "TIP, 2604.14084",
        dense(token_weights={"soft_or": 0.5}),
    ),
    "pass_rate": _bridge(
        "bridge whose OPD weights prompts by p·(1−p), from labels that the teacher has spent",
        "do prompts of medium difficulty teach more?",
        "PACED, 2603.11178",
        pass_rate,
    ),
    "length_schedule": _bridge(
        "bridge whose OPD begins with short completions",
        "does a length curriculum help?",
        "2605.16826",
        growing_length,
    ),
    "rescue": Arm(
        "bridge_rl whose stage 3 learns from the teacher where a whole group is wrong",
        "can labels that give no gradient still teach?",
        teacher=(TEACHER_RL_1H,),
        student=(*BRIDGE_1H, Step("student_rl", "second_half", rescue)),
        source="RSTG, 2608.00782",
    ),
    "lora_warmup": Arm(
        "bridge whose warm-up trains an adapter of rank 16 for twice the steps",
        "does a warm-up to saturation with few weights help?",
        teacher=(TEACHER_RL,),
        student=(replace(WARMUP, edit=adapter_to_saturation), OPD),
        source="Simple-OPD, 2608.06802",
    ),
}
_OTHER_COST = ("exopd", "exopd_start", "opd2", "soft_or", "length_schedule", "lora_warmup")

_SPENDING: dict[str, Arm] = {
    "every_prompt": Arm(
        "bridge whose warm-up and OPD sample every labelled problem, the labels beyond the budget unread",
        "do prompts without a label teach as well?",
        teacher=(TEACHER_RL,),
        student=(replace(WARMUP, edit=every_prompt), replace(OPD, edit=every_prompt)),
        same_compute=("bridge", "bridge"),
    ),
    "short_rl": Arm(
        "bridge with a quarter of the teacher's RL, and OPD steps set to match the bridge's FLOPs",
        "how much of the compute does the teacher need?",
        teacher=(replace(TEACHER_RL, edit=quarter),),
        student=(WARMUP, OPD),
        same_compute=("bridge", "bridge"),
    ),
    "bridge_plus": Arm(
        "short_rl and every_prompt together, at the bridge's labels and FLOPs",
        "how far do the same labels and compute reach?",
        teacher=(replace(TEACHER_RL, edit=quarter),),
        student=(replace(WARMUP, edit=every_prompt), replace(OPD, edit=every_prompt)),
        same_compute=("bridge", "bridge"),
    ),
}

FOLLOW_UPS = (
    _ALONE
    | {
        f"{name}_compute": replace(
            _ALONE[name],
            description=f"{name}, with OPD steps set to match the bridge's FLOPs",
            question="and at equal compute?",
            same_compute=(name, "bridge"),
        )
        for name in _OTHER_COST
    }
    | _SPENDING
)
