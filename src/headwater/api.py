"""Headwater from Python: what `headwater run` and `headwater study` do, as two functions (docs/python-api.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater import pipeline
from headwater.config.arms import DEFAULT_ARM, DEFAULT_STUDY, arm_of
from headwater.config.builtin import find_recipe
from headwater.config.recipe import Recipe, parse_recipe
from headwater.runs.progress import progress_display
from headwater.runs.trackers import tracked

Source = str | Path | Mapping[str, Any] | Recipe
"""A YAML file, the name of a built-in recipe, the fields of one, or a recipe that was read before."""


def run(
    recipe: Source,
    *,
    arm: str = DEFAULT_ARM,
    out: str | Path | None = None,
    seed: int | None = None,
    changes: Sequence[str] = (),
    track: Sequence[str] = (),
    quiet: bool = True,
) -> dict[str, Any]:
    """Run one arm to its end, or go on where it stopped; returns the report, which also stands in `out`.

    changes  such as `["stages.opd.steps=5"]`, as `--set` takes them
    track    trackers to keep up to date: `tensorboard`, `wandb`, `trackio`

    Raises `headwater.errors.HeadwaterError`, whose text is the sentence that the program prints. Guard the call with
    `if __name__ == "__main__":` where nodes run in processes of their own (`compute.workers`).
    """
    return study(
        recipe, arms=[arm], seeds=None if seed is None else [seed], out=out, changes=changes, track=track, quiet=quiet
    )


def study(
    recipe: Source,
    *,
    arms: Sequence[str] = DEFAULT_STUDY,
    seeds: Sequence[int] | None = None,
    out: str | Path | None = None,
    changes: Sequence[str] = (),
    track: Sequence[str] = (),
    quiet: bool = True,
) -> dict[str, Any]:
    """Run many arms × seeds as one plan, shared nodes once; returns the report. The arguments are those of `run`."""
    found = recipe_of(recipe, changes)
    for arm in arms:
        arm_of(arm, found)
    folder = Path(out) if out is not None else Path("runs") / found.name
    with tracked(progress_display(quiet), folder, track) as told:
        return pipeline.run(found, list(arms), list(seeds or [found.seed]), folder, told)


def recipe_of(recipe: Source, changes: Sequence[str] = ()) -> Recipe:
    """Raises UserError with the sentence that the program would print."""
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    if isinstance(recipe, Mapping):
        return parse_recipe(dict(recipe), "recipe", list(changes))
    return find_recipe(str(recipe), list(changes))
