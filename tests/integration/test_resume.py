"""Resume after kills, interrupts and damage, bit for bit."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from forked_runs import ProcessResult, warm_runs
from headwater.runs.executors import base as executor
from headwater.storage.node_dir import NodeDir
from headwater.training import conditions
from runs import (
    WHOLE_ARM,
    CommandResult,
    assert_same,
    infos,
    node,
    nodes,
    rows,
    sets,
    temporary,
    tiny,
)

# Every kind of node; checkpoints between and at the ends, evaluations on the way; one stage long enough to be hit midway.
CHANGES = (
    *(f"stages.{stage}.checkpoint_every=2" for stage in ("teacher_rl", "warmup", "opd", "student_rl")),
    "stages.teacher_rl.steps=3",
    "stages.warmup.steps=5",
    "stages.student_rl.steps=5",
    "stages.student_rl.eval_every=2",
    "stages.student_rl.sparse.kl_coef=0.01",
    "stages.opd.steps=8",
    "data.evals.more.generate={pool: eval, count: 3, seed: 1}",
)


def go(out: Path) -> CommandResult:
    return tiny("run", out, changes=CHANGES)


@cache
def counted() -> tuple[Path, int]:
    """A run that nothing disturbed, and how many times it synced a file to disk."""
    out, synced = temporary() / "whole", []
    with mock.patch("os.fsync", synced.append):
        assert go(out).code == 0
    return out, len(synced)


def uninterrupted() -> Path:
    return counted()[0]


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(uninterrupted(), folder / "out"))


class Killed(BaseException):
    """What stands for a kill in this process: nothing in the program expects it."""


def killed_at(count: int, what: Callable[..., Any]) -> Callable[..., Any]:
    """`what`, until its call number `count`, which ends everything."""
    calls = iter(range(1, count + 1))

    def call(*args: Any, **more: Any) -> Any:
        if next(calls, count) == count:
            raise Killed
        return what(*args, **more)

    return call


# Every durable write syncs, so a kill at one of them is a kill between any two things that a run writes.
def test_run_killed_at_any_write_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Five kills of one run, which each resume the last one, at these shares of all writes."""
    out, (whole, synced) = tmp_path / "out", counted()
    for share in (0.1, 0.3, 0.3, 0.2, 0.07):
        with mock.patch("os.fsync", killed_at(int(share * synced), lambda number: None)), pytest.raises(Killed):
            go(out)
    assert go(out).code == 0
    assert_same(out, whole)


def test_run_killed_within_stage_resumes_bit_for_bit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert start(out, f"step.begun:{BEFORE_OPD + 4}=kill").code == -signal.SIGKILL
    opd = next((out / "nodes").glob("opd.*"))
    assert len(rows(opd / "metrics.jsonl")) == 3
    assert not (opd / "DONE").exists() and not (opd / "model").exists()
    assert go(out).code == 0
    assert_same(out, uninterrupted())


def test_interrupted_run_exits_130_with_resume_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = start(out, f"step.begun:{BEFORE_OPD + 5}=int")
    message = ended.err
    assert ended.code == 130
    assert "stopping after this step, with a checkpoint" in message
    assert f"headwater: interrupted; the same command with --out {out} resumes" in message
    assert "Traceback" not in message
    opd = next((out / "nodes").glob("opd.*"))
    done = len(rows(opd / "metrics.jsonl"))
    assert done == 5 and (opd / "checkpoint" / f"{done:06d}" / "sums.json").exists()  # also where none was due
    assert go(out).code == 0
    assert_same(out, uninterrupted())


def interrupting(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`function`, whose call number `count` comes with a SIGINT."""
    calls = iter(range(1, count + 1))

    def call(*args: Any, **more: Any) -> Any:
        if next(calls, None) == count:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **more)

    return call


def test_interrupt_while_measuring_keeps_step_and_resumes_exactly(tmp_path: Path) -> None:
    """In condition C2 after the warm-up's last step (the student scores twice per measurement), then in an evaluation of stage 3."""
    out, scored = tmp_path / "out", "headwater.training.conditions.hidden_of"
    with mock.patch(scored, interrupting(conditions.hidden_of, 3)):
        ended = go(out)
    assert ended.code == 130 and f"interrupted; the same command with --out {out} resumes" in ended.err
    warmup = next((out / "nodes").glob("warmup.*"))
    assert [row["step"] for row in rows(warmup / "conditions.jsonl")] == [0]
    assert len(rows(warmup / "metrics.jsonl")) == 5 and (warmup / "checkpoint/000005/sums.json").exists()
    with mock.patch.object(NodeDir, "has_kept", interrupting(NodeDir.has_kept, 1)):
        assert go(out).code == 130
    student = next((out / "nodes").glob("student_rl.*"))
    assert (student / "checkpoint/000002/sums.json").exists() and not (student / "evals").exists()
    assert go(out).code == 0
    assert_same(out, uninterrupted())


BEFORE_OPD = 3 + 5
"""Steps of teacher RL and of warm-up."""


def start(out: Path, fault: str) -> ProcessResult:
    """The same run as a process of its own."""
    return warm_runs().run("run", "pocket", *WHOLE_ARM, "--out", out, *sets(*CHANGES), fault=fault)


@pytest.mark.usefixtures("undrawn")
def test_finished_run_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "raw_teacher", whole=True).code == 0
    before = {path: path.stat().st_mtime_ns for path in (out / "nodes").rglob("*")}
    wrote = {name: (out / name).read_bytes() for name in ("report.json", "report.html", "ledger.jsonl", "plan.json")}

    def run_node(*_: Any) -> None:
        raise AssertionError("a finished node ran again")

    monkeypatch.setattr(executor, "run_node", run_node)
    assert tiny("run", out, "--arm", "raw_teacher", whole=True).code == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "nodes").rglob("*")} == before
    assert {name: (out / name).read_bytes() for name in wrote} == wrote


def test_resume_skips_damaged_checkpoint(tmp_path: Path) -> None:
    out = copied(tmp_path)
    for path in nodes(out, "bridge_rl"):
        (path / "DONE").unlink()
        newest = max((path / "checkpoint").iterdir(), default=None) if (path / "checkpoint").exists() else None
        if newest is not None:
            weights = newest / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert go(out).code == 0
    assert_same(out, uninterrupted())


def test_node_killed_before_its_done_file_is_charged_once(tmp_path: Path) -> None:
    out = copied(tmp_path)
    for path, _ in infos(out):
        (path / "DONE").unlink()
    assert go(out).code == 0
    assert_same(out, uninterrupted())


def test_truncated_log_line_is_rewritten_on_resume(tmp_path: Path) -> None:
    out = copied(tmp_path)
    opd = node(out, "bridge_rl", "opd")
    (opd / "DONE").unlink()
    shutil.rmtree(opd / "checkpoint" / "000008")
    for name in ("metrics.jsonl", "ledger.jsonl"):
        text = (opd / name).read_text(encoding="utf-8")
        (opd / name).write_text(text[: len(text) * 7 // 8 - 20], encoding="utf-8")  # no new line at its end
    assert go(out).code == 0
    assert_same(out, uninterrupted())


def test_stage_keeps_at_most_two_checkpoints() -> None:
    for path, info in infos(uninterrupted()):
        if info["kind"] == "train":
            kept = sorted(int(file.name) for file in (path / "checkpoint").iterdir())
            assert kept == {"teacher_rl": [2, 3], "warmup": [4, 5], "opd": [6, 8], "student_rl": [4, 5]}[info["stage"]]


@pytest.mark.parametrize("point", ["node.done", "node.cleaning"])
def test_finished_stage_loses_checkpoints_also_after_kill(point: str, tmp_path: Path) -> None:
    out, changes = tmp_path / "out", ("compute.keep_checkpoints=false", "stages.student_rl.checkpoint_every=1")
    words = ("run", "pocket", "--arm", "direct_grpo", "--out", out, *sets(*changes))
    count = 3 if point == "node.done" else 1  # two base models are nodes without checkpoints
    assert warm_runs().run(*words, fault=f"{point}:{count}=kill").code == -signal.SIGKILL
    folder = next((out / "nodes").glob("student_rl.*"))
    assert list(folder.glob("*checkpoint*")) and (folder / "DONE").exists()
    assert tiny("run", out, "--arm", "direct_grpo", changes=changes).code == 0
    assert not list(folder.glob("*checkpoint*")) and (folder / "model/model.safetensors").exists()
    # A damaged model is trained again, to the same weights, without a checkpoint to begin from.
    weights = (folder / "model/model.safetensors").read_bytes()
    (folder / "model/model.safetensors").write_bytes(b"damaged")
    assert tiny("run", out, "--arm", "direct_grpo", changes=changes).code == 0
    assert (folder / "model/model.safetensors").read_bytes() == weights
    assert len(rows(folder / "metrics.jsonl")) == 2
