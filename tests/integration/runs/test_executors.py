"""Studies on several workers: same bits, isolated failures, dead workers, folder lock, reused nodes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from forked_study import RunningProcess, is_alive, start, wait_for_steps
from headwater.errors import TrainingStoppedError, UserError
from headwater.runs.executors import base as executor
from headwater.runs.node import Node
from headwater.storage.run_dir import RunDir
from runs import (
    assert_same,
    call,
    infos,
    load_json,
    node,
    rows,
    sets,
    temporary,
    tiny,
)  # fmt: skip

ARMS = "direct_grpo,raw_teacher"
LONG = ("stages.student_rl.steps=24", "stages.warmup.steps=24")  # two nodes side by side, long enough to be hit midway


@cache
def serial_study() -> Path:
    """An undisturbed study, in this process."""
    out = temporary() / "serial"
    result = tiny("study", out, "--arms", ARMS, "--workers", "1", changes=LONG)
    assert result.code == 0 and "nodes done" not in result.err, result.err
    return out


# Parallel nodes --------------------------------------------------------------------------------------------------------


def test_two_workers_equal_one_bitwise_and_report_study_progress(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = tiny("study", out, "--arms", ARMS, "--workers", "2", changes=LONG)
    assert result.code == 0, result.err
    assert_same(out, serial_study())
    lines = [line.split(" ", 1)[1] for line in result.err.splitlines() if " " in line]  # without the time of day
    ended = [line for line in lines if line.startswith("[") and "nodes done" in line]
    assert sorted(line.split("]")[0] for line in ended) == [f"[{number}/6" for number in range(1, 7)]  # a line a node
    assert [line.split("(")[-1].split(" nodes")[0] for line in ended] == [f"{done} of 6" for done in range(1, 7)]
    assert load_json(out / "recipe.json")["compute"]["workers"] == 2


# Failures -----------------------------------------------------------------------------------------------------------


def test_failed_node_skips_only_its_descendants_and_is_retried_by_next_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    mute = ["stages.teacher_rl.sampling.max_tokens=1", "stages.teacher_rl.steps=3", "guards.patience=2"]
    result = tiny("study", out, "--arms", "direct_grpo,bridge", changes=[*mute, "guards.no_signal=stop"])
    assert result.code == 4
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("headwater: study: 1 node failed: teacher_rl on all (seed 0): teacher_rl, step 2 of 3: ")
    assert last.endswith(
        "; not run because of it: teacher_rollouts on all (seed 0), warmup on all (seed 0), opd on all (seed 0)"
    )
    assert "direct_grpo" in result.out and "Traceback" not in result.err
    report = load_json(out / "report.json")
    assert report["arms"]["direct_grpo"]["accuracy"] and not report["arms"]["bridge"]["accuracy"]
    failed = next((out / "nodes").glob("teacher_rl.*/FAILED"))
    assert load_json(failed).keys() == {"sentence", "code"} and load_json(failed)["code"] == 4
    assert last.count(load_json(failed)["sentence"]) == 1
    assert {path.name.split(".")[0] for path, _ in infos(out)} == {
        "base_student", "base_teacher", "student_rl", "teacher_rl",
    }  # fmt: skip

    done = {path: path.stat().st_mtime_ns for path in out.glob("nodes/*/DONE")}
    result = tiny("study", out, "--arms", "direct_grpo,bridge", changes=[*mute, "guards.no_signal=continue"])
    assert result.code == 0, result.err
    assert not failed.exists() and load_json(out / "report.json")["arms"]["bridge"]["accuracy"]
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_failing_single_arm_ends_with_its_own_message(tmp_path: Path) -> None:
    mute = ["stages.student_rl.sampling.max_tokens=1", "guards.patience=2", "guards.no_signal=stop"]
    result = tiny("run", tmp_path / "out", "--arm", "direct_grpo", changes=mute)
    assert (result.code, result.out) == (4, "")
    assert result.err.strip().splitlines()[-1].startswith("headwater: student_rl, step 2 of 2: ")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("models.teacher: the file is damaged"), 2, "models.teacher: the file is damaged"),
        (TrainingStoppedError("the loss is not finite"), 4, "the loss is not finite"),
        (ZeroDivisionError("division\nby zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_node_error_is_written_to_failed_file_with_exit_code(
    error: Exception, code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_node = executor.run_node

    def broken(node: Node, place: Any) -> None:
        if node.stage == "warmup":
            raise error
        run_node(node, place)

    monkeypatch.setattr(executor, "run_node", broken)
    out = tmp_path / "out"
    result = tiny("study", out, "--arms", "warmup_only,opd_only", "--workers", "1")
    assert result.code == code
    mark = next((out / "nodes").glob("warmup.*/FAILED"))
    assert (load_json(mark)["sentence"], load_json(mark)["code"]) == (sentence, code)
    assert f"study: 1 node failed: warmup on all (seed 0): {sentence}" in result.err
    traced = isinstance(error, ZeroDivisionError)
    assert ("traceback" in load_json(mark)) == traced and (f"(traceback in {mark})" in result.err) == traced
    assert load_json(out / "report.json")["arms"]["opd_only"]["accuracy"]


# Dead workers and stop requests -------------------------------------------------------------------


def study(out: Path) -> tuple[str | Path, ...]:
    return ("study", "pocket", "--arms", ARMS, "--workers", "2", "--out", out, *sets(*LONG))


def workers_of(process: RunningProcess) -> list[int]:
    """Process ids of the workers that run."""
    workers = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
            if int(parent) == process.pid and state != "Z":
                workers.append(int(path.parent.name))
    return workers


def test_killed_worker_is_replaced_and_interrupted_study_resumes_bitwise(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(tmp_path / "process", *study(out))
    wait_for_steps(out, "student_rl", 2, process)
    for pid in workers_of(process)[:1]:
        os.kill(pid, signal.SIGKILL)
    while "resuming it in another process" not in process.err():
        assert process.poll() is None, process.err()
        time.sleep(0.005)
    assert "was killed by SIGKILL" in process.err()
    wait_for_steps(out, "warmup", 2, process)
    process.kill(signal.SIGINT)
    assert process.wait(60) == 130 and "Traceback" not in process.err()
    assert process.err().count("stopping after this step, with a checkpoint") == 1
    assert f"headwater: interrupted; the same command with --out {out} resumes" in process.err()
    for path in out.glob("nodes/*/metrics.jsonl"):
        # A worker that took over from the killed one may not have begun when it was asked to stop: then there is none.
        checkpoints = sorted((path.parent / "checkpoint").glob("[0-9]*"))
        assert not checkpoints or (
            checkpoints[-1].name == f"{len(rows(path)):06d}" and (checkpoints[-1] / "sums.json").exists()
        )
    assert not all((path / "DONE").exists() for path in out.glob("nodes/*"))
    assert tiny("study", out, "--arms", ARMS, "--workers", "1", changes=LONG).code == 0
    assert_same(out, serial_study())


def test_killed_study_leaves_no_worker_and_releases_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(tmp_path / "process", *study(out))
    wait_for_steps(out, "student_rl", 2, process)
    refused = tiny("study", out, "--arms", ARMS, changes=LONG)
    assert refused.code == 2
    assert refused.err.splitlines()[-1] == (
        f"headwater: --out {out}: another process is running there; wait until it ends, or use another folder"
    )
    pids = workers_of(process)
    assert len(pids) == 2
    process.kill()
    process.wait(10)
    deadline = time.monotonic() + 2
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with RunDir(out).locked():
        pass


# Reused nodes -----------------------------------------------------------------------------------------------------


def contents(out: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def refuse_to_run(node: Node, place: Any) -> None:
    raise AssertionError(f"{node.stage} ran again")


def test_reuse_takes_over_finished_nodes_with_their_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, other = tmp_path / "out", serial_study()
    before = contents(other)
    monkeypatch.setattr(executor, "run_node", refuse_to_run)
    result = tiny("run", out, "--arm", "raw_teacher", "--reuse", other, changes=LONG)
    assert result.code == 0, result.err
    assert f"reuse: 5 of 5 nodes taken over: 5 from {other}\n" in result.err
    ours, expected = load_json(out / "report.json"), load_json(other / "report.json")
    assert ours["arms"]["raw_teacher"] == expected["arms"]["raw_teacher"]
    names = {path.name for path, _ in infos(out)}
    assert rows(out / "ledger.jsonl") == [row for row in rows(other / "ledger.jsonl") if row["node"] in names]
    assert (node(out, "raw_teacher", "opd") / "DONE").samefile(node(other, "raw_teacher", "opd") / "DONE")
    assert contents(other) == before


def test_reuse_takes_equal_fingerprints_only_and_keeps_other_run_unchanged(tmp_path: Path) -> None:
    out, other, changes = tmp_path / "out", serial_study(), [*LONG, "stages.opd.steps=3"]
    before = contents(other)
    result = tiny("run", out, "--arm", "raw_teacher", "--reuse", other, changes=changes)
    assert result.code == 0, result.err
    assert f"reuse: 4 of 5 nodes taken over: 4 from {other}\n" in result.err
    assert len(rows(node(out, "raw_teacher", "opd") / "metrics.jsonl")) == 3
    for path, _ in infos(out):  # as if every node had to run again
        (path / "DONE").unlink()
    assert tiny("run", out, "--arm", "raw_teacher", changes=changes).code == 0
    assert contents(other) == before


def test_reuse_copies_nodes_if_hard_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: str, target: str) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(executor, "run_node", refuse_to_run)
    other = serial_study()
    assert tiny("run", tmp_path / "out", "--arm", "raw_teacher", "--reuse", other, changes=LONG).code == 0
    for path, info in infos(tmp_path / "out"):
        there = other / "nodes" / path.name
        assert not (path / "DONE").samefile(there / "DONE")
        files = set(contents(path))
        assert info["stage"] and files == set(contents(there))
        assert all((path / name).read_bytes() == (there / name).read_bytes() for name in files)


def test_reuse_refuses_folder_without_run_before_writing(tmp_path: Path) -> None:
    result = tiny("run", tmp_path / "out", "--reuse", tmp_path / "no")
    assert result.code == 2 and result.err == f"headwater: --reuse {tmp_path / 'no'}: holds no run of Headwater\n"
    assert not (tmp_path / "out").exists()


# One process per folder -------------------------------------------------------------------------------------------------


def test_locked_folder_can_be_reported_and_foreign_folder_gets_no_lock(tmp_path: Path) -> None:
    with RunDir(serial_study()).locked():
        assert call("report", serial_study(), "--out", tmp_path / "report").code == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    assert tiny("run", foreign).code == 2
    assert [path.name for path in foreign.iterdir()] == ["mine.txt"]


def test_crash_releases_folder_lock(tmp_path: Path) -> None:
    code = f"from pathlib import Path\nfrom headwater.storage.run_dir import RunDir\nwith RunDir(Path({str(tmp_path)!r})).locked():\n"
    holder = subprocess.Popen([sys.executable, "-c", f"{code}    print('held', flush=True); input()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another process is running"), RunDir(tmp_path).locked():
        pass
    holder.kill()
    holder.communicate()
    with RunDir(tmp_path).locked():
        assert json.dumps(os.listdir(tmp_path)) == '[".lock"]'
