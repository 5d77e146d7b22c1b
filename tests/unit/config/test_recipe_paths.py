"""Relative paths of a recipe: beside its file, else in the working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.config.builtin import find_recipe
from headwater.config.recipe import Recipe, read_recipe
from headwater.errors import UserError

RECIPE = """
task: maths
models: {student: student, teacher: {a: pocket:qwen3-teacher, b: "http://localhost:8000/v1"}}
data: {labeled: train.jsonl, unlabeled: {path: here.jsonl, split: train}, evals: {test: {path: train.jsonl, limit: 2}}}
stages: {opd: {steps: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """configs/my.yaml with train.jsonl and a folder student beside it, and train.jsonl and here.jsonl in the working directory."""
    monkeypatch.chdir(tmp_path)
    configs = Path("configs")
    (configs / "student").mkdir(parents=True)
    for path in (configs / "train.jsonl", Path("train.jsonl"), Path("here.jsonl")):
        path.touch()
    (configs / "my.yaml").write_text(RECIPE)
    return configs / "my.yaml"


def paths(recipe: Recipe) -> list[str | None]:
    data = recipe.data
    assert data.labeled and data.unlabeled
    return [recipe.models.student, data.labeled.path, data.unlabeled.path, data.evals["test"].path]


def test_path_beside_recipe_precedes_path_in_working_directory(recipe: Path, tmp_path: Path) -> None:
    read = read_recipe(recipe)
    assert paths(read) == ["configs/student", "configs/train.jsonl", "here.jsonl", "configs/train.jsonl"]
    assert read.models.teacher == {"a": "pocket:qwen3-teacher", "b": "http://localhost:8000/v1"}
    absolute = [str(tmp_path / name) for name in ("configs/student", "configs/train.jsonl")]
    assert paths(read_recipe(recipe.absolute()))[:2] == absolute


def test_recipe_in_working_directory_keeps_its_paths(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    assert paths(read_recipe(Path("my.yaml"))) == ["student", "train.jsonl", "here.jsonl", "train.jsonl"]


def test_path_of_set_option_is_in_working_directory(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("labeled: train.jsonl", "labeled: gone.jsonl"))
    assert paths(find_recipe(str(recipe), ["data.labeled=train.jsonl"]))[1] == "train.jsonl"


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("labeled: train.jsonl", "labeled: gone.jsonl", "data.labeled: gone.jsonl"),
        ("path: here.jsonl", "path: sub/gone.csv.gz", "data.unlabeled: sub/gone.csv.gz"),
        ("student: student", "student: ./models/s", "models.student: ./models/s"),
    ],
)
def test_path_in_neither_folder_is_refused_with_both(recipe: Path, old: str, new: str, field: str) -> None:
    recipe.write_text(RECIPE.replace(old, new))
    here = Path.cwd()
    with pytest.raises(UserError) as refusal:
        find_recipe(str(recipe), [])
    assert str(refusal.value) == (
        f"{field}: no such file or folder, neither in the recipe's folder {here / 'configs'} nor in the working directory {here}"
    )


def test_misspelt_path_suggests_file_of_either_folder(recipe: Path) -> None:
    for old, new, suggestion in (
        ("labeled: train.jsonl", "labeled: trian.jsonl", "train.jsonl"),
        ("path: here.jsonl", "path: hera.jsonl", "here.jsonl"),
    ):
        recipe.write_text(RECIPE.replace(old, new))
        with pytest.raises(UserError, match=rf"; did you mean {suggestion}\?$"):
            find_recipe(str(recipe), [])


def test_missing_file_with_limit_and_hub_id_are_left_for_later(recipe: Path) -> None:
    recipe.write_text(
        RECIPE.replace("labeled: train.jsonl", "labeled: {path: gone.jsonl, limit: 9}").replace("here.jsonl", "a/b-1.5")
    )
    assert paths(find_recipe(str(recipe), []))[1:3] == ["gone.jsonl", "a/b-1.5"]
