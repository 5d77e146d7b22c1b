"""Weights in parts, and a study within a time limit: with the pocket models in the place of real ones."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import runs
from forked_study import is_alive, start
from headwater.config.builtin import builtin_text
from headwater.storage.run_dir import RunDir
from headwater.tasks import sums
from tools import gpu_study, parts

SMALL = (
    "task=sums", 'prompt.template="{problem}"', "models.lora=null", "models.dtype=float32", "models.gradient_checkpointing=false",
    "labels.budget=16", "evaluate.samples=1", "evaluate.sampling={max_tokens: 16}", "guards.no_signal=continue",
    *(
        f"stages.{stage}.{field}"
        for stage in ("teacher_rl", "warmup", "opd", "student_rl")
        for field in ("batch_size=8", "group_size=4", "sampling.max_tokens=16", "steps=2")
    ),
    "compute.threads=1", "compute.device=cpu", "compute.workers=1", "conditions.problems=0",
)  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, pocket_folder: Path) -> Path:
    """Models as parts, and two files of problems."""
    for role in ("student", "teacher"):
        parts.split_folder(pocket_folder / f"qwen3-{role}", tmp_path / role, 100_000)
    for name, pool, count in (("train", "train", 40), ("test", "eval", 6)):
        rows = [{"question": text, "answer": gold} for text, gold in sums.generate(count, pool, 0)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def options(folder: Path, minutes: float) -> list[str]:
    given = {
        "student": folder / "student", "teacher": folder / "teacher", "labeled": folder / "train.jsonl",
        "evaluation": folder / "test.jsonl", "out": folder / "run", "minutes": minutes, "arms": "direct_grpo,bridge",
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*words, *(word for change in SMALL for word in ("--set", change))]


class ForkedProgram:
    """Stands for `subprocess.Popen` of the program, whose start takes longer than these studies."""

    def __init__(self, command: list[str]) -> None:
        assert command[:3] == [sys.executable, "-m", "headwater"]
        self.process = start(runs.temporary() / "process", *command[3:], whole=True, undrawn=True)

    def __enter__(self) -> ForkedProgram:
        return self

    def __exit__(self, *_: object) -> None:
        assert not is_alive(self.process.pid)

    def wait(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.process.poll()) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("headwater", seconds)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        self.process.kill(number)


def test_study_stops_at_time_limit_and_same_command_resumes(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked = SimpleNamespace(Popen=ForkedProgram, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu_study, "subprocess", forked)
    stopped = runs.call(*options(files, 0.0), entry=gpu_study.main)
    assert stopped.code == gpu_study.TIME_IS_UP, stopped.err
    assert "the same command resumes" in stopped.out
    finished = runs.call(*options(files, 10.0), entry=gpu_study.main)
    assert finished.code == 0, finished.err
    accuracy = json.loads(RunDir(files / "run").report_json.read_text())["arms"]["bridge"]["accuracy"]["gsm8k"]
    assert f"bridge gsm8k {100 * accuracy['mean']:.1f} % [" in finished.out
    assert {"direct_grpo", "bridge"} <= {line.split()[0] for line in finished.out.splitlines()}


def test_failed_study_ends_with_its_exit_code_named(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (files / "train.jsonl").unlink()
    result = runs.call(*options(files, 10.0), entry=gpu_study.main)
    assert result.code != 0 and "headwater study ended with exit code 2" in result.err
    assert "train.jsonl" in capfd.readouterr().err


def test_joined_folder_equals_split_one_and_damage_is_named(pocket_folder: Path, tmp_path: Path) -> None:
    source, stored = pocket_folder / "qwen3-student", tmp_path / "parts"
    names = parts.split_folder(source, stored, 100_000)
    assert len(names) > len(list(source.iterdir())) and all((stored / name).stat().st_size <= 100_000 for name in names)
    parts.join_folder(stored, tmp_path / "joined")
    assert {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()} == {
        path.name: path.read_bytes() for path in (tmp_path / "joined").iterdir()
    }
    (stored / names[0]).unlink()
    block = bytearray((stored / names[2]).read_bytes())
    block[0] ^= 1
    (stored / names[2]).write_bytes(bytes(block))
    result = runs.call("join", stored, tmp_path / "again", entry=parts.main)
    assert result.code == 2 and f"2 parts are missing or damaged: {names[0]}, {names[2]}" in result.err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "manifest", ["{", "[]", '{"../x": []}', '{"x": [{"part": "../y", "sha256": ""}]}', '{"x": [{}]}']
)
def test_bad_manifest_is_refused(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    result = runs.call("join", tmp_path, tmp_path / "out", entry=parts.main)
    assert result.code == 2 and "manifest.json" in result.err and not (tmp_path / "out").exists()


def test_recipe_of_gpu_study_names_its_evaluation() -> None:
    """The command sets `data.evals.gsm8k.path`."""
    assert "\n    gsm8k: {path: " in builtin_text("gsm8k-qwen2.5")
