"""One recipe at several values of one thing. Each value is a point: a study with a folder of its own.

    lay_out(…)   the points, every recipe among them read; no data are touched yet
    Sweep        what `sweep_run` runs and `sweep_report` reads back from the folders

Never imports torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.config.arms import arm_of
from headwater.config.builtin import find_recipe
from headwater.config.recipe import Recipe
from headwater.errors import UserError

Value = str | int | float


@dataclass(frozen=True)
class Point:
    """The recipe at one value.

    name     the value as text: the name of the point's folder
    changes  the `--set` options that make this recipe of the one that was named

    Example: `Point(64, "64", ("labels.budget=64",), recipe)`.
    """

    value: Value
    name: str
    changes: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """What is asked: `recipe` as it was typed, one field of it varied, arms × seeds at every point.

    derived  nobody named the values, so one that the data do not allow may be left out
    changes  `--set` options that hold at every point
    """

    recipe: str
    vary: str
    field: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    changes: tuple[str, ...]
    points: tuple[Point, ...]
    derived: bool

    @property
    def title(self) -> str:
        return self.points[0].recipe.name

    def command(self, out: Path) -> str:
        """The command line of the whole sweep, with all that was left to defaults written out."""
        values = ",".join(text_of(point.value) for point in self.points)
        return _line(["sweep", self.recipe, "--vary", self.vary, "--values", values], self, self.changes, out)

    def study(self, point: Point, out: Path) -> str:
        """The command line that runs one point alone, into the very folder that the sweep uses."""
        return _line(["study", self.recipe], self, point.changes, out / point.name)


def _line(words: Sequence[str], sweep: Sweep, changes: Sequence[str], out: Path) -> str:
    asked = ["--arms", ",".join(sweep.arms), "--seeds", ",".join(map(str, sweep.seeds))]
    sets = [word for change in changes for word in ("--set", change)]
    return shlex.join(["headwater", *words, *asked, *sets, "--out", str(out)])


@dataclass(frozen=True)
class Variation:
    """A thing that is often varied.

    field    the field of the recipe that it is
    arms     the arms whose order it may turn
    axis     what stands under the plot
    values   the recipe -> values worth asking for. Raises UserError where the recipe does not say
    beside   the recipe -> further fields that must go with it, which `--set` may still change
    """

    field: str
    arms: tuple[str, ...]
    axis: str
    values: Callable[[Recipe], Sequence[Value]]
    beside: Callable[[Recipe], Sequence[str]] = lambda recipe: ()


def budgets(recipe: Recipe) -> list[int]:
    """A quarter, half, once and twice the recipe's budget. Example: 256 gives `[64, 128, 256, 512]`."""
    budget = recipe.labels.budget
    if budget is None:
        raise UserError("--vary labels: the recipe sets no labels.budget to begin from; name the budgets with --values")
    return sorted({max(1, budget // 4), max(1, budget // 2), budget, 2 * budget})


POCKET_TEACHERS = {
    "pocket:qwen3-student": ("pocket:qwen3-student", "pocket:qwen3-teacher", "pocket:qwen3-teacher-large"),
    "pocket:llama-student": ("pocket:llama-student", "pocket:llama-teacher"),
}
"""The student itself is the smallest teacher, as in the paper's table."""


def teachers(recipe: Recipe) -> tuple[str, ...]:
    if recipe.models.student not in POCKET_TEACHERS:
        raise UserError(f"--vary teacher: name the teachers of {recipe.models.student} with --values, smallest first")
    return POCKET_TEACHERS[recipe.models.student]


def shares(recipe: Recipe) -> tuple[float, ...]:
    return (0.0, 0.25, 0.5, 0.75, 1.0)


def as_mixture(recipe: Recipe) -> list[str]:
    """J_λ compares rewards within groups, so every λ samples in the groups of student RL, with as many rollouts a step."""
    return ["stages.opd.objective=mixed", f"stages.opd.group_size={recipe.stages.student_rl.group_size}"]


NAMED = {
    "labels": Variation("labels.budget", ("direct_grpo", "bridge"), "labels (distinct problems)", budgets),
    "teacher": Variation("models.teacher", ("direct_grpo", "raw_teacher", "bridge"), "teacher", teachers),
    "lambda": Variation(
        "stages.opd.sparse_share", ("mixed",), "λ, the weight of the sparse reward in J_λ", shares, as_mixture
    ),
}
OTHER_ARMS = ("direct_grpo", "bridge")
"""The arms where any other field is varied."""


def _no_values(field: str) -> Callable[[Recipe], Sequence[Value]]:
    def values(recipe: Recipe) -> Sequence[Value]:
        raise UserError(f"--vary {field}: say with --values which values to try")

    return values


def variation(vary: str) -> Variation:
    """A named one, or a field path taken for itself. Example: `variation("labels").field` is `"labels.budget"`."""
    return NAMED[vary] if vary in NAMED else Variation(vary, OTHER_ARMS, vary, _no_values(vary))


def lay_out(
    recipe: str,
    vary: str,
    values: Sequence[str] | None,
    arms: Sequence[str] | None,
    seeds: Sequence[int] | None,
    changes: Sequence[str],
) -> Sweep:
    """Read the recipe at every value; where values, arms or seeds are None, those that the thing varied suggests.

    Raises UserError naming the value whose recipe is not legal.

    Example: `lay_out("pocket", "labels", ["64", "128"], None, [0, 1], [])` has two points and the arms direct_grpo and
    bridge.
    """
    vary = next((name for name, one in NAMED.items() if vary == one.field), vary)
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[\w-]+)*", vary):
        raise UserError(f"--vary {vary}: name labels, teacher, lambda or a field such as stages.opd.optim.lr")
    varied = variation(vary)
    base = find_recipe(recipe, list(changes))
    typed = [text_of(value) for value in varied.values(base)] if values is None else list(values)
    points = tuple(_point(recipe, vary, text, base, changes) for text in typed)
    _refuse_twice("--values", typed, [text_of(point.value) for point in points])
    _refuse_twice("--values (as names of folders)", typed, [point.name for point in points])
    chosen = list(varied.arms) if arms is None else list(arms)
    for arm in chosen:
        arm_of(arm, base)
    _refuse_twice("--arms", chosen, chosen)
    numbers = [base.seed] if seeds is None else list(seeds)
    _refuse_twice("--seeds", [str(one) for one in numbers], [str(one) for one in numbers])
    return Sweep(recipe, vary, varied.field, tuple(chosen), tuple(numbers), tuple(changes), points, values is None)


def _point(recipe: str, vary: str, text: str, base: Recipe, changes: Sequence[str]) -> Point:
    varied = variation(vary)
    all_changes = (*varied.beside(base), *changes, f"{varied.field}={text}")
    try:
        found = find_recipe(recipe, list(all_changes))
    except UserError as error:
        raise UserError(f"--vary {vary}, value {text}: {error}") from None
    value = _held(found, varied.field, text)
    return Point(value, folder_name(value), all_changes, found)


def _held(recipe: Recipe, field: str, text: str) -> Value:
    """The value as the recipe holds it, so that 1e-3 and 0.001 are one; the text itself where that is no single value."""
    held: Any = recipe.model_dump(mode="json")
    for key in field.split("."):
        held = held.get(key) if isinstance(held, dict) else None
    return held if isinstance(held, (str, int, float)) else text


def text_of(value: Value) -> str:
    """Example: `text_of(0.25)` is `0.25`, `text_of(1.0)` is `1`, `text_of(True)` is `true`."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def folder_name(value: Value) -> str:
    """Example: `folder_name("pocket:qwen3-teacher")` is `pocket-qwen3-teacher`."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text_of(value)).strip("-.")[-100:] or "empty"


def _refuse_twice(option: str, typed: Sequence[str], held: Sequence[str]) -> None:
    for place, one in enumerate(held):
        if one in held[:place]:
            raise UserError(f"{option}: {typed[held.index(one)]} and {typed[place]} are the same")
