"""Commands that train one model in one stage without a recipe file: distill and grpo. They build a recipe, which the run records."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwater.cli.options import (
    Evals,
    ExecutionOptions,
    RunOptions,
    Seed,
    TaskName,
    dry_run_options,
    examples,
    say_loading,
    with_options,
)
from headwater.cli.run import execute
from headwater.config.arms import OWN_STAGES
from headwater.config.fitted import GROUP, OPD_GROUP
from headwater.runs.progress import progress_display
from headwater.storage.files import read_json
from headwater.storage.run_dir import RunDir
from headwater.storage.untrusted import refuse_malformed_files

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
    prompts: Annotated[str, typer.Option(help="File, folder or hub id of prompts; no answers needed.")],
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
        "stages": {"opd": {"epochs": 1, "group_size": OPD_GROUP}},
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
    data: Annotated[str, typer.Option(help="File, folder or hub id of problems with answers.")],
    options: RunOptions,
    execution: ExecutionOptions,
    evals: Evals = None,
    task: TaskName = "maths",
    seed: Seed = None,
) -> None:
    """Train a model with rewards (GRPO) on problems with answers, without a recipe.

    The stage is `stages.student_rl`: four passes over the problems; `--set` changes any field of the recipe.
    """
    raw = {
        "name": f"grpo-{short_name(model)}",
        "task": task,
        "models": {"student": model},
        "data": {"labeled": data},
        "stages": {"student_rl": {"epochs": 4, "group_size": GROUP, "sparse": {"kl_coef": 0.0}}},
    }
    run_stage("grpo", evaluated(raw, evals, task), seed, options, execution)


def run_stage(
    verb: str, raw: dict[str, Any], seed: int | None, options: RunOptions, execution: ExecutionOptions
) -> None:
    """Run the one stage of a recipe given as plain values, completed by values that fit the models, the data and the device."""
    from headwater.config.recipe import parse_recipe

    def read_with(values: Mapping[str, Any]) -> Recipe:
        return parse_recipe(
            raw, verb, [*(f"{field}={json.dumps(value)}" for field, value in values.items()), *options.changes]
        )

    def read() -> Recipe:
        recipe, display = read_with({}), progress_display(quiet=options.json_)
        say_loading(f"checking recipe {recipe.name}", display)
        values = recorded_values(options.out or Path("runs") / recipe.name)
        from headwater.doctor.fit import fitted_stage
        from headwater.runs.inputs import RunInputs

        # A dry run fetches no model.
        if values is None and not (options.dry_run and RunInputs.for_estimate(recipe).missing):
            assumptions = dry_run_options(options.dry_run, execution.on, execution.mean_tokens)
            device = (assumptions and assumptions.device) or recipe.compute.device
            with display.task("fitting the stage to models, data and device"):
                values, place = fitted_stage(read_with, device)
            own = [field for field in values if not any(change.startswith(field) for change in options.changes)]
            shown = ", ".join(f"{field}={json.dumps(values[field])}" for field in own)
            print(f"fitted to {place}: {shown}; --set changes any", file=sys.stderr)
        return read_with(values or {})

    execute(read, [OWN_STAGES], None if seed is None else [seed], options, execution)


def recorded_values(folder: Path) -> dict[str, Any] | None:
    """The fitted values of the run that a folder holds, which it goes on with; None in a new folder."""
    path = RunDir(folder).recipe
    if not path.exists():
        return None
    with refuse_malformed_files(folder):
        recipe = read_json(path)
        sections = {
            "models": ("dtype", "gradient_checkpointing", "lora"),
            "compute": ("microbatch_tokens", "sample_batch"),
            "evaluate": ("sampling",),
        }
        values = {
            f"{section}.{name}": recipe[section].get(name) for section, names in sections.items() for name in names
        }
        for stage, settings in recipe["stages"].items():
            if settings:
                values |= {f"stages.{stage}.{name}": settings.get(name) for name in ("batch_size", "sampling", "optim")}
        return {field: value for field, value in values.items() if value is not None}


def evaluated(raw: dict[str, Any], evals: str | None, task: str) -> dict[str, Any]:
    """The recipe with an evaluation file, if there is one, and the grader of its answers."""
    return raw if evals is None else {**raw, "task": task, "data": {**raw["data"], "evals": {"held_out": evals}}}


def short_name(model: str) -> str:
    """Last part of a model's name, as part of a run's name. Example: `short_name("pocket:qwen3-student")` is `qwen3-student`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", re.split(r"[/:]", model.rstrip("/"))[-1]).strip("-.")[:40] or "model"
