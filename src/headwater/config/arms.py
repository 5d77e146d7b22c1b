"""Arms of a study: the stages of each, and everything that reports and docs state about it, in one table.

Every control is the method with one stage removed, swapped or changed. A new arm is one row of `PAPER_ARMS`, or of
`follow_up_arms.FOLLOW_UPS` (docs/extending.md).
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import ValidationError

from headwater.config.arm import (
    BRIDGE_1H,
    OPD,
    RL_ON_ALL,
    SFT,
    TEACHER_RL,
    TEACHER_RL_1H,
    WARMUP,
    Arm,
    Pool,
    Step,
    changed,
    grouped,
)
from headwater.config.follow_up_arms import FOLLOW_UPS
from headwater.config.objectives import default_objective
from headwater.config.recipe import Recipe
from headwater.config.stage import Stage
from headwater.config.validation import complaints
from headwater.errors import UserError, did_you_mean


class StageConflictError(UserError):
    """An arm's change of a stage and the recipe's own fields exclude each other."""


def constant(recipe: Recipe, stage: Stage) -> Stage:
    """Advantage −1 on every sampled token: no teacher, no labels (2608.31046)."""
    unused = {"token_weights": None, "gain_over": None}
    return changed(stage, dense=unused, objective="constant", sparse_share=None, until=None)


def forward_kl(recipe: Recipe, stage: Stage) -> Stage:
    """Forward KL on the student's own samples: the divergence of the warm-up on the prefixes of OPD (2605.16826)."""
    return changed(stage, dense={"divergence": "forward", "gain_over": None})


def mixture(recipe: Recipe, stage: Stage) -> Stage:
    """J_λ with the recipe's λ, or ½; sampled in groups of the size of student RL, so that rewards can be compared."""
    if stage.spec.weighted:
        return stage
    rewarded = recipe.stages.student_rl or recipe.stages.teacher_rl
    group = max(2, stage.group_size) if rewarded is None else rewarded.group_size
    return grouped(stage, group, objective="mixed", sparse_share=0.5)


BASE_MODELS = {"base_student": "student before", "base_teacher": "teacher before"}
"""Untrained models, which every study evaluates, and their descriptions."""

PAPER_ARMS: dict[str, Arm] = {
    "direct_grpo": Arm(
        "GRPO on the student with all labels, no teacher",
        "would the labels have done as much on the student?",
        teacher=(),
        student=(RL_ON_ALL,),
        compare_with=("bridge", "opd_then_rl", "bridge_rl"),
    ),
    # The paper matches labels, not compute. The two `_compute` arms match compute; the second is an open question of 2609.04108.
    "direct_grpo_compute": Arm(
        "the same, with steps set to match the bridge's FLOPs",
        "is it only the compute?",
        teacher=(),
        student=(RL_ON_ALL,),
        compare_with=("bridge",),
        same_compute=("direct_grpo", "bridge"),
    ),
    "raw_teacher": Arm(
        "bridge from the teacher before RL",
        "did the labels matter at all?",
        teacher=(),
        student=(WARMUP, OPD),
        compare_with=("direct_grpo", "bridge"),
    ),
    "opd_then_rl": Arm(
        "OPD from the teacher before RL, then GRPO on all labels",
        "teacher first, or student first?",
        teacher=(),
        student=(OPD, RL_ON_ALL),
        compare_with=("bridge",),
    ),
    "opd_then_rl_compute": Arm(
        "the same, with GRPO steps set to match the bridge's FLOPs",
        "and at equal compute?",
        teacher=(),
        student=(OPD, RL_ON_ALL),
        compare_with=("bridge",),
        same_compute=("opd_then_rl", "bridge"),
    ),
    "sft_teacher": Arm(
        "bridge from a teacher tuned on a stronger model's answers",
        "is it RL, or any better teacher?",
        teacher=(SFT,),
        student=(WARMUP, OPD),
        compare_with=("bridge",),
    ),
    "bridge": Arm(
        "GRPO on the teacher → warm-up → OPD",
        "the method",
        teacher=(TEACHER_RL,),
        student=(WARMUP, OPD),
        compare_with=tuple(name for name in FOLLOW_UPS if name != "rescue"),
    ),
    "bridge_1h": Arm(
        "bridge on the first half (1H): where stage 3 and its replay begin",
        "what do the stages before stage 3 reach?",
        teacher=(TEACHER_RL_1H,),
        student=BRIDGE_1H,
        compare_with=("bridge_rl", "replay"),
    ),
    "bridge_rl": Arm(  # the canonical recipe
        "bridge on 1H, then GRPO on the unused second half (2H)",
        "the whole recipe",
        teacher=(TEACHER_RL_1H,),
        student=(*BRIDGE_1H, Step("student_rl", "second_half")),
        compare_with=("teacher_2h", "rescue"),
    ),
    "replay": Arm(
        "bridge on 1H, then GRPO on 1H again",
        "are unused labels better than more training?",
        teacher=(TEACHER_RL_1H,),
        student=(*BRIDGE_1H, Step("student_rl", "first_half")),
        compare_with=("bridge_rl",),
    ),
    "teacher_2h": Arm(
        "2H spent on the teacher, then the bridge",
        "teacher or student, for the second half?",
        teacher=(TEACHER_RL_1H, Step("teacher_rl", "second_half")),
        student=BRIDGE_1H,
    ),
    "opd_only": Arm(
        "bridge without warm-up",
        "is the warm-up needed?",
        teacher=(TEACHER_RL,),
        student=(OPD,),
        compare_with=("bridge",),
    ),
    "warmup_only": Arm(
        "bridge without OPD",
        "is OPD needed? (the paper never reports it)",
        teacher=(TEACHER_RL,),
        student=(WARMUP,),
        compare_with=("bridge",),
    ),
    "teacher_sft": Arm(
        "SFT of the student on teacher samples",
        "do soft targets matter?",
        teacher=(TEACHER_RL,),
        student=(SFT,),
        compare_with=("bridge",),
    ),
    "forward_kl_on_student": Arm(
        "bridge with forward instead of reverse KL on the student's own prefixes",
        "the direction of the KL alone",
        teacher=(TEACHER_RL,),
        student=(WARMUP, replace(OPD, edit=forward_kl)),
        compare_with=("bridge",),
    ),
    "mixed": Arm(
        "bridge with teacher and reward in one loss (J_λ) in place of OPD",
        "are two stages better than one?",
        teacher=(TEACHER_RL,),
        student=(WARMUP, replace(OPD, edit=mixture)),
        compare_with=("bridge",),
    ),
    # Controls that could refute the method.
    "constant_advantage": Arm(
        "student alone, every sampled token pushed down equally: no teacher, no labels",
        "a control without teacher and labels",
        teacher=(),
        student=(replace(OPD, edit=constant),),
        compare_with=("opd_only",),
    ),
    "bridge_constant": Arm(
        "bridge with the same constant push in place of OPD",
        "does OPD owe its gain to the teacher?",
        teacher=(TEACHER_RL,),
        student=(WARMUP, replace(OPD, edit=constant)),
        compare_with=("bridge",),
    ),
}
ARMS = PAPER_ARMS | FOLLOW_UPS
"""Every arm by name, in the order in which reports list them."""
STUDIES = {"all": tuple(PAPER_ARMS), "improved": ("bridge", "bridge_rl", "bridge_constant", *FOLLOW_UPS)}
"""Lists of arms that `--arms` names: the paper's with their controls, and the published follow-ups with the bridge."""
DEFAULT_ARM = "bridge"
"""Arm of a `run` without --arm, unless the folder or the recipe says otherwise (`runs.default_arm`)."""
DEFAULT_STUDY = ("direct_grpo", "raw_teacher", "bridge", "bridge_1h", "bridge_rl", "replay")

OWN_STAGES = "own_stages"
"""The arm of a recipe that has only some of the stages; not in `ARMS`, because the recipe decides what it is."""

DESCRIPTIONS = {
    **BASE_MODELS,
    **{name: arm.description for name, arm in ARMS.items()},
    OWN_STAGES: "the recipe's own stages, in their order",
}
"""Description of every arm and base model, in the order in which reports list them."""

CONTRASTS = tuple((other, name) for name, arm in ARMS.items() for other in arm.compare_with)
"""Pairs (a, b) whose difference a − b reports show: comparisons of the paper, or that its claims need, or that could refute it."""


def split_pool(recipe: Recipe) -> Pool:
    """The pool of the steps that name none: every label under `labels.split: full`, else the first half."""
    return "all" if recipe.labels.split == "full" else "first_half"


def arm_of(name: str, recipe: Recipe) -> Arm:
    """The arm with its pools resolved for the recipe's split.

    Raises UserError for an unknown name, and for an arm that needs more than the recipe has.
    """
    if name in STUDIES:
        raise UserError(f"--arms {name}: is a list of {len(STUDIES[name])} arms; name it alone, or the arms one by one")
    if name not in ARMS and name != OWN_STAGES:
        known = [*ARMS, OWN_STAGES]
        raise UserError(f"--arm {name}: no such arm; there are {', '.join(known)}{did_you_mean(name, known)}")
    try:
        return _resolved(name, ARMS.get(name) or own_stages(recipe), recipe)
    except StageConflictError as error:
        raise UserError(f"arm {name}: {error}; change that field, or leave the arm out") from None


def _resolved(name: str, arm: Arm, recipe: Recipe) -> Arm:
    default = split_pool(recipe)
    if missing := missing_fields(arm, recipe):
        other = (
            "" if name == OWN_STAGES else f", or name the arm {OWN_STAGES}, which runs the stages that the recipe has"
        )
        add = "add it" if len(missing) == 1 else "add them"
        raise UserError(f"arm {name}: needs {', '.join(missing)}, which the recipe does not have; {add}{other}")
    teacher, student = (
        tuple(replace(step, pool=step.pool or default) for step in steps) for steps in (arm.teacher, arm.student)
    )
    arm = replace(arm, teacher=teacher, student=student)
    _refuse_unspent_labels(name, arm, recipe)
    return arm


def _refuse_unspent_labels(name: str, arm: Arm, recipe: Recipe) -> None:
    """Refuse a dense stage that weighs prompts by labels which no earlier stage of the arm uses: it takes no labels of its own."""
    spent: set[Pool | None] = set()
    for step in arm.steps:
        stage = stage_of(recipe, step)
        if stage.grades_spent_labels and not spent & {step.pool, "all"}:
            assert stage.dense.token_weights is not None
            raise UserError(
                f"stages.{step.stage}.dense.token_weights.prompts: {stage.dense.token_weights.prompts} grades rollouts with the labels "
                f"of the pool {step.pool}, and no earlier stage of the arm {name} uses them; leave it out in this arm"
            )
        if stage.needs_labels:
            spent.add(step.pool)


def default_arm(recipe: Recipe) -> str:
    """The arm that runs where none is named: `DEFAULT_ARM`, or the recipe's own stages where that needs more than it has."""
    return OWN_STAGES if missing_fields(ARMS[DEFAULT_ARM], recipe) else DEFAULT_ARM


def own_stages(recipe: Recipe) -> Arm:
    """The stages that the recipe has, in their order. Raises UserError where they train no student."""
    stages = recipe.stages.named
    student = tuple(step for step in (WARMUP, OPD, Step("student_rl")) if step.stage in stages)
    if not student and "sft" in stages:
        student = (SFT,)
    if not student:
        raise UserError(
            "stages: the recipe trains its teacher alone; to train one model with rewards, name it models.student and the "
            "stage student_rl"
        )
    teacher = (TEACHER_RL,) if "teacher_rl" in stages else ()
    return Arm(DESCRIPTIONS[OWN_STAGES], "", teacher, student)


def missing_fields(arm: Arm, recipe: Recipe) -> list[str]:
    """The fields that an arm needs and the recipe does not have. Example: `["stages.teacher_rl", "data.labeled"]`."""
    stages, missing = recipe.stages.named, dict[str, None]()
    others = [] if arm.same_compute is None else [ARMS[name] for name in arm.same_compute]
    for step in [step for each in (arm, *others) for step in each.steps]:
        if step.stage not in stages and not (step.stage == "sft" and "warmup" in stages):
            missing[f"stages.{step.stage}"] = None
            settings = Stage(objective=default_objective(step.stage), steps=1)
        else:
            settings = stage_of(recipe, step)
        if settings.needs_labels and recipe.data.labeled is None:
            missing["data.labeled"] = None
        if recipe.models.teacher is None and (settings.needs_teacher or step in arm.teacher):
            missing["models.teacher"] = None
    return list(missing)


def stage_of(recipe: Recipe, step: Step) -> Stage:
    """The settings of a step. Hard-label fine-tuning takes those of the warm-up unless the recipe has its own.

    Raises StageConflictError where the step's edit and the recipe's fields exclude each other.
    """
    if step.stage == "sft":
        hard_labels = {"objective": "sft", "until": None}
        stage = recipe.stages.sft or recipe.stages.require("warmup").model_copy(update=hard_labels)
    else:
        stage = recipe.stages.require(step.stage)
    try:
        return step.edit(recipe, stage)
    except ValidationError as error:
        raise StageConflictError(
            f"its change of stages.{step.stage} does not fit: {complaints(error, Stage)[0][1]}"
        ) from None
