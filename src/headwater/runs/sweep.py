"""Define a sweep: one recipe at several values of one field, a study at each value. Never imports torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
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
    """The recipe at one value; `name` is the point's folder, `changes` the `--set` options that lead to this recipe.

    Example: `Point(64, "64", ("labels.budget=64",), recipe)`.
    """

    value: Value
    name: str
    changes: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """Arms × seeds at every point.

    recipe   as typed: a file or the name of a built-in recipe
    changes  `--set` options of every point
    derived  the values are defaults, so those that the data do not allow may be left out
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
        """The command line of the whole sweep, with every default written out."""
        values = ",".join(text_of(point.value) for point in self.points)
        return self._command_line(["sweep", self.recipe, "--vary", self.vary, "--values", values], self.changes, out)

    def study_command(self, point: Point, out: Path) -> str:
        """The command line that runs one point alone, in the folder that the sweep uses for it."""
        return self._command_line(["study", self.recipe], point.changes, out / point.name)

    def _command_line(self, words: Sequence[str], changes: Sequence[str], out: Path) -> str:
        options = ["--arms", ",".join(self.arms), "--seeds", ",".join(map(str, self.seeds))]
        options += [word for change in changes for word in ("--set", change)]
        return shlex.join(["headwater", *words, *options, "--out", str(out)])


@dataclass(frozen=True)
class Variation:
    """A field to vary: the arms to compare unless named, and the axis label of the plot."""

    field: str
    arms: tuple[str, ...]
    axis: str


NAMED = {
    "labels": Variation("labels.budget", ("direct_grpo", "bridge"), "labels (distinct problems)"),
    "teacher": Variation("models.teacher", ("direct_grpo", "raw_teacher", "bridge"), "teacher"),
    "lambda": Variation("stages.opd.sparse_share", ("mixed",), "λ, the weight of the sparse reward in J_λ"),
}
POCKET_TEACHERS = {
    "pocket:qwen3-student": ("pocket:qwen3-student", "pocket:qwen3-teacher", "pocket:qwen3-teacher-large"),
    "pocket:llama-student": ("pocket:llama-student", "pocket:llama-teacher"),
}
"""Teachers of a pocket student, smallest first; the student itself is the smallest, as in the paper's table."""


def variation(vary: str) -> Variation:
    """A named variation, or any field by its path. Example: `variation("labels").field` is `"labels.budget"`."""
    return NAMED.get(vary) or Variation(vary, ("direct_grpo", "bridge"), vary)


def default_values(vary: str, recipe: Recipe) -> Sequence[Value]:
    """The values of a named variation: for a budget of 256 labels `[64, 128, 256, 512]`.

    Raises UserError where the recipe does not determine them.
    """
    if vary == "labels":
        if (budget := recipe.labels.budget) is not None:
            return sorted({max(1, budget // 4), max(1, budget // 2), budget, 2 * budget})
        raise UserError("--vary labels: the recipe sets no labels.budget to begin from; name the budgets with --values")
    if vary == "teacher":
        if (student := recipe.models.student) in POCKET_TEACHERS:
            return POCKET_TEACHERS[student]
        raise UserError(f"--vary teacher: name the teachers of {student} with --values, smallest first")
    if vary == "lambda":
        return (0.0, 0.25, 0.5, 0.75, 1.0)
    raise UserError(f"--vary {vary}: name the values to try with --values")


def companions(vary: str, recipe: Recipe) -> tuple[str, ...]:
    """`--set` options that go with a variation; the user's own `--set` overrides them.

    J_λ compares rewards within groups, so each λ samples student RL's group size; rollouts per step stay the same.
    """
    if vary != "lambda":
        return ()
    group_size = recipe.stages.require("student_rl").group_size
    return ("stages.opd.objective=mixed", f"stages.opd.group_size={group_size}")


def lay_out(
    recipe: str,
    vary: str,
    values: Sequence[str] | None,
    arms: Sequence[str] | None,
    seeds: Sequence[int] | None,
    changes: Sequence[str],
) -> Sweep:
    """Read the recipe at every value; values, arms and seeds that are None take their defaults. No data are read.

    Raises UserError naming the value whose recipe is not valid.

    Example: `lay_out("pocket", "labels", ["64", "128"], None, [0, 1], [])` has two points and the arms direct_grpo and
    bridge.
    """
    vary = next((name for name, named in NAMED.items() if vary == named.field), vary)
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[\w-]+)*", vary):
        raise UserError(f"--vary {vary}: name labels, teacher, lambda or a field such as stages.opd.optim.lr")
    varied, base = variation(vary), find_recipe(recipe, list(changes))
    typed = list(map(text_of, default_values(vary, base))) if values is None else list(values)
    shared_changes = (*companions(vary, base), *changes)
    points = tuple(_point(recipe, vary, varied.field, text, shared_changes) for text in typed)
    _refuse_duplicates("--values", typed, [text_of(point.value) for point in points])
    _refuse_duplicates("--values (as names of folders)", typed, [point.name for point in points])
    if not base.data.evals:
        raise UserError(
            "sweep: compares accuracies, and the recipe has no data.evals; add held-out problems with answers"
        )
    arms = varied.arms if arms is None else arms
    for arm in arms:
        arm_of(arm, base)
    _refuse_duplicates("--arms", arms, arms)
    seeds = [base.seed] if seeds is None else seeds
    _refuse_duplicates("--seeds", seeds, seeds)
    return Sweep(recipe, vary, varied.field, tuple(arms), tuple(seeds), tuple(changes), points, values is None)


def _point(recipe: str, vary: str, field: str, text: str, shared_changes: Sequence[str]) -> Point:
    changes = (*shared_changes, f"{field}={text}")
    try:
        parsed = find_recipe(recipe, list(changes))
    except UserError as error:
        raise UserError(f"--vary {vary}, value {text}: {error}") from None
    # The value as the recipe holds it, so that 1e-3 and 0.001 are one; the text itself where that is no scalar.
    value: Any = parsed.model_dump(mode="json")
    for key in field.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    value = value if isinstance(value, (str, int, float)) else text
    return Point(value, folder_name(value), changes, parsed)


def text_of(value: Value) -> str:
    """Example: `text_of(0.25)` is `0.25`, `text_of(1.0)` is `1`, `text_of(True)` is `true`."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def folder_name(value: Value) -> str:
    """Example: `folder_name("pocket:qwen3-teacher")` is `pocket-qwen3-teacher`."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text_of(value)).strip("-.")[-100:] or "empty"


def _refuse_duplicates(option: str, typed: Sequence[Value], normalized: Sequence[Value]) -> None:
    for place, value in enumerate(normalized):
        if value in normalized[:place]:
            raise UserError(f"{option}: {typed[normalized.index(value)]} and {typed[place]} are the same")
