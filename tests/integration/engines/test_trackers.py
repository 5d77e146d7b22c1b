"""Weights & Biases (offline) and Trackio receive the metrics of real runs, each in its own process."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runs import node, rows, sets, spawn

pytestmark = pytest.mark.engines
CHANGES = ("conditions.problems=0",)


def needs(tracker: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(tracker) is None
    return pytest.mark.skipif(missing, reason=f"{tracker} is not installed here: `make test-engines` runs this")


def run_with(out: Path, tracker: str, *words: str) -> None:
    """A run or study as a process of its own, as trackers expect it."""
    result = spawn(*words, "--out", out, "--track", tracker, "--json", *sets(*CHANGES), timeout=240)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)  # a tracker's own words are not among the program's answers


def metrics(out: Path, arm: str, stage: str) -> tuple[str, list[dict[str, Any]]]:
    """A node's name and what it wrote down of its steps."""
    folder = node(out, arm, stage)
    return folder.name, rows(folder / "metrics.jsonl")


@needs("wandb")
def test_wandb_offline_run_has_metrics_of_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run_with(tmp_path / "run", "wandb", "run", "pocket", "--arm", "direct_grpo")
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    name, written = metrics(tmp_path / "run", "direct_grpo", "student_rl")
    history = steps_of(kept)
    assert len(history) == len(written) == 2
    for logged, row in zip(history, written, strict=True):
        assert {key: logged[f"{name}/{key}"] for key in row} == pytest.approx(row)


def steps_of(path: Path) -> list[dict[str, float]]:
    """The history of an offline run: a log of blocks of 32 KiB in the form of LevelDB's, with a protocol buffer in each record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, history = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            record, whole = Record.FromString(whole), b""
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history += [items] if items else []
    return history


@needs("trackio")
def test_trackio_keeps_one_run_with_every_step_across_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run_with(tmp_path / "run", "trackio", "run", "pocket", "--arm", "direct_grpo")
    run_with(tmp_path / "run", "trackio", "study", "pocket", "--arms", "direct_grpo,opd_only")
    assert asked_of_trackio("list", "runs", "--project", "headwater")["runs"] == ["run"]
    for arm, stage, key in (("direct_grpo", "student_rl", "reward"), ("opd_only", "opd", "loss")):
        name, written = metrics(tmp_path / "run", arm, stage)
        words = ("get", "metric", "--project", "headwater", "--run", "run", "--metric", f"{name}/{key}")
        values = [value["value"] for value in asked_of_trackio(*words)["values"]]
        assert values == [pytest.approx(row[key]) for row in written]


def asked_of_trackio(*words: str) -> Any:
    """What its own program says of what it keeps."""
    command = [sys.executable, "-m", "trackio.cli", *words, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)
