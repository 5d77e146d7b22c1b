"""An estimate of what is not here yet: problems and tokenizers that a recipe names are stood in for, and it is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headwater.config.recipe import Recipe, Source
from headwater.data.sources import Loaded, load
from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.runs.checks import check_plan
from headwater.runs.inputs import RunInputs, load_inputs
from headwater.runs.plan import Plan, make_plan
from headwater.teachers.server_client import is_served
from headwater.types import Problem, Verdict


def laid_out(recipe: Recipe, arms: Sequence[str], seeds: Sequence[int]) -> tuple[Plan, RunInputs]:
    """Plan and materials for an estimate, also where data, tokenizers or weights are still to be fetched; nothing is fetched.

    Raises UserError where not even the number of problems can be known.
    """
    absent: list[str] = []

    def read(source: Source, what: str, need_answers: bool, gold: Callable[[Any], str | None] | None = None) -> Loaded:
        if source.path is None or Path(source.path).expanduser().exists():
            return load(source, what, need_answers, gold)
        if source.limit is None:
            raise UserError(
                f"{what}: {source.path} is not here, and {what}.limit does not say how many problems to take it for"
            )
        absent.append(f"{what}: {source.path} is not here; taken to hold {source.limit:,} problems, its limit")
        return stand_in(what, source.limit)

    def ungraded(asked: Sequence[tuple[str, str]]) -> list[Verdict]:
        raise AssertionError("an estimate grades nothing")

    inputs = load_inputs(recipe, ungraded, read)
    plan = make_plan(recipe, arms, seeds, inputs.content())
    named = [pair for role in ("student", "teacher", "expert") for pair in recipe.models.named(role).items()]
    away = [(field, name) for field, name in named if is_served(name) or not ModelFolder.open(name, field).is_local]
    if not absent and not away:
        check_plan(plan, inputs)
    absent += [f"{field}: {name} is not in a local folder; its tokenizer was not asked" for field, name in away]
    return plan, replace(inputs, absent=tuple(absent))


def stand_in(what: str, count: int) -> Loaded:
    """So many problems that nobody has read."""
    problems = [Problem.of(f"{what} {number}", what) for number in range(count)]
    return Loaded(problems, {problem.id: "" for problem in problems})
