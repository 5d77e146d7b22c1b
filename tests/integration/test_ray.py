"""A study's nodes on a Ray cluster: the same files as here, processes that die, stops, and what the cluster does not have.

All but the last test need Ray, which is large and no part of the test extra: `pip install 'headwater[ray]'` has them run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from runs import CommandResult, assert_same, load_json, node, rows, temporary, tiny

ARMS = "direct_grpo,raw_teacher"
LONG = ("stages.student_rl.steps=24", "stages.warmup.steps=24", "compute.workers=2")


def library_with_path() -> Any:
    """Ray, whose processes will find the modules that are found here."""
    library = pytest.importorskip("ray", reason="Ray is not installed: nothing of --executor ray is tested here")
    os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    return library


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    library = library_with_path()
    library.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield library
    library.shutdown()


@cache
def here() -> Path:
    """The study that no cluster runs and nothing disturbs."""
    out = temporary() / "here"
    assert tiny("study", out, "--arms", ARMS, changes=[*LONG, "compute.workers=1"]).code == 0
    return out


def on_ray(out: Path, *changes: str) -> CommandResult:
    return tiny("study", out, "--arms", ARMS, "--executor", "ray", changes=[*LONG, *changes])


def processes_at(title: str) -> set[int]:
    """Ids of the cluster's processes that run a node of this name."""
    ids = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(f"ray::{title}".encode()):
                ids.add(int(path.parent.name))
    return ids


@contextlib.contextmanager
def meanwhile(out: Path, stage: str, steps: int, do: Callable[[set[int]], None]) -> Iterator[None]:
    """`do(the processes that run it)` as soon as a stage has taken so many steps."""

    def watch() -> None:
        deadline, at_work = time.monotonic() + 400, set[int]()
        while time.monotonic() < deadline:
            at_work = at_work or processes_at(stage)  # known beforehand: the stage may end while one looks for it
            for path in out.glob(f"nodes/{stage}.*/metrics.jsonl") if at_work else ():
                if path.read_text(encoding="utf-8").count("\n") >= steps:
                    do(at_work)
                    return
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join(timeout=5)
    assert not thread.is_alive(), f"{stage} did not come to step {steps}"


def kill(pids: set[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_ray_study_with_killed_process_equals_local_study(ray: Any, tmp_path: Path) -> None:
    with meanwhile(tmp_path, "student_rl", 3, kill):
        result = on_ray(tmp_path)
    assert result.code == 0, result.err
    assert "student_rl on all (seed 0): its process died; resuming it in another process" in result.err
    assert result.err.count("warmup on all (seed 0): ") == 1
    assert_same(tmp_path, here())


def test_interrupted_ray_study_checkpoints_and_resumes_locally(ray: Any, tmp_path: Path) -> None:
    with meanwhile(tmp_path, "warmup", 2, lambda pids: os.kill(os.getpid(), signal.SIGINT)):
        result = on_ray(tmp_path)
    assert result.code == 130 and result.err.count("stopping after this step, with a checkpoint") == 1, result.err
    for path in tmp_path.glob("nodes/*/metrics.jsonl"):
        assert (path.parent / "checkpoint" / f"{len(rows(path)):06d}" / "sums.json").exists()
    assert tiny("study", tmp_path, "--arms", ARMS, changes=[*LONG, "compute.workers=1"]).code == 0
    assert_same(tmp_path, here())


def test_ray_node_lost_too_often_fails_and_rest_continues(ray: Any, tmp_path: Path) -> None:
    with meanwhile(tmp_path, "student_rl", 1, kill):
        result = on_ray(tmp_path, "compute.ray.retries=0")
    assert result.code == 1
    assert "student_rl on all (seed 0): its process was lost 1 times (WorkerCrashedError: " in result.err
    assert load_json(node(tmp_path, "direct_grpo", "student_rl") / "FAILED")["code"] == 1
    assert (node(tmp_path, "raw_teacher", "opd") / "DONE").exists()


def test_ray_refuses_unavailable_resources(ray: Any, tmp_path: Path) -> None:
    result = on_ray(tmp_path, "compute.ray.stages.warmup.cpus=64")
    assert result.code == 2
    assert result.err.endswith(
        "headwater: compute.ray: warmup on all (seed 0) asks for cpus 64, and the cluster has 2\n"
    )


@pytest.mark.many
@pytest.mark.timeout(1600)
def test_cluster_after_loss_of_machine_gives_same_files(tmp_path: Path) -> None:
    """Two Ray nodes with a CPU each; all processes of the second are killed while it runs a stage. The last test with Ray here."""
    ray = library_with_path()
    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        machine = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        raylet = machine.all_processes["raylet"][0].process.pid
        lost: list[str] = []

        def lose_machine() -> None:
            deadline = time.monotonic() + 800
            while not lost and time.monotonic() < deadline:
                for path in tmp_path.glob("nodes/*/metrics.jsonl"):
                    stage = path.parent.name.split(".")[0]
                    on_machine = [pid for pid in processes_at(stage) if parent_of(pid) == raylet]
                    if on_machine and path.read_text(encoding="utf-8").count("\n") >= 2:
                        lost.append(stage)
                        cluster.remove_node(machine, allow_graceful=False)
                        return
                time.sleep(0.02)

        thread = threading.Thread(target=lose_machine, daemon=True)
        thread.start()
        result = on_ray(tmp_path)
        thread.join(timeout=60)
        assert result.code == 0, result.err
        assert lost and f"{lost[0]} on all (seed 0): its process died; resuming it in another process" in result.err
        assert_same(tmp_path, here())
    finally:
        ray.shutdown()
        cluster.shutdown()


def parent_of(pid: int) -> int | None:
    """Id of a process's parent; None once it has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def test_missing_ray_is_refused_with_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = tiny("run", tmp_path, "--executor", "ray")
    assert result.code == 2
    assert result.err.endswith("headwater: --executor ray: Ray is not installed; pip install 'headwater[ray]'\n")
    unknown = tiny("run", tmp_path, "--executor", "slurm")
    assert unknown.code == 2 and unknown.err == "headwater: --executor slurm: unknown executor; choose local or ray\n"
