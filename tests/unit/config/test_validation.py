"""Faults of a recipe: all of them at once, each with its line or option and the spelling that was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.config.builtin import find_recipe
from headwater.config.recipe import read_recipe
from headwater.errors import RecipeError, UserError, did_you_mean

FAULTY = """\
name: tiny
task: sums
models:
  student: pocket:a
  teacher: 5
  dtype: bfloat
data:
  labeled: train.jsonl
  evals: {test: {path: a.jsonl, colums: {}}}
stages:
  teacher_rl: {objective: grop, steps: 3}
  warmup: {objective: forward_kl, epochs: 1, learning_rate: 1}
  opd:
    objective: opd
    steps: 3
    optim:
      lrr: 5
  student_rl: {objective: grpo, steps: 3}
"""


def faults_of(text: str, folder: Path, *overrides: str) -> list[str]:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as refused:
        read_recipe(path, list(overrides))
    return str(refused.value).replace(str(path), "r.yaml").split("\n")


def test_recipe_faults_are_listed_with_lines_and_suggestions(tmp_path: Path) -> None:
    first, *faults = faults_of(FAULTY, tmp_path, "labels.budgt=-1", "x", "labels.seed=z")
    assert first == "recipe r.yaml: 9 errors"
    assert faults == [
        "  line 5: models.teacher: input should be a valid string or input should be a valid dictionary (given: 5)",
        "  line 6: models.dtype: input should be 'float32' or 'bfloat16' (given: 'bfloat'); did you mean bfloat16?",
        "  line 9: unknown field data.evals.test.colums; did you mean columns?",
        "  line 11: stages.teacher_rl.objective: input should be 'grpo', 'opd', 'mixed', 'forward_kl', 'sft', 'constant', "
        "or package.module:function (given: 'grop'); did you mean grpo?",
        "  line 12: unknown field stages.warmup.learning_rate; did you mean stages.warmup.optim.lr?",
        "  line 17: unknown field stages.opd.optim.lrr; did you mean lr?",
        "  --set labels.budgt=-1: unknown field labels.budgt; did you mean budget?",
        "  --set labels.seed=z: labels.seed: input should be a valid integer, unable to parse string as an integer (given: 'z')",
        "  --set x: write it as path=value, such as stages.opd.steps=5",
    ]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "prompt.teacher.template={problem}",
            "input should be a valid string, but YAML reads what begins with { as a mapping: put the text in double quotes "
            "(--set 'FIELD=\"{…}\"')",
        ),
        (
            "prompt.system=[INST]",
            "input should be a valid string, but YAML reads what begins with [ as a list: put the text in double quotes "
            "(--set 'FIELD=\"[…]\"')",
        ),
        ("guards.truncation.bound=7", "input should be less than or equal to 1 (given: 7)"),
    ],
)
def test_refused_value_says_how_to_write_it(setting: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as refused:
        find_recipe("pocket", [setting])
    assert str(refused.value) == f"--set {setting}: {setting.partition('=')[0]}: {sentence}"


def test_single_fault_is_one_line_with_place(tmp_path: Path) -> None:
    right = FAULTY.replace("teacher: 5", "teacher: t").replace("bfloat", "bfloat16").replace(", colums: {}", "")
    right = right.replace("grop", "grpo").replace(", learning_rate: 1", "")
    assert faults_of(right, tmp_path) == [
        "recipe r.yaml, line 17: unknown field stages.opd.optim.lrr; did you mean lr?"
    ]
    right = right.replace("lrr: 5", "lr: 5")
    assert faults_of(right, tmp_path, "seed=x")[0].startswith("--set seed=x: seed: input should be a valid integer")
    missing = faults_of(right.replace("  student: pocket:a\n", ""), tmp_path)
    assert missing == ["recipe r.yaml, line 3: models.student: field required"]


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ("data: {train: x.jsonl}", "unknown field data.train; did you mean labeled?"),
        ("data: {labeled: x.jsonl, test: y.jsonl}", "unknown field data.test; did you mean evals?"),
        ("data: {prompts: x.jsonl}", "unknown field data.prompts; did you mean unlabeled?"),
        (
            "",
            "data: field required, such as {labeled: train.jsonl} (problems with answers) or {unlabeled: prompts.jsonl}",
        ),
        ("", "`headwater init mine --student S --teacher T --data FILE` writes a whole recipe"),
    ],
)
def test_missing_or_misnamed_data_has_hint(data: str, hint: str, tmp_path: Path) -> None:
    recipe = f"task: maths\nmodels: {{student: a}}\n{data}\nstages: {{student_rl: {{steps: 1}}}}\n"
    assert any(hint in line for line in faults_of(recipe, tmp_path))


def test_union_fault_names_deepest_field(tmp_path: Path) -> None:
    faults = faults_of(FAULTY.replace("teacher: 5", 'teacher: {"a/b": x}'), tmp_path)
    assert faults[1].startswith("  line 5: models.teacher.a/b: string should match pattern")
    assert not any("dict" in line or "constrained" in line for line in faults)


def test_merged_mapping_fault_has_line(tmp_path: Path) -> None:
    text = FAULTY.replace("warmup: {objective: forward_kl, epochs: 1, learning_rate: 1}", "warmup: {<<: *x, epochs: 1}")
    text = text.replace("stages:\n", "stages:\n  # a comment\n").replace("grop, steps: 3}", "grop, steps: 3}")
    text = text.replace("  teacher_rl: {", "  teacher_rl: &x {")
    assert any(line.startswith("  line 13: stages.warmup.objective: ") for line in faults_of(text, tmp_path))


@pytest.mark.parametrize(
    ("given", "known", "suggestion"),
    [
        ("brigde", ["bridge", "replay"], "; did you mean bridge?"),
        ("maths2", ["sums", "maths"], "; did you mean maths?"),
        ("ppo", ["sums", "maths"], ""),
    ],
)
def test_did_you_mean_names_closest_or_nothing(given: str, known: list[str], suggestion: str) -> None:
    assert did_you_mean(given, known) == suggestion


def test_misspelt_recipe_name_gets_suggestion() -> None:
    with pytest.raises(UserError, match=r"; did you mean pocket\?$"):
        find_recipe("poket", [])
