"""Fuzz cases of recipes and `--set` options, and helpers of other fuzz cases that make and run a recipe."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from headwater.config.arms import ARMS
from headwater.config.builtin import builtin_text, find_recipe
from headwater.config.recipe import Recipe
from headwater.doctor.checks import CHECKS, Examination, diagnose, examine, preflight
from headwater.doctor.context import DoctorContext
from headwater.runs.estimate import estimates
from headwater.runs.setup import prepared
from malformed_inputs import BOMBS, at, leaf, mutated, near, places, spoiled


class WrongError(Exception):
    """The program accepted an input that it must refuse, or misread it."""


def small(name: str) -> dict[str, Any]:
    """A built-in recipe with few problems, so that a case is fast."""
    raw: dict[str, Any] = yaml.safe_load(builtin_text(name))
    for source in (raw["data"]["labeled"], *raw["data"]["evals"].values()):
        if "generate" in source:
            source["generate"]["count"] = 40
    raw["labels"]["budget"] = 32
    for stage in ("teacher_rl", "student_rl"):
        raw["stages"][stage] |= {"batch_size": 16, "group_size": 4, "steps": 2}
    raw["stages"]["opd"]["batch_size"] = 8
    raw["compute"] = {"threads": 1, "workers": 1, "device": "cpu", "grader_workers": 1}
    raw["guards"] = {"no_signal": "stop", "patience": 3, "truncation": "stop", "kl_explosion": {"bound": 2.0}}
    return raw


def with_files(draw: random.Random, folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The same recipe on files and another task."""
    rows = [{"problem": f"{n:02d}+07+11+90", "answer": f"{(n + 8) % 100:02d}"} for n in range(40)]
    for name, part in (("labeled.jsonl", rows[:30]), ("held.jsonl", rows[30:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    raw["data"] = {"labeled": str(folder / "labeled.jsonl"), "evals": {"held": {"path": str(folder / "held.jsonl")}}}
    raw["labels"]["budget"] = 20
    raw["task"] = draw.choice(["exact", "numeric", "sums", "choice"])
    return raw


def prepare(recipe: Recipe, arm: str, folder: Path, thorough: bool) -> str:
    """Run what `--dry-run` runs and, if `thorough`, the doctor."""
    with prepared(recipe, [arm], [recipe.seed]) as (plan, inputs):
        preflight(plan, inputs)
        json.dumps([row.row() for row in estimates(plan, inputs)])
    if thorough:
        result = diagnose(recipe, [arm], [recipe.seed], folder / "out")
        result.text()
        return "examined"
    return "planned"


def on_model(folder: Path, rows: Sequence[dict[str, Any]], model: Path) -> Recipe:
    """A small recipe on a model folder and data of its own, whose answers are graded as text."""
    raw = small("pocket")
    for name, part in (("labeled.jsonl", rows), ("held.jsonl", [{"problem": "9+9", "answer": "18"}])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    raw["models"] |= {"student": str(model), "teacher": str(model)}
    raw["data"] = {"labeled": str(folder / "labeled.jsonl"), "evals": {"held": {"path": str(folder / "held.jsonl")}}}
    raw |= {"task": "exact", "labels": {"budget": len(rows)}}
    for stage in raw["stages"].values():
        stage["batch_size"] = stage.get("group_size", 1)
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return find_recipe(str(path), [])


def examined(recipe: Recipe, weights: bool = False) -> Examination:
    """The doctor's examination; without `weights`, only of checks that load none."""
    checks = [check for check in CHECKS if weights or check.stage == "files"]
    with prepared(recipe, ["direct_grpo"], [recipe.seed]) as (plan, inputs):
        context = DoctorContext.of(plan, inputs, Path("out"))
        try:
            result = examine(context, checks)
        finally:
            context.close()
    result.text()
    return result


def recipe(draw: random.Random, folder: Path) -> str:
    raw = small(draw.choice(["pocket", "pocket", "pocket-countdown"]))
    if draw.random() < 0.3:
        raw = with_files(draw, folder, raw)
    raw = mutated(draw, raw)
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    read = find_recipe(str(path), [])
    return prepare(read, draw.choice(sorted(ARMS)), folder, draw.random() < 0.1)


def recipe_text(draw: random.Random, folder: Path) -> str:
    path = folder / "r.yaml"
    text = yaml.safe_dump(small("pocket")).encode()
    extra = draw.choice(BOMBS)
    path.write_bytes(spoiled(draw, text + extra) if draw.random() < 0.8 else text + extra)
    return prepare(find_recipe(str(path), []), "direct_grpo", folder, False)


def override(draw: random.Random, folder: Path) -> str:
    ways = [path for path in places(small("pocket")) if all(isinstance(key, str) for key in path)]
    changes = []
    for _ in range(draw.randint(1, 3)):
        if draw.random() < 0.6:
            path = draw.choice(ways)
            changes.append(f"{'.'.join(path)}={json.dumps(near(draw, at(small('pocket'), path)))}")
            continue
        value = leaf(draw)
        text = value if isinstance(value, str) else json.dumps(value)
        changes.append(
            draw.choice([f"{'.'.join(draw.choice(ways))}={text}", f"{'.'.join(draw.choice(ways))}.x={text}", text])
        )
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(small("pocket")), encoding="utf-8")
    return prepare(find_recipe(str(path), changes), "direct_grpo", folder, False)
