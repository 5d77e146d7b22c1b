"""Terminal escapes in every printed field: none reaches the terminal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fake_runs import shared_run
from headwater.config.builtin import builtin_text
from headwater.errors import printable
from runs import CommandResult, call
from tiny import tiny_folder

ESCAPE = "\x1b]0;t\x07\x1b[2J\x9b1m\u202e"


def quiet(result: CommandResult) -> str:
    """What a command printed, which must hold no control character."""
    text = result.out + result.err
    assert printable(text) == text
    return text


def pocket(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    raw = yaml.safe_load(builtin_text("pocket"))
    change(raw)
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=False), encoding="utf-8")
    return path


RECIPES: dict[str, Callable[[dict[str, Any]], object]] = {
    "name": lambda raw: raw.update(name=ESCAPE),
    "field": lambda raw: raw.update({ESCAPE: 1}),
    "value": lambda raw: raw.update(task=ESCAPE),
    "number": lambda raw: raw.update(seed=ESCAPE),
    "model": lambda raw: raw["models"].update(student=ESCAPE),
    "data": lambda raw: raw["data"].update(labeled=ESCAPE),
    "evaluation": lambda raw: raw["data"]["evals"].update({ESCAPE: {"path": "x"}}),
    "stage": lambda raw: raw["stages"].update({ESCAPE: {}}),
    "server": lambda raw: raw["models"].update(teacher=f"http://127.0.0.1:9/{ESCAPE}"),
}


@pytest.mark.parametrize("field", RECIPES)
def test_recipe_fields_reach_terminal_without_control_characters(field: str, tmp_path: Path) -> None:
    changed = pocket(tmp_path, lambda raw: (raw.update(compute={"server": {"retries": 0}}), RECIPES[field](raw)))
    result = call("run", changed, "--arm", "direct_grpo", "--dry-run")
    assert result.code == 2 and quiet(result)


@pytest.mark.parametrize(
    "row",
    [
        {"problem": ESCAPE, "answer": ESCAPE},
        {"problem": "1+1", "answer": ESCAPE, "id": ESCAPE},
        {ESCAPE: "1+1", "answer": "2"},
        {"problem": "1+1", "answer": {"a": ESCAPE}},
        {"problem": [{"role": ESCAPE, "content": "x"}], "answer": "2"},
    ],
)
def test_data_cells_and_columns_reach_terminal_without_control_characters(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    assert quiet(call("validate", path, "--task", "maths"))


def test_warnings_reach_terminal_without_control_characters(tmp_path: Path) -> None:
    path = tmp_path / f"d{ESCAPE}.jsonl"
    rows = [{"problem": "Who?", "answer": str(n), "passage": f"a long passage {n} " * 5} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "'passage' holds text" in quiet(call("validate", path, "--task", "exact"))


def test_grade_escapes_control_characters_within_json(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"id": f"é{ESCAPE}", "gold": "1", "completion": ESCAPE}) + "\n", encoding="utf-8")
    result = call("grade", "--data", path)
    assert json.loads(quiet(result))["id"] == f"é{ESCAPE}" and "é" in result.out


@pytest.mark.parametrize("part", ["template", "model_type", "token", "config key"])
def test_model_folder_reaches_terminal_without_control_characters(part: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / f"m{ESCAPE}")
    if part == "template":
        (folder / "chat_template.jinja").write_text("{{ raise_exception('" + ESCAPE + "') }}", encoding="utf-8")
    else:
        name = "tokenizer.json" if part == "token" else "config.json"
        value = json.loads((folder / name).read_text(encoding="utf-8"))
        if part == "token":
            value["added_tokens"][0]["content"] = ESCAPE
            value["model"]["vocab"][ESCAPE] = 10**9
        else:
            value["model_type" if part == "model_type" else "auto_map"] = ESCAPE
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    data = tmp_path / "d.jsonl"
    data.write_text('{"problem": "17+45", "answer": "62"}\n', encoding="utf-8")
    result = call("eval", folder, "--data", data, "--task", "sums", "--samples", "1", "--device", "cpu")
    assert result.code == 2 and quiet(result)


def with_escapes(value: Any, key: str = "") -> Any:
    """The value with an escape and rich's markup at the end of every text that is not a name of a file or arm."""
    if isinstance(value, dict):
        return {name: with_escapes(child, name) for name, child in value.items()}
    if isinstance(value, list):
        return [with_escapes(child, key) for child in value]
    printed = key in (
        "text",
        "completion",
        "reason",
        "guard",
        "metric",
        "sentence",
        "finish",
        "version",
        "stage",
        "name",
        "problem",
    )
    return f"{value}{ESCAPE}[/red]" if isinstance(value, str) and printed else value


def test_run_directory_reaches_terminal_without_control_characters(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(shared_run(), out)
    for path in [*out.rglob("*.json"), *out.rglob("*.jsonl"), *out.rglob("FAILED")]:
        lines = (
            path.read_text(encoding="utf-8").splitlines()
            if path.suffix == ".jsonl"
            else [path.read_text(encoding="utf-8")]
        )
        path.write_text("".join(json.dumps(with_escapes(json.loads(line))) + "\n" for line in lines), encoding="utf-8")
    codes = [call(*words) for words in (["report", out], ["watch", out, "--once"], ["report", out, "--audit"])]
    assert all(quiet(result) and result.code in (0, 2, 3) for result in codes)
