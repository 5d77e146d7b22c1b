"""Fault injection: a run that is killed, out of disk space or damaged resumes bit for bit, or is refused in one sentence.

The fast part; `make chaos` runs the rest (test_chaos.py). `chaos.differing` compares every file by hash.
"""

from __future__ import annotations

import ast
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

import headwater
from chaos import differing, digests, small
from forked_runs import ProcessResult, warm_runs
from headwater.storage import fault_points
from headwater.storage.files import read_json, write_json
from runs import load_json, node, rows, temporary

KILLED = -signal.SIGKILL
pytestmark = pytest.mark.timeout(900)  # generous, for machines that share cores


def go(out: Path, fault: str | None = None, *changes: str) -> ProcessResult:
    return warm_runs().run(*small(out, *changes), fault=fault)


@cache
def undisturbed() -> tuple[Path, dict[str, int]]:
    """An undisturbed run, and its number of arrivals at each fault point, in the order of first arrivals."""
    out = temporary() / "whole"
    result = go(out)
    assert result.code == 0, result.err
    return out, result.arrivals


def whole() -> Path:
    return undisturbed()[0]


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(whole(), folder / "out"))


def points() -> list[str]:
    """Fault points of an undisturbed run, in the order of first arrivals."""
    return list(undisturbed()[1])


def run_with_fault_at_each(names: list[str], kind: str, folder: Path) -> Iterator[tuple[str, ProcessResult]]:
    """Yield runs with a fault at one point after the other; each resumes in the folder where the last one stopped.

    A run may finish because the work with its point is already done. Its folder must then equal the undisturbed one, and the
    point is tried in a new folder, where it must be reached.
    """
    number = 0
    for name in names:
        result = go(folder / str(number), f"{name}:1={kind}")
        if result.code == 0:
            assert differing(folder / str(number), whole()) == []
            number += 1
            result = go(folder / str(number), f"{name}:1={kind}")
        assert result.code != 0, f"{name} was not reached"
        yield name, result
    assert go(folder / str(number)).code == 0
    assert differing(folder / str(number), whole()) == []


def one_sentence(result: ProcessResult) -> str:
    """The error message of a run, which must be one line without a traceback."""
    assert "Traceback" not in result.err, result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("headwater: "), result.err
    return last.removeprefix("headwater: ")


# Fault points and comparison ------------------------------------------------------------------------------------------


def test_fault_points_table_lists_every_failpoint_in_source() -> None:
    points = [
        call.args[0].value
        for path in Path(headwater.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "fault_points.failpoint"
        and isinstance(call.args[0], ast.Constant)
    ]
    assert sorted(set(points)) == sorted(fault_points.POINTS) and len(fault_points.POINTS) >= 25
    assert fault_points.POINTS.keys() >= WRITES


WRITES = {name for name in fault_points.POINTS if name.split(".")[0] in ("file", "append", "folder")} - {
    "file.durable", "append.done", "folder.durable",
} | {"checkpoint.weights", "checkpoint.optimizer", "checkpoint.sums", "model.written", "cache.rollouts", "cache.written"}  # fmt: skip
"""Failpoints inside a write, where the disk can be full."""
NOT_REACHED = {"folder.moved", "node.cleaning", "cache.released"}
"""`folder.moved` needs an existing folder (`test_run_killed_while_replacing_folder_resumes_bit_for_bit`); the others are removals, and
this run keeps its checkpoints (test_resume.py and test_run_dir.py stop there)."""


def test_run_reaches_every_fault_point() -> None:
    assert set(points()) == set(fault_points.POINTS) - NOT_REACHED


def test_unarmed_failpoint_does_nothing_and_parse_fault_refuses_names() -> None:
    assert not fault_points.armed()
    fault_points.failpoint("step.begun")
    with pytest.raises(KeyError):
        fault_points.parse_fault("step.begunn:1=kill")
    with pytest.raises(KeyError):
        fault_points.parse_fault("step.begun:1=explode")
    fault = fault_points.parse_fault("step.begun:2=error")
    fault("step.begun")
    fault("step.ended")
    with pytest.raises(RuntimeError, match="injected fault"):
        fault("step.begun")


def test_environment_variable_arms_failpoint() -> None:
    code = "from headwater.storage.fault_points import failpoint; failpoint('step.begun'); failpoint('step.begun'); print('alive')"
    environment = {**os.environ, "HEADWATER_FAULT": "step.begun:2=kill", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert result.returncode == KILLED and result.stdout == b""


def test_resume_drops_old_checkpoints_of_killed_run(tmp_path: Path) -> None:
    """OPD has three checkpoints here, of which two remain; no further step would drop the first."""
    out, saved = tmp_path / "out", 7  # two of the teacher, two of the warm-up, then the third
    assert go(out, f"checkpoint.saved:{saved}=kill").code == KILLED
    assert len(list((node(out, "bridge_rl", "opd") / "checkpoint").glob("[0-9]*"))) == 3
    assert go(out).code == 0
    assert differing(out, whole()) == []


def flip(path: Path, share: float = 0.5, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(share * len(content)))] ^= 1 << bit
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["model/model.safetensors", "checkpoint/000003/optimizer.safetensors", "metrics.jsonl", "ledger.jsonl",
     "rollouts/000002.jsonl", "evals/final/sums.jsonl", "conditions.jsonl"],
)  # fmt: skip
def test_differing_detects_one_bit(name: str, tmp_path: Path) -> None:
    out = copied(tmp_path)
    assert differing(out, whole()) == []
    path = node(out, "bridge_rl", "opd") / name
    if path.suffix == ".safetensors":
        flip(path, 1.0)
    else:  # in the last digit of a number that is not a measured time
        key = {"metrics.jsonl": '"lr": ', "ledger.jsonl": '"flops": ', "conditions.jsonl": '"entropy_student": '}.get(
            name, '"tokens": '
        )
        text = path.read_text(encoding="utf-8")
        place = text.rindex(key) + len(key)
        path.write_text(text[:place] + str(int(text[place]) % 9 + 1) + text[place + 1 :], encoding="utf-8")
    assert differing(out, whole()) == [str(path.relative_to(out))]


def test_differing_detects_added_and_removed_files(tmp_path: Path) -> None:
    out = copied(tmp_path)
    (out / "nodes" / ".left.tmp").write_text("")
    (out / "labels.csv").unlink()
    assert differing(out, whole()) == ["labels.csv", "nodes/.left.tmp"]
    assert len(digests(whole())) > 100


# Kills ----------------------------------------------------------------------------------------------------------------


def test_run_killed_at_every_fault_point_resumes_bit_for_bit(tmp_path: Path) -> None:
    for name, result in run_with_fault_at_each(points(), "kill", tmp_path):
        assert result.code == KILLED, (name, result.err)


def test_run_killed_while_replacing_folder_resumes_bit_for_bit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert go(out, "model.saved:1=kill").code == KILLED  # the model's folder exists and will be written again
    for fault, code in (("folder.moved:1=full", 4), ("folder.moved:1=kill", KILLED), ("folder.renamed:1=kill", KILLED)):
        assert go(out, fault).code == code
    assert go(out).code == 0
    assert differing(out, whole()) == []


def test_run_killed_late_resumes_bit_for_bit(tmp_path: Path) -> None:
    """One run is killed in the second step of OPD, in the third, and at the first checkpoint of student RL."""
    out = tmp_path / "out"
    for fault in ("append.torn:40=kill", "update.stepped:2=kill", "checkpoint.begun:2=kill"):
        assert go(out, fault).code == KILLED, fault
    assert go(out).code == 0
    assert differing(out, whole()) == []


# Disks ----------------------------------------------------------------------------------------------------------------


def test_full_disk_at_every_write_exits_4_and_run_resumes(
    tmp_path: Path,
) -> None:
    for name, result in run_with_fault_at_each([name for name in points() if name in WRITES], "full", tmp_path):
        assert result.code == 4, (name, result.code, result.err)
        assert "no space left on device" in one_sentence(result) and str(tmp_path) in one_sentence(result), name


def test_read_only_file_system_exits_4_and_run_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for fault in ("file.begun:6=readonly", "append.begun:5=readonly", "folder.begun:2=readonly"):
        result = go(out, fault)
        assert result.code == 4 and "read-only file system" in one_sentence(result), fault
    assert go(out).code == 0
    assert differing(out, whole()) == []


def mount_tmpfs(folder: Path, size: str) -> bool:
    folder.mkdir()
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode
        == 0
    )


def test_full_tmpfs_exits_4_and_run_resumes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    if not mount_tmpfs(disk, "3m"):
        pytest.skip("needs the right to mount")
    try:
        for _ in range(2):
            result = go(disk / "out")
            assert result.code == 4 and "no space left on device" in one_sentence(result)
        subprocess.run(["mount", "-o", "remount,size=256m", disk], check=True)
        assert go(disk / "out").code == 0
        assert differing(disk / "out", whole()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_unwritable_output_folder_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    out = copied(tmp_path)
    before = digests(out)
    user = 65534 if os.getuid() == 0 else None  # root may write anywhere
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    for path in (out, *filter(Path.is_dir, out.rglob("*"))):
        path.chmod(0o555)
    (out / ".lock").chmod(0o444)
    try:
        result = warm_runs().run(*small(out), user=user)
        assert result.code == 2 and one_sentence(result) == f"--out {out}: cannot be written (Permission denied)"
        result = warm_runs().run(*small(out / "nodes" / "new"), user=user)
        assert result.code == 2 and "cannot be written (Permission denied)" in one_sentence(result)
    finally:
        for path in (out, *filter(Path.is_dir, out.rglob("*"))):
            path.chmod(0o755)
        (out / ".lock").chmod(0o644)
    assert digests(out) == before


# Signals, errors, other processes -------------------------------------------------------------------------------------


INTERRUPTS = (  # of one run after the other, which each resume the last one: point, stage there, whether it is unfinished then
    ("run.planned:1", "base_student", True), ("node.described:1", "base_student", True), ("evaluation.begun:3", "teacher_rl", True),
    ("node.described:2", "teacher_rollouts", True), ("step.begun:2", "warmup", True), ("report.begun:1", "student_rl", False),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["int", "term"])
def test_interrupted_runs_exit_130_and_resume_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Training stops after the current step, with a checkpoint; a cache or an evaluation stops at once and is repeated."""
    out = tmp_path / "out"
    for point, stage, unfinished in INTERRUPTS:
        result = go(out, f"{point}={kind}")
        assert result.code == 130 and "Traceback" not in result.err, point
        assert f"headwater: interrupted; the same command with --out {out} resumes" in result.err
        where = list(out.glob(f"nodes/{stage}.*"))
        assert any((path / "DONE").exists() for path in where) != unfinished, point
        if stage in ("teacher_rl", "teacher_rollouts", "warmup"):
            assert len(where) == 1, point  # the interrupt came in this stage, not before it
        if point.startswith("step"):  # the second of two of the warm-up
            assert {path.name for path in (where[0] / "checkpoint").iterdir()} == {"000001", "000002"}
    assert go(out).code == 0
    assert differing(out, whole()) == []


def test_sampler_error_is_reported_and_recorded_and_run_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = go(out, "rollouts.arrived:9=error")
    assert result.code == 1 and one_sentence(result).startswith("RuntimeError: injected fault (traceback in ")
    (mark,) = out.glob("nodes/*/FAILED")
    assert "Traceback" in read_json(mark)["traceback"]
    assert go(out).code == 0
    assert differing(out, whole()) == []


def test_second_process_on_locked_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = warm_runs().run(*small(out), then="step.begun")
    refused = f"second: 2: headwater: --out {out}: another process is running there; wait until it ends, or use another folder"
    assert result.code == 0 and refused in result.err
    assert differing(out, whole()) == []


# Damage ---------------------------------------------------------------------------------------------------------------

RECOMPUTED, REFUSED, REWRITTEN = "recomputed", "refused", "rewritten"
FILES = {  # file of a finished run -> what a run does when it is damaged; REWRITTEN files are written by every run
    "opd/model/model.safetensors": RECOMPUTED,
    "opd/model/tokenizer.json": RECOMPUTED,
    "opd/model/README.md": RECOMPUTED,
    "opd/evals/final/sums.jsonl": RECOMPUTED,
    "opd/node.json": RECOMPUTED,
    "opd/DONE": RECOMPUTED,
    "teacher_rollouts/cache/distributions.safetensors": RECOMPUTED,
    "teacher_rollouts/cache/rollouts.jsonl": RECOMPUTED,
    "teacher_rollouts/ledger.jsonl": RECOMPUTED,
    "base_student/evals/final/sums.jsonl": RECOMPUTED,
    "base_student/DONE": RECOMPUTED,
    "opd/metrics.jsonl": REFUSED,  # of a step before the two remaining checkpoints, so it cannot be recomputed
    "opd/ledger.jsonl": REFUSED,
    "opd/conditions.jsonl": REFUSED,
    "opd/sums.jsonl": REFUSED,
    "opd/rollouts/000001.jsonl": REFUSED,
    "student_rl/evals/step-000001/sums.jsonl": REFUSED,
    "plan.json": REFUSED,
    "recipe.json": REFUSED,
    "env.json": REWRITTEN,
    "ledger.jsonl": REWRITTEN,
    "report.json": REWRITTEN,
    "labels.csv": REWRITTEN,
}


def path_of(out: Path, name: str) -> Path:
    stage, _, rest = name.partition("/")
    return (
        node(out, "bridge_rl", stage) / rest
        if rest and "base" not in stage
        else next(iter(out.glob(f"nodes/{stage}.*"))) / rest
        if rest
        else out / name
    )


def damage(path: Path, how: str) -> None:
    if how == "flipped":
        flip(
            path, 0.5 if path.name == "recipe.json" else 0.1
        )  # the first fields may change on resume and are rewritten
    elif how == "cut":
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[: len(content) // 3])
    else:
        path.unlink()


def rounds() -> list[tuple[str, ...]]:
    """The files that a run mends, of each folder one in a round, so that every one is noticed for itself."""
    folders: dict[str, list[str]] = {}
    for name, outcome in FILES.items():
        if outcome != REFUSED:
            folders.setdefault(name.partition("/")[0], []).append(name)
    return [tuple(name for name in names if name) for names in itertools.zip_longest(*folders.values())]


def check_damaged_files(names: Sequence[str], how: str, folder: Path) -> None:
    """Damage files of a finished run, run again, and assert that they are as they were."""
    out = copied(folder)
    for name in names:
        damage(path_of(out, name), how)
    result = go(out)
    assert result.code == 0, result.err
    for name in names:
        noted = f"{path_of(out, name)}: is damaged; " in result.err.replace("\n", "")
        assert noted or FILES[name] == REWRITTEN, name
    assert differing(out, whole()) == []


def check_refused_file(name: str, how: str, folder: Path) -> None:
    """Damage one file of a finished run, run again, and assert that the refusal names it."""
    out = copied(folder)
    path = path_of(out, name)
    damage(path, how)
    result = go(out)
    assert result.code == 2, (result.code, result.err)
    what = "recipe" if name == "recipe.json" and how == "flipped" else str(path)
    assert what in one_sentence(result)


def test_every_file_is_damaged_in_some_test() -> None:
    refused = [name for name, outcome in FILES.items() if outcome == REFUSED]
    assert sorted([*refused, *(name for names in rounds() for name in names)]) == sorted(FILES)


@pytest.mark.parametrize("names", rounds(), ids=lambda names: names[0])
def test_flipped_bit_is_detected_and_file_restored(names: Sequence[str], tmp_path: Path) -> None:
    check_damaged_files(names, "flipped", tmp_path)


@pytest.mark.parametrize("name", [name for name, outcome in FILES.items() if outcome == REFUSED])
def test_flipped_bit_in_file_without_copy_is_refused(name: str, tmp_path: Path) -> None:
    check_refused_file(name, "flipped", tmp_path)


@cache
def killed_in_opd() -> Path:
    """A run killed in its OPD after the second of three steps."""
    out = temporary() / "killed"
    assert go(out, "step.kept:7=kill").code == KILLED  # 2 of teacher_rl, 2 of warmup, and the third of opd
    return out


def unfinished(folder: Path) -> tuple[Path, Path]:
    """A copy of that run, with two checkpoints and a partly written third step of OPD."""
    out = Path(shutil.copytree(killed_in_opd(), folder / "out"))
    opd = next(out.glob("nodes/opd.*"))
    assert sorted(path.name for path in (opd / "checkpoint").iterdir()) == ["000001", "000002"]
    return out, opd


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "sums.json"])
def test_damaged_checkpoint_is_named_and_previous_one_used(name: str, tmp_path: Path) -> None:
    out, opd = unfinished(tmp_path)
    flip(opd / "checkpoint" / "000002" / name)
    result = go(out)
    assert (
        result.code == 0
        and f"{opd}/checkpoint/000002/" in result.err
        and "is damaged; checkpoint 000002 is skipped" in result.err
    )
    assert differing(out, whole()) == []


def test_resume_is_refused_if_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    out, opd = unfinished(tmp_path)
    for step in ("000001", "000002"):
        flip(opd / "checkpoint" / step / "model.safetensors")
    result = go(out)
    assert result.code == 2 and str(opd / "checkpoint/000002/model.safetensors") in one_sentence(result)
    shutil.rmtree(opd)  # the remedy that the message names
    assert go(out).code == 0
    assert differing(out, whole()) == []


@pytest.mark.parametrize(
    ("name", "share", "code"),
    [("metrics.jsonl", 0.01, 2), ("ledger.jsonl", 0.01, 2), ("rollouts/000001.jsonl", 0.5, 2), ("sums.jsonl", 0.01, 2),
     ("metrics.jsonl", 0.95, 0), ("ledger.jsonl", 0.95, 0), ("rollouts/000003.jsonl", 0.5, 0), ("rollouts/000002.jsonl", 0.5, 0)],
)  # fmt: skip
def test_damaged_log_is_rewritten_from_earlier_checkpoint_or_refused(
    name: str, share: float, code: int, tmp_path: Path
) -> None:
    out, opd = unfinished(tmp_path)
    flip(opd / name, share)
    result = go(out)
    assert result.code == code, result.err
    if code:
        assert str(opd / name) in one_sentence(result)
    else:
        assert differing(out, whole()) == []


def test_large_file_is_verified_whole_before_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headwater.errors import UserError
    from headwater.storage import node_dir

    out = copied(tmp_path)
    monkeypatch.setattr(node_dir, "LARGE", 1 << 10)
    folder = node_dir.NodeDir(node(out, "bridge_rl", "opd"))
    flip(folder.model / "model.safetensors")
    assert folder.damage() is None  # the size is the same, so the check at the start does not see it
    with pytest.raises(UserError, match=r"model\.safetensors: is damaged"):
        folder.refuse_damage("model/")
    assert not folder.done.exists()  # so that the next run recomputes it


def test_report_of_damaged_results_is_refused(tmp_path: Path) -> None:
    out = copied(tmp_path)
    path = node(out, "bridge_rl", "opd") / "evals/final/sums.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"correct": false', '"correct": true', 1), encoding="utf-8"
    )
    result = warm_runs().run("report", out)
    assert result.code == 2 and str(path) in one_sentence(result)


def test_folder_without_checksums_of_earlier_version_is_accepted(tmp_path: Path) -> None:
    out = copied(tmp_path)
    for path in out.glob("nodes/*/DONE"):
        write_json(path, {"fingerprint": load_json(path)["fingerprint"]})
    plan = load_json(out / "plan.json")
    del plan["check"]
    write_json(out / "plan.json", plan)
    result = go(out)
    assert result.code == 0 and not result.arrivals.get("node.begun")
    assert rows(out / "ledger.jsonl") == rows(whole() / "ledger.jsonl")


# A stage that stops itself --------------------------------------------------------------------------------------------


def test_killed_stage_without_signal_stops_with_same_ledger(tmp_path: Path) -> None:
    """Real kills; tests/unit/runs/test_stopped_stage.py goes through every point in one process."""
    changes = ("guards.no_signal=stop", "guards.patience=1", "stages.teacher_rl.sampling.max_tokens=1")
    stopped = go(tmp_path / "stopped", None, *changes)
    assert stopped.code == 4 and "no informative group in 1 step" in one_sentence(stopped)
    out = tmp_path / "killed"
    for point in ("verdicts.checked", "step.measured", "step.charged", "checkpoint.begun"):
        assert go(out, f"{point}:1=kill", *changes).code == KILLED, point
    again = go(out, None, *changes)
    assert again.code == 4 and one_sentence(again) == one_sentence(stopped)
    assert differing(out, tmp_path / "stopped") == []
    ledger = [row for row in rows(out / "ledger.jsonl") if row["purpose"] == "train"]
    kept = [row for path in out.glob("nodes/teacher_rl.*/rollouts/*.jsonl") for row in rows(path)]
    assert [row["checks"] for row in ledger] == [len(kept)] == [4]
    assert {label for row in ledger for label in row["labels"]} == {row["problem_id"] for row in kept}
    # With the guard eased the stage goes on from its checkpoint, and no step is counted twice.
    assert go(out, None, "guards.no_signal=continue", changes[2]).code == 0
    steps = [
        row["step"] for row in rows(out / "ledger.jsonl") if row["purpose"] == "train" and row["stage"] == "teacher_rl"
    ]
    assert steps == [1, 2]
