"""`init --all`: every field at its default with its description."""

from __future__ import annotations

import yaml

from headwater.config.arms import DEFAULT_ARM, default_arm
from headwater.config.fields import walk
from headwater.config.full_recipe import VALUES, full_recipe
from headwater.config.recipe import Recipe, parse_recipe
from runs import call


def test_full_recipe_has_values_of_minimal_recipe() -> None:
    minimal = {
        "name": VALUES["name"],
        "task": "maths",
        "models": {"student": VALUES["models.student"], "teacher": VALUES["models.teacher"]},
        "data": {"labeled": "train.jsonl", "evals": {"held_out": "test.jsonl"}},
        "stages": {name: {"epochs": 1} for name in ("teacher_rl", "warmup", "opd", "student_rl")},
    }
    recipe = parse_recipe(yaml.safe_load(full_recipe()), "init --all")
    assert recipe == parse_recipe(minimal, "minimal") and default_arm(recipe) == DEFAULT_ARM


def test_full_recipe_describes_every_field() -> None:
    text = full_recipe()
    flat = " ".join(line.strip(" #") for line in text.splitlines())
    missing = {
        field.path
        for field in walk(Recipe)
        if f"{field.name}: " not in flat and f"{field.name}:" not in flat and "NAME" not in field.path
    }
    assert missing == set()
    described = " ".join(part.strip(" #") for line in text.splitlines() for part in line.split("  # ")[-1:])
    assert all(field.description[:60] in described for field in walk(Recipe) if "NAME" not in field.path)
    assert max(map(len, text.splitlines())) <= 140


def test_init_all_prints_full_recipe() -> None:
    assert call("init", "--all").out == full_recipe()
    refused = call("init", "pocket", "--all")
    assert refused.code == 2 and "--all" in refused.err
