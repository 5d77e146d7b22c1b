"""Refuse plans that the recipe's data, models and teachers cannot carry out."""

from __future__ import annotations

from collections.abc import Sequence

from headwater.config.recipe import Recipe
from headwater.config.stage import Stage
from headwater.errors import UserError
from headwater.losses.objectives import divergence_of
from headwater.models.prompts import Prompter, refuse_different_prompts
from headwater.models.tokenizer import refuse_different_tokens
from headwater.runs.inputs import RunInputs, read_tokenizer, tokenizer_of
from headwater.runs.plan import Node, Plan
from headwater.teachers import server_client
from headwater.teachers.server_client import ServedTokenizer
from headwater.types import Problem


def check_plan(plan: Plan, inputs: RunInputs) -> None:
    """Refuse what could not run, before any model is loaded. Raises UserError naming the field."""
    recipe = plan.recipe
    refuse_what_it_cannot(plan)
    refuse_unknown_tags(recipe, inputs)
    roles = ["student", "teacher"]
    for node in plan.order():
        if (node.role == "expert" or node.start == "expert") and "expert" not in roles:
            roles.append("expert")
        if node.settings is None or node.pool is None or node.kind != "train" or not node.settings.on_policy:
            continue
        pool, wanted = len(inputs.prompts(node.pool, node.settings)), node.settings.prompts_per_step
        if pool < wanted:
            raise UserError(
                f"labels.budget {len(inputs.pools.all)}: gives stage {node.stage} a pool of {pool} problems ({node.pool}), "
                f"fewer than the {wanted} of one step (stages.{node.stage}.batch_size {node.settings.batch_size} / "
                f"group_size {node.settings.group_size})"
            )
    sample = [inputs.problems[name] for name in sorted(inputs.problems)[:32]]
    student = read_tokenizer(recipe, "student")
    prompter = Prompter(student, recipe.prompt)
    texts = [problem.text[:10_000] for problem in sample]  # one that is far too long is refused below, by name
    for field, name in [pair for role in roles[1:] for pair in recipe.models.named(role).items()]:
        tokenizer = tokenizer_of(recipe, field, name)
        some = FEW if isinstance(tokenizer, ServedTokenizer) else len(sample)
        refuse_different_tokens(student, tokenizer, ("models.student", field), texts[:some])
        if isinstance(tokenizer, ServedTokenizer):
            refuse_other_chats(prompter, tokenizer, field, sample[:some])
        else:
            refuse_different_prompts(prompter, Prompter(tokenizer, recipe.prompt), sample)
    for problem in (
        *inputs.problems.values(),
        *(one for problems, _ in inputs.evals.values() for one in problems),
    ):
        prompter.ids(problem)


FEW = 4
"""Problems on which a served teacher's tokenizer is compared beside the probe strings: each is a call."""


def refuse_unknown_tags(recipe: Recipe, inputs: RunInputs) -> None:
    """Raises UserError for a problem that no teacher of a mapping is named for."""
    known = recipe.models.teacher
    for problem in inputs.everything if isinstance(known, dict) else ():
        if problem.tag not in known:
            said = f"has the tag {problem.tag!r}" if problem.tag else "has no tag (data.columns.tag names their column)"
            raise UserError(
                f"models.teacher: problem {problem.id} of {problem.source} {said}, and the mapping knows {', '.join(known)}"
            )


def refuse_other_chats(student: Prompter, theirs: ServedTokenizer, field: str, problems: Sequence[Problem]) -> None:
    """Refuse a server whose chat template gives a problem other ids than the student's: every token would be biased.

    Raises UserError.
    """
    templated = getattr(student.tokenizer, "chat_template", None) is not None
    for problem in problems if templated else ():
        found, ours = theirs.chat(student.messages(problem), student.prompt.thinking), student.ids(problem)
        if found is not None and tuple(found) != ours:
            raise UserError(
                f"models.student and {field}: their chat templates give different ids for the same problem ({list(ours[-6:])} and "
                f"{found[-6:]} at its end, prompt.thinking {student.prompt.thinking})"
            )


def refuse_what_it_cannot(plan: Plan) -> None:
    """Raises UserError for a plan that asks of the base teacher what its form does not give; weights of one model give all."""
    models = plan.recipe.models
    several, names = isinstance(models.teacher, dict), models.named("teacher").values()
    away = [name for name in names if server_client.is_served(name)]
    if not several and not away:
        return
    what = "a mapping to several models" if several else f"a server ({away[0]})"
    for node in plan.order():
        if node.kind == "train" and node.start == "teacher":
            raise UserError(
                f"models.teacher: is {what}, which is not trained here, and stage {node.stage} of this arm would; take arms that "
                "leave the teacher as it is (raw_teacher), or name one folder"
            )
        if away and node.settings is not None and "teacher" in (node.teacher, node.start):
            _refuse_inexact(node, node.settings, away[0])


def _refuse_inexact(node: Node, stage: Stage, name: str) -> None:
    where = "warmup" if node.kind == "rollouts" else node.stage
    scores = node.kind == "train" or stage.objective != "sft"
    if scores and divergence_of(stage.dense) is not None and stage.dense.top_k is None:
        raise UserError(
            f"stages.{where}.dense.top_k: models.teacher is a server ({name}), which gives the likeliest tokens and not the whole "
            "distribution; set it (64, say, with --max-logprobs 64 at the server)"
        )
    if stage.sampling.temperature != 1.0:
        raise UserError(
            f"stages.{where}.sampling.temperature: models.teacher is a server ({name}), which scores at temperature 1 only"
        )
