"""A chat template that reads the clock: the day of a run's first start is recorded and kept."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwater.runs import setup
from headwater.storage.run_dir import RunDir
from runs import call, load_json, node_names, rows, sets, tiny
from tiny import tiny_folder
from tools.pretrain.pocket import make_tokenizer

DATED = "{{ '<|user|>' + strftime_now('%Y%m%d%H%M%S') + '+' + messages[-1].content + '<|assistant|>' }}"
FIRST, SECOND = datetime.date(2024, 2, 29), datetime.date(2024, 3, 1)


@pytest.fixture
def start_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime.date], None]:
    """Set the date on which runs start."""

    def start_on(today: datetime.date) -> None:
        class Fixed(datetime.date):
            @classmethod
            def today(cls) -> Any:
                return today

        monkeypatch.setattr(setup, "date", Fixed)

    return start_on


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "dated")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    return folder


def weights(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(out.glob("nodes/*/model/model.safetensors"))]


def changes(model: Path) -> list[str]:
    return [f"models.student={model}", f"models.teacher={model}", "conditions.problems=0"]


def test_resume_and_reuse_keep_first_prompt_day(
    tmp_path: Path, model: Path, start_on: Callable[[datetime.date], None]
) -> None:
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    arm = ("--arm", "direct_grpo")
    start_on(FIRST)
    assert tiny("run", first, *arm, changes=changes(model)).code == 0
    assert load_json(first / "day.json") == {"day": "2024-02-29"}
    node = first / "nodes" / node_names(first, "direct_grpo")[-1]
    trained, sampled = weights(first), rows(node / "rollouts" / "000002.jsonl")
    start_on(SECOND)
    (node / "DONE").unlink()
    shutil.rmtree(node / "model")
    shutil.rmtree(node / "checkpoint")
    assert tiny("run", first, *arm, changes=changes(model)).code == 0  # computes the node again, on the first day
    assert weights(first) == trained and rows(node / "rollouts" / "000002.jsonl") == sampled
    assert tiny("run", again, *arm, "--reuse", first, changes=changes(model)).code == 0
    assert load_json(again / "day.json") == {"day": "2024-02-29"} and node_names(again, "direct_grpo") == [node.name]
    dry = call("run", "pocket", *sets(*changes(model)), *arm, "--out", other, "--dry-run")
    assert dry.code == 0 and not other.exists()
    assert tiny("run", other, *arm, changes=changes(model)).code == 0
    assert load_json(other / "day.json") == {"day": "2024-03-01"}
    (name,) = node_names(other, "direct_grpo")
    assert name != node.name and rows(other / "nodes" / name / "rollouts" / "000002.jsonl") != sampled


def test_folder_without_recorded_day_resumes(
    tmp_path: Path, model: Path, start_on: Callable[[datetime.date], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as earlier:
        earlier.setattr("headwater.runs.inputs.reads_clock", lambda tokenizer: False)
        assert tiny("run", out, "--arm", "direct_grpo", changes=changes(model)).code == 0
    assert not RunDir(out).day.exists()
    names, trained = node_names(out, "direct_grpo"), weights(out)
    start_on(SECOND)
    assert tiny("run", out, "--arm", "direct_grpo", changes=changes(model)).code == 0
    assert node_names(out, "direct_grpo") == names and weights(out) == trained and not RunDir(out).day.exists()
    (out / "day.json").write_text('{"day": 3}', encoding="utf-8")
    refused = tiny("run", out, "--arm", "direct_grpo", changes=changes(model))
    assert refused.code == 2 and "day.json: is not" in refused.err
