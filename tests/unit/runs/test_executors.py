"""Parallel nodes, isolated failures, dead workers, one process per folder, reused nodes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headwater.config.builtin import find_recipe
from headwater.config.compute import Compute
from headwater.runs.display import NodeProgress, ProgressDisplay
from headwater.runs.executors.base import Failure, Job, recorded_progress
from headwater.runs.executors.local import (
    exit_reason,
    least_used,
    run_in_workers,
    visible_gpus,
    worker_count,
    worker_limit,
)
from headwater.runs.executors.schedule import critical_path_first
from headwater.runs.setup import prepared
from headwater.storage.run_dir import RunDir
from runs import (
    TINY,
    load_json,
)  # fmt: skip

# Parallel nodes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "device", "cores", "workers"),
    [
        (Compute(threads=1), "cpu", 8, 8),
        (Compute(threads=3), "cpu", 8, 2),  # a third would fight for the last two cores
        (Compute(threads=4), "cpu", 2, 1),
        (Compute(), "cpu", 8, 1),  # its threads take all the cores
        (Compute(threads=1), "cuda", 8, 1),
        (Compute(workers=3), "cuda", 2, 3),  # what was asked for counts
    ],
)
def test_worker_limit_follows_cores_unless_recipe_sets_it(
    compute: Compute, device: str, cores: int, workers: int
) -> None:
    assert worker_limit(compute, torch.device(device), cores) == workers


def test_worker_count_is_at_most_one_per_last_node(tmp_path: Path) -> None:
    with job_of(tmp_path, "bridge,raw_teacher,direct_grpo", "compute.workers=8") as job:
        assert worker_count(job) == 3
    with job_of(tmp_path, "bridge", "compute.workers=8") as job:
        assert worker_count(job) == 1  # so a run of one arm stays in this process


def test_longest_remaining_chain_starts_first_and_parents_before_children(tmp_path: Path) -> None:
    with job_of(tmp_path, "bridge,direct_grpo") as job:
        costs = {name: {"teacher_rl": 1.0, "student_rl": 5.0}.get(name.split(".")[0], 2.0) for name in job.todo}
        stages = [name.split(".")[0] for name in critical_path_first(job, costs)]
    # bridge: teacher_rl 1 + rollouts 2 + warm-up 2 + opd 2 = 7 behind its beginning, 6 behind the rollouts; direct_grpo 5
    assert stages == [
        "teacher_rl", "teacher_rollouts", "student_rl", "warmup", "base_student", "base_teacher", "opd",
    ]  # fmt: skip


# Dead workers and stop requests -------------------------------------------------------------------


@contextlib.contextmanager
def job_of(folder: Path, arms: str, *changes: str, progress_display: ProgressDisplay | None = None) -> Iterator[Job]:
    """The tiny recipe's nodes, none of them done, for an executor."""
    wanted = arms.split(",")
    silent = ProgressDisplay(lambda line: None, lambda title, number, total: contextlib.nullcontext(NodeProgress()))
    with prepared(find_recipe("pocket", [*TINY, *changes]), wanted, [0]) as (plan, inputs):
        todo = {plan.names[node]: node for node in plan.order()}
        yield Job(plan, inputs, wanted, RunDir(folder), todo, progress_display or silent, lambda: False)


# A worker without models: it says of each node that it is done, or dies of it as many times as the file `deaths` has lines.
FAKE = """
import json, os, pathlib, sys
out = pathlib.Path(json.loads(sys.stdin.readline())["out"])
for line in sys.stdin:
    name = json.loads(line)["run"]
    with (out / "begun").open("a") as file:
        file.write(name + "\\n")
    if name.startswith("warmup") and (out / "begun").read_text().count("warmup") <= int((out / "deaths").read_text()):
        os.kill(os.getpid(), 9)
    print(json.dumps({"begun": name}), flush=True)
    print(json.dumps({"done": name}), flush=True)
"""


# A worker that notes its GPU; each of the first two nodes waits until both workers are at work.
GPU_WORKER = """
import json, os, pathlib, sys, time
out = pathlib.Path(json.loads(sys.stdin.readline())["out"])
for line in sys.stdin:
    name = json.loads(line)["run"]
    (out / name).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    while len(list(out.iterdir())) < 2:
        time.sleep(0.01)
    print(json.dumps({"done": name}), flush=True)
"""


@pytest.mark.parametrize(
    ("gpus", "workers", "seen", "lines"),
    [
        (["MIG-1f/0", "GPU-8a"], 2, {"MIG-1f/0", "GPU-8a"}, []),
        (["3"], 2, {"3"}, ["2 workers share 1 GPU"]),
        ([], 2, {"5,6"}, []),
    ],
)
def test_each_worker_sees_one_gpu(
    gpus: list[str], workers: int, seen: set[str], lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")  # without GPUs for the workers it stays as it is
    shown: list[str] = []
    display = ProgressDisplay(shown.append, lambda title, number, total: contextlib.nullcontext(NodeProgress()))
    with job_of(tmp_path, "raw_teacher,direct_grpo", progress_display=display) as job:
        assert run_in_workers(job, workers, (sys.executable, "-c", GPU_WORKER), gpus) == {}
        assert {(tmp_path / name).read_text() for name in job.todo} == seen
    assert shown == lines


def test_new_worker_gets_least_used_gpu() -> None:
    gpus, used = ["0", "1", "2"], list[str | None]()
    for _ in range(7):
        used.append(least_used(gpus, used))
    assert used == ["0", "1", "2", "0", "1", "2", "0"]
    del used[4]  # the second worker on GPU 1
    assert least_used(gpus, used) == "1"
    assert least_used([], [None]) is None


@pytest.mark.parametrize(
    ("visible", "count", "gpus"),
    [
        (None, 3, ["0", "1", "2"]),
        ("4, 6", 2, ["4", "6"]),
        ("2,-1,3", 1, ["2"]),  # CUDA stops at -1
        (
            "MIG-4f3a,GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
            2,
            ["MIG-4f3a", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"],
        ),
    ],
)
def test_visible_gpus_stay_within_those_set(
    visible: str | None, count: int, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert visible_gpus(torch.device("cuda"), environment) == gpus
    assert visible_gpus(torch.device("cpu"), environment) == []


@pytest.mark.parametrize("deaths", [1, 2])
def test_node_of_killed_worker_is_retried_once_then_fails(deaths: int, tmp_path: Path) -> None:
    lines: list[str] = []
    progress_display = ProgressDisplay(
        lines.append, lambda title, number, total: contextlib.nullcontext(NodeProgress())
    )
    (tmp_path / "deaths").write_text(str(deaths))
    with job_of(tmp_path, "raw_teacher,direct_grpo", progress_display=progress_display) as job:
        failures = run_in_workers(job, 2, (sys.executable, "-c", FAKE))
        warmup = next(name for name in job.todo if name.startswith("warmup"))
        opd = next(name for name in job.todo if name.startswith("opd"))
    begun = (tmp_path / "begun").read_text().split()
    killed = "its process was killed by SIGKILL (too little memory?)"
    assert lines[0] == f"warmup on all (seed 0): {killed}; resuming it in another process"
    assert begun.count(warmup) == 2
    if deaths == 1:
        assert failures == {} and sorted(begun) == sorted([*job.todo, warmup])
    else:
        assert failures == {warmup: Failure(f"{killed}, for the second time", 1)}
        assert load_json(tmp_path / "nodes" / warmup / "FAILED") == failures[warmup].to_json()
        assert sorted({*begun}) == sorted(job.todo.keys() - {opd})


def test_exit_reason_names_code_or_signal() -> None:
    assert exit_reason(3) == "ended with code 3" and exit_reason(-15) == "was killed by SIGTERM"


def test_running_node_writes_its_work_to_file(tmp_path: Path) -> None:
    folder, calls = RunDir(tmp_path).node("opd.s0.1a2b"), []
    shown = NodeProgress(lambda *start: calls.append(start), lambda *more: calls.append(more), lambda: False)
    with recorded_progress(folder, shown) as progress:
        progress.start(2, 8, "completions")
        progress.advance(3, {})
        progress.part("measuring C2")
        note = json.loads(folder.now.read_text())
        assert (note["first"], note["done"], note["total"], note["unit"], note["part"]) == (
            2,
            5,
            8,
            "completions",
            "measuring C2",
        )
    assert calls == [(2, 8, "completions"), (3, {})] and not folder.now.exists()
