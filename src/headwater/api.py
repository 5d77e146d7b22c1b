"""Python API: `run` and `study`, as the commands of these names (docs/python-api.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater import pipeline
from headwater.config.arms import DEFAULT_STUDY, arm_of, default_arm
from headwater.config.builtin import find_recipe
from headwater.config.recipe import Recipe, parse_recipe
from headwater.runs.progress import progress_display
from headwater.runs.trackers import tracked

Source = str | Path | Mapping[str, Any] | Recipe
"""A YAML file, the name of a built-in recipe, a recipe's fields, or a parsed recipe."""


def run(
    recipe: Source,
    *,
    arm: str | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    changes: Sequence[str] = (),
    track: Sequence[str] = (),
    quiet: bool = True,
) -> dict[str, Any]:
    """Run one arm, or resume it; returns the report, which is also written to `out`.

    arm      None: the recipe's default arm
    changes  as for `--set`, such as `["stages.opd.steps=5"]`
    track    trackers to log to: `tensorboard`, `wandb`, `trackio`

    Raises `headwater.errors.HeadwaterError` with the message that the command prints. Guard the call with
    `if __name__ == "__main__":` where nodes run in worker processes (`compute.workers`).
    """
    recipe = recipe_of(recipe, changes)
    arms = [default_arm(recipe)] if arm is None else [arm]
    return study(
        recipe, arms=arms, seeds=None if seed is None else [seed], out=out, track=track, quiet=quiet
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
    """Run arms × seeds as one plan with shared nodes run once; returns the report. Arguments as for `run`."""
    parsed = recipe_of(recipe, changes)
    for arm in arms:
        arm_of(arm, parsed)
    folder = Path(out) if out is not None else Path("runs") / parsed.name
    with tracked(progress_display(quiet), folder, track) as display:
        return pipeline.run(parsed, list(arms), list(seeds or [parsed.seed]), folder, display)


def recipe_of(recipe: Source, changes: Sequence[str] = ()) -> Recipe:
    """Parse a recipe. Raises UserError with the message that the command would print."""
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    if isinstance(recipe, Mapping):
        return parse_recipe(dict(recipe), "recipe", list(changes))
    return find_recipe(str(recipe), list(changes))
