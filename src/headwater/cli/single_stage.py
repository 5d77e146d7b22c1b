"""Commands that train one model in one stage without a recipe file: distill and grpo. They build a recipe, which the run records."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwater.cli.options import Evals, ExecutionOptions, RunOptions, Seed, TaskName, examples, with_options
from headwater.cli.run import execute
from headwater.config.arms import OWN_STAGES
from headwater.config.learning_rates import RATES, Signal

if TYPE_CHECKING:
    from headwater.config.recipe import Recipe

commands = typer.Typer()


@commands.command(
    epilog=examples(
        "headwater distill ./student ./teacher --prompts prompts.jsonl --out runs/small",
        "headwater distill ./student ./teacher --prompts p.jsonl --set models.lora.r=32",
    )
)
@with_options
def distill(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Model to train: a folder or a hub id.")],
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A folder, a hub id, or http://HOST:PORT/v1.")],
    prompts: Annotated[str, typer.Option("--prompts", help="File, folder or hub id of prompts; no answers needed.")],
    options: RunOptions,
    execution: ExecutionOptions,
    evals: Evals = None,
    task: TaskName = "maths",
    seed: Seed = None,
) -> None:
    """Distill a teacher into a student on its own samples (OPD), without labels and without a recipe.

    The stage is `stages.opd`: one pass over the prompts; `--set` changes any field of the recipe.
    """
    raw = {
        "name": f"distill-{short_name(student)}",
        "models": {"student": student, "teacher": teacher},
        "data": {"unlabeled": prompts},
        "stages": {"opd": {"epochs": 1, "group_size": 4, "optim": {"lr": usual_rate("teacher", options.changes)}}},
    }
    run_stage("distill", evaluated(raw, evals, task), seed, options, execution)


@commands.command(
    epilog=examples(
        "headwater grpo ./model --data train.jsonl --evals test.jsonl --task maths",
        "headwater grpo ./model --data train.jsonl --set stages.student_rl.steps=100",
    )
)
@with_options
def grpo(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model to train: a folder or a hub id.")],
    data: Annotated[str, typer.Option("--data", help="File, folder or hub id of problems with answers.")],
    options: RunOptions,
    execution: ExecutionOptions,
    evals: Evals = None,
    task: TaskName = "maths",
    seed: Seed = None,
) -> None:
    """Train a model with rewards (GRPO) on problems with answers, without a recipe.

    The stage is `stages.student_rl`: four passes over the problems; `--set` changes any field of the recipe.
    """
    stage = {
        "epochs": 4,
        "batch_size": 128,
        "optim": {"lr": usual_rate("reward", options.changes)},
        "sparse": {"kl_coef": 0.0},
    }
    raw = {
        "name": f"grpo-{short_name(model)}",
        "task": task,
        "models": {"student": model},
        "data": {"labeled": data},
        "stages": {"student_rl": stage},
    }
    run_stage("grpo", evaluated(raw, evals, task), seed, options, execution)


def run_stage(
    verb: str, raw: dict[str, Any], seed: int | None, options: RunOptions, execution: ExecutionOptions
) -> None:
    """Run the stages of a recipe given as plain values."""

    def read() -> Recipe:
        from headwater.config.recipe import parse_recipe

        return parse_recipe(raw, verb, options.changes)

    execute(read, [OWN_STAGES], None if seed is None else [seed], options, execution)


def evaluated(raw: dict[str, Any], evals: str | None, task: str) -> dict[str, Any]:
    """The recipe with an evaluation file, if there is one, and the grader of its answers."""
    return raw if evals is None else {**raw, "task": task, "data": {**raw["data"], "evals": {"held_out": evals}}}


def usual_rate(signal: Signal, changes: list[str]) -> float:
    """The published learning rate to start from: that of adapters where `--set` adds them."""
    adapters = any(change.startswith("models.lora") for change in changes)
    return RATES[signal, adapters].usual


def short_name(model: str) -> str:
    """Last part of a model's name, as part of a run's name. Example: `short_name("pocket:qwen3-student")` is `qwen3-student`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", re.split(r"[/:]", model.rstrip("/"))[-1]).strip("-.")[:40] or "model"
