"""Recipes that have only what their arm uses: some stages, no labels, no evaluation, no teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headwater.config.arms import DEFAULT_ARM, OWN_STAGES, arm_of, default_arm
from headwater.config.builtin import find_recipe
from headwater.config.recipe import Recipe, parse_recipe, read_recipe
from headwater.errors import UserError
from headwater.runs.plan import make_plan
from runs import call

DISTILLATION = """\
models:
  student: small
  teacher: large
data:
  unlabeled: prompts.jsonl
stages:
  warmup: {epochs: 1}
  opd: {epochs: 1}
"""
REWARDS = """\
task: maths
models: {student: small}
data: {labeled: train.jsonl}
stages:
  student_rl: {steps: 3}
"""


def read(text: str, folder: Path, name: str = "mine.yaml") -> Recipe:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def node_stages(recipe: Recipe) -> list[str]:
    pools = dict.fromkeys(("all", "first_half", "second_half"), ("a", "b"))

    class Answers(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            return name

    content = {
        "models": str, "pools": pools, "labels": Answers(), "unlabeled": (), "evals": {}, "grader": None,
        "reads": lambda pool, stage, unknown_steps: 1,
    }  # fmt: skip
    plan = make_plan(recipe, [default_arm(recipe)], [0], content)
    return [node.stage for node in plan.order()]


def test_distillation_recipe_runs_its_stages_without_labels(tmp_path: Path) -> None:
    recipe = read(DISTILLATION, tmp_path)
    assert (recipe.name, recipe.task, recipe.data.labeled, recipe.data.evals) == ("mine", None, None, {})
    assert {name: stage.objective for name, stage in recipe.stages.named.items()} == {
        "warmup": "forward_kl",
        "opd": "opd",
    }
    assert default_arm(recipe) == OWN_STAGES
    assert node_stages(recipe) == ["teacher_rollouts", "warmup", "opd"]


def test_reward_recipe_needs_no_teacher(tmp_path: Path) -> None:
    recipe = read(REWARDS, tmp_path, "my run (2).yaml")
    assert recipe.name == "my-run-2" and recipe.models.teacher is None
    assert recipe.stages.require("student_rl").objective == "grpo"
    assert node_stages(recipe) == ["student_rl"]
    assert arm_of("direct_grpo", recipe).student == arm_of(OWN_STAGES, recipe).student


def test_evaluations_add_base_models_of_recipe(tmp_path: Path) -> None:
    assert node_stages(read(REWARDS.replace("}\nst", ", evals: {test: t.jsonl}}\nst"), tmp_path))[0] == "base_student"
    evals = DISTILLATION.replace("prompts.jsonl\n", "prompts.jsonl\n  evals: {test: t.jsonl}\ntask: maths\n")
    assert node_stages(read(evals, tmp_path))[:2] == ["base_student", "base_teacher"]


def test_whole_recipe_keeps_default_arm_and_objectives() -> None:
    recipe = find_recipe("pocket", [])
    assert default_arm(recipe) == DEFAULT_ARM
    raw = recipe.model_dump(mode="json")
    for stage in raw["stages"].values():
        if stage is not None:
            del stage["objective"]
    assert parse_recipe(raw, "here") == recipe


@pytest.mark.parametrize(
    ("text", "arm", "message"),
    [
        (
            DISTILLATION,
            "bridge",
            "arm bridge: needs stages.teacher_rl, data.labeled, which the recipe does not have; add them, or name the arm own_stages",
        ),
        (DISTILLATION, "direct_grpo", "arm direct_grpo: needs stages.student_rl, data.labeled, which"),
        (REWARDS, "raw_teacher", "arm raw_teacher: needs stages.warmup, models.teacher, stages.opd, which"),
        (DISTILLATION.replace("  teacher: large\n", ""), OWN_STAGES, "arm own_stages: needs models.teacher, which"),
        (
            REWARDS.replace("data: {labeled:", "data: {unlabeled:"),
            OWN_STAGES,
            "arm own_stages: needs data.labeled, which the recipe does not have; add it",
        ),
        (REWARDS.replace("student_rl", "teacher_rl"), OWN_STAGES, "stages: the recipe trains its teacher alone"),
        (DISTILLATION, "direct_grpo_compute", "needs stages.student_rl, data.labeled, stages.teacher_rl, which"),
    ],
)
def test_arm_names_missing_fields(text: str, arm: str, message: str, tmp_path: Path) -> None:
    recipe = read(text, tmp_path)
    with pytest.raises(UserError) as refused:
        arm_of(arm, recipe)
    assert message in str(refused.value)


def test_probe_and_sweep_refuse_recipes_without_their_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read(DISTILLATION, tmp_path)
    probed = call("probe", "mine.yaml")
    assert (probed.code, probed.out) == (2, "")
    assert "which needs stages.teacher_rl, data.labeled, stages.student_rl; the recipe has no such field" in probed.err
    swept = call("sweep", "mine.yaml", "--vary", "stages.opd.optim.lr", "--values", "1e-5", "--arms", "own_stages")
    assert swept.code == 2 and "sweep: compares accuracies, and the recipe has no data.evals" in swept.err
