"""Python API: `run` and `study`, as the commands of these names (docs/python-api.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater import pipeline
from headwater.config.arms import DEFAULT_STUDY, arm_of
from headwater.config.builtin import find_recipe
from headwater.config.recipe import Recipe, parse_recipe
from headwater.runs.default_arm import choose_arm
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

    arm      None: the one that the folder holds or its probe advised, else `bridge` (docs/arms.md)
    changes  as for `--set`, such as `["stages.opd.steps=5"]`
    track    trackers to log to: `tensorboard`, `wandb`, `trackio`

    Raises `headwater.errors.HeadwaterError` with the message that the command prints. Guard the call with
    `if __name__ == "__main__":` where nodes run in worker processes (`compute.workers`).
    """
    parsed = recipe_of(recipe, changes)
    if arm is None:
        choice = choose_arm(parsed, _folder(out, parsed))
        progress_display(quiet).say(choice.sentence)
        arm = choice.arm
    return study(
        parsed, arms=[arm], seeds=None if seed is None else [seed], out=out, track=track, quiet=quiet
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
    folder = _folder(out, parsed)
    with tracked(progress_display(quiet), folder, track) as display:
        return pipeline.run(parsed, list(arms), list(seeds or [parsed.seed]), folder, display)


def _folder(out: str | Path | None, recipe: Recipe) -> Path:
    return Path(out) if out is not None else Path("runs") / recipe.name


def recipe_of(recipe: Source, changes: Sequence[str] = ()) -> Recipe:
    """Parse a recipe. Raises UserError with the message that the command would print."""
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    if isinstance(recipe, Mapping):
        return parse_recipe(dict(recipe), "recipe", list(changes))
    return find_recipe(str(recipe), list(changes))
