"""Command lines that cannot be parsed, and names that are no recipe: one sentence that says what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import call


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("run", "run: missing argument 'RECIPE': A YAML file, or a built-in recipe: desk, "),
        ("distill a b", "distill: missing option '--prompts': File, folder or hub id of prompts; no answers needed; for example: "),
        ("validate x.jsonl --set a=1", "validate: no such option: --set, which belongs to run, study, sweep, distill, grpo, doctor"),
        ("run pocket --dryrun", "run: no such option: --dryrun (Possible options: --dry-run); `headwater run --help` lists"),
        ("rn pocket", "no such command 'rn'. Did you mean 'run'; `headwater --help` lists the commands"),
        ("audit runs/my", "no such command 'audit'; did you mean `headwater report --audit`; `headwater --help` lists the commands"),
        ("validate my.yaml", "validate my.yaml: reads a file of problems; `headwater doctor my.yaml` checks a recipe"),
        ("explain stages.opd.optm.lr", "explain stages.opd.optm.lr: no such field; did you mean stages.opd.optim.lr? The sections"),
        ("explain poetry", "explain poetry: no such field; the sections are name, seed, "),
        ("run folder", "recipe folder: is a folder; name a recipe's file, such as folder/mine.yaml"),
        ("run folder/mime.yaml", "recipe folder/mime.yaml: no such file in HERE/folder; did you mean folder/mine.yaml?"),
        ("run nothing.yaml", "recipe nothing.yaml: no such file in HERE; `headwater init` prints one to start from"),
    ],
)  # fmt: skip
def test_wrong_command_line_is_one_sentence(
    line: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/mine.yaml").touch()
    result = call(*line.split())
    assert (result.code, result.out, len(result.complaints)) == (2, "", 1)
    assert result.err.startswith(f"headwater: {sentence.replace('HERE', str(tmp_path))}")


def test_program_without_arguments_prints_help() -> None:
    result = call()
    assert result.code == 0 and "Usage: headwater [OPTIONS] COMMAND" in result.out and " doctor " in result.out


def test_run_directory_as_recipe_names_its_recipe(tmp_path: Path) -> None:
    for name in ("env.json", "recipe.json", "report.json"):
        (tmp_path / name).touch()
    assert f"is a folder; name a recipe's file, such as {tmp_path / 'recipe.json'}" in call("run", tmp_path).err
