"""One node on several ranks: the numbers of a single process, killed ranks, checkpoints for any world size."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from forked_ranks import run_ranks
from headwater.distributed.process_group import ProcessGroup
from headwater.losses.batch import Row
from headwater.training.groups import assign_to_ranks, split_minibatches
from runs import WHOLE_ARM, environment, free_port, infos, load_json, node, rows, sets, tagged, temporary, tiny
from tiny import rollout_of, stage_of, tiny_folder
from tools.pretrain.pocket import make_tokenizer

# Every kind of pass at once: a reference, several updates of one batch, microbatches so small that ranks have unlike numbers of them.
CHANGES = (
    "stages.teacher_rl.sparse.kl_coef=0.01",
    "stages.teacher_rl.passes=2",
    "stages.teacher_rl.minibatches=2",
    "compute.microbatch_tokens=150",
    "stages.opd.checkpoint_every=1",
    "stages.opd.steps=3",
    # Where a gradient is nothing but rounding, AdamW makes a whole step of it: that step must be small to see anything else.
    *(f"stages.{stage}.optim.lr=2e-5" for stage in ("teacher_rl", "warmup", "opd", "student_rl")),
)
NEAR = 1e-4
"""Largest difference of a number, and of a weight matrix against its norm: sums are made in another order."""


@cache
def one_process() -> Path:
    out = temporary() / "one"
    result = tiny("run", out, changes=CHANGES)
    assert result.code == 0, result.err
    return out


def command_of(out: Path, *changes: str) -> list[str | Path]:
    return ["run", "pocket", *WHOLE_ARM, "--out", out, *sets(*changes)]


def command(out: Path) -> list[str | Path]:
    return command_of(out, *CHANGES)


def differences(a: Any, b: Any, where: str = "") -> Iterator[tuple[float, str]]:
    """How far two values are apart, number by number, relative to 1 or the number; anything but a float must be equal.

    Signals of tokens are written with two decimals: there one unit of the last counts as nothing.
    """
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if not key.startswith("seconds"):
                yield from differences(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, (first, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(first, other, f"{where}[{index}]")
    elif isinstance(a, float):
        unit = 0.0101 if ".signal[" in where else 0.0
        yield max(0.0, abs(a - b) - unit) / max(1.0, abs(a)), where
    else:
        assert a == b, f"{where}: {a!r} and {b!r}"


def assert_alike(out: Path, single: Path) -> None:
    """The same texts, verdicts, labels and costs; weights and measures to within rounding."""
    assert [path.name for path, _ in infos(out)] == [path.name for path, _ in infos(single)]
    for reference, _ in infos(single):
        ours = out / "nodes" / reference.name
        for path in (*reference.glob("model/*.safetensors"), *reference.glob("cache/*.safetensors")):
            a, b = load_file(ours / path.relative_to(reference)), load_file(path)
            assert a.keys() == b.keys()
            apart = max(distance(a[name].float(), b[name].float()) for name in a)
            assert apart < NEAR, f"{path.relative_to(single)}: {apart}"
        names = [
            path.relative_to(reference) for path in sorted(reference.rglob("*.jsonl")) if path.name != "sums.jsonl"
        ]
        assert names == [path.relative_to(ours) for path in sorted(ours.rglob("*.jsonl")) if path.name != "sums.jsonl"]
        for name in names:
            assert max(differences(rows(ours / name), rows(reference / name)), default=(0.0, ""))[0] < NEAR, name
        assert not [gap for gap in differences(rows(ours / "ledger.jsonl"), rows(reference / "ledger.jsonl")) if gap[0]]
    assert max(differences(load_json(out / "report.json"), load_json(single / "report.json")))[0] < NEAR


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def test_two_ranks_equal_one_with_same_ledger(tmp_path: Path) -> None:
    ended = run_ranks(2, *command(tmp_path / "out"))
    assert [rank.code for rank in ended] == [0, 0], ended
    assert_alike(tmp_path / "out", one_process())
    assert load_json(tmp_path / "out" / "env.json")["processes"] == 2 and ended[1].err == ""


def test_two_ranks_equal_one_with_teacher_of_other_tokenizer(tmp_path: Path) -> None:
    changes = (
        *CHANGES,
        f"models.teacher={tiny_folder(tmp_path / 'pairs', seed=5, tokenizer=make_tokenizer('pairs'))}",
        "stages.warmup.dense.tokenizers=prefix",
        "stages.opd.dense.tokenizers=prefix",
    )
    options = ["run", "pocket", "--arm", "raw_teacher"]
    assert tiny("run", tmp_path / "one", "--arm", "raw_teacher", changes=changes).code == 0
    ended = run_ranks(2, *options, "--out", tmp_path / "two", *sets(*changes))
    assert [rank.code for rank in ended] == [0, 0], ended
    assert_alike(tmp_path / "two", tmp_path / "one")


def test_two_ranks_score_ahead_and_normalize_by_tag_as_one_process(tmp_path: Path) -> None:
    changes = (
        *CHANGES,
        *tagged(tmp_path, "a", "b"),
        "stages.warmup.dense.normalize=tags",
        "stages.opd.dense.normalize=tags",
        "conditions.problems=0",
    )
    assert tiny("run", tmp_path / "one", "--arm", "raw_teacher", changes=changes).code == 0
    argv = command_of(tmp_path / "two", *changes, "compute.score_ahead=3")
    argv[argv.index("--arm") + 1] = "raw_teacher"
    ended = run_ranks(2, *argv)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert_alike(tmp_path / "two", tmp_path / "one")


def test_killed_rank_ends_others_and_other_world_sizes_resume(
    tmp_path: Path,
) -> None:
    out = tmp_path / "two"
    # OPD's steps are the 9th to 11th that a rank begins: two of teacher RL and two of warm-up come before.
    ended = run_ranks(2, *command(out), faults={1: "step.begun:7=kill"})
    assert ended[1].code == -signal.SIGKILL and ended[0].code == 4
    assert ended[0].err.endswith(
        "headwater: another process of this run was lost; run the same command again to resume from the last checkpoint\n"
    )
    assert ended[0].seconds - ended[1].seconds < 10
    kept = node_of(out, "opd") / "checkpoint" / "000002"
    assert sorted(path.name for path in kept.glob("shard-*")) == [
        f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)
    ]
    for size in (1, 4):
        shutil.copytree(out, tmp_path / str(size))
        again = run_ranks(size, *command(tmp_path / str(size)))
        assert [rank.code for rank in again] == [0] * size, again
        assert_alike(tmp_path / str(size), one_process())


def node_of(out: Path, stage: str) -> Path:
    return next((out / "nodes").glob(f"{stage}.*"))


@pytest.mark.many
def test_interrupted_ranks_leave_one_checkpoint_and_two_resume_from_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun = f"{out}/nodes/warmup.*/metrics.jsonl"
    ended = run_ranks(2, *command(out), signals=[(begun, signal.SIGTERM)])
    assert [rank.code for rank in ended] == [130, 130], ended
    assert ended[0].err.count("stopping after this step, with a checkpoint") == 1 and ended[1].err == ""
    again = run_ranks(1, *command(out), faults={0: "step.begun:3=int"})
    assert again[0].code == 130, again
    assert (node_of(out, "opd") / "checkpoint").exists()
    assert [rank.code for rank in run_ranks(2, *command(out))] == [0, 0]
    assert_alike(out, one_process())


@pytest.mark.many
def test_stage_failure_on_all_ranks_spares_rest_of_study(tmp_path: Path) -> None:
    changes = ["guards.no_signal=stop", "guards.patience=1", "stages.student_rl.sampling.max_tokens=1"]
    argv = ["study", "pocket", "--arms", "direct_grpo,raw_teacher", "--out", tmp_path, *sets(*changes)]
    ended = run_ranks(2, *argv)
    assert [rank.code for rank in ended] == [4, 4]
    assert ended[0].err.count("no informative group") == 2 and ended[1].err == ""  # as it happens, and at the end
    assert (node(tmp_path, "raw_teacher", "opd") / "DONE").exists()
    assert "no informative group" in load_json(node(tmp_path, "direct_grpo", "student_rl") / "FAILED")["sentence"]


@pytest.mark.many
def test_torchrun_gives_same_run_and_rank_0_prints(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "headwater"]
    argv = [*launcher, *map(str, command(tmp_path / "out"))]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=280, env=environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("accuracy on sums before, between and after the stages") == 1
    assert_alike(tmp_path / "out", one_process())


def processes_under(pid: int) -> list[int]:
    """A process and its descendants: torchrun starts each of its own in a session of its own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    family = [pid]
    for member in family:  # grows while it is read
        family += [child for child, parent in parents.items() if parent == member]
    return family


def lose_machine(agent: subprocess.Popen[str]) -> None:
    """Kill an agent and its process at once, as when a machine is lost."""
    for pid in processes_under(agent.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def two_machines(out: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two agents of torchrun on the loopback, each with one process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "two-machines"]
    argv = [*launcher, "--local-addr", "127.0.0.1", "-m", "headwater", *map(str, command(out))]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    agents = [subprocess.Popen(argv, **pipes) for _ in range(2)]
    try:
        yield agents
    finally:
        for agent in agents:
            if agent.poll() is None:
                lose_machine(agent)
                agent.communicate()


PATIENCE = 800
"""Seconds for two agents and their processes on a slow machine; they take one minute on two cores."""


@pytest.mark.many
@pytest.mark.timeout(2 * PATIENCE)
def test_two_machines_give_same_run(tmp_path: Path) -> None:
    with two_machines(tmp_path / "out") as machines:
        ended = [machine.communicate(timeout=PATIENCE) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ended
    assert sum(out.count("accuracy on sums before, between and after the stages") for out, _ in ended) == 1
    assert_alike(tmp_path / "out", one_process())


@pytest.mark.many
@pytest.mark.timeout(4 * PATIENCE)
@pytest.mark.parametrize("lost", [0, 1])
def test_two_machines_resume_after_loss_of_one(lost: int, tmp_path: Path) -> None:
    """Machine 0 also holds the rendezvous."""
    out = tmp_path / "out"
    with two_machines(out) as machines:
        deadline = time.monotonic() + PATIENCE
        while not any(rows(path) for path in out.glob("nodes/opd.*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.01)
        lose_machine(machines[lost])
        _, err = machines[1 - lost].communicate(timeout=120)
    assert machines[1 - lost].returncode == 1, err  # torchrun's own code, whatever its process returned
    assert "another process of this run was lost; run the same command again" in err, err
    assert not (node_of(out, "opd") / "DONE").exists()
    with two_machines(out) as machines:
        ended = [machine.communicate(timeout=PATIENCE) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ended
    assert_alike(out, one_process())


def test_only_run_study_and_demo_accept_several_processes() -> None:
    for refused in run_ranks(2, "probe", "pocket"):
        assert refused.code == 2
        assert refused.err == "headwater: torchrun: only run, study, demo, distill and grpo run in several processes\n"


# Shares ---------------------------------------------------------------------------------------------------------------


def test_assign_to_ranks_covers_every_row_once_and_keeps_groups_whole() -> None:
    stage = stage_of("grpo", batch_size=32, group_size=4, minibatches=2)
    lengths = [3, 9, 1, 7, 2, 8, 5, 4]
    many = [
        Row(rollout_of((1, group, 2), (5,) * length, sample))
        for group, length in enumerate(lengths)
        for sample in range(4)
    ]
    shared = [assign_to_ranks(many, stage, 4, ProcessGroup(rank, 2)) for rank in (0, 1)]
    assert [[row.rollout for row in rank_rows] for rank_rows in shared] == [[row.rollout for row in many]] * 2
    assert all(a.local != b.local for a, b in zip(*shared, strict=True))
    for part in split_minibatches(shared[0], 2, 4):
        here = [row for row in part if row.local]
        assert {len([row for row in here if row.rollout.prompt_ids[1] == group]) for group in range(8)} <= {0, 4}
        # Groups of (3 + length) · 4 tokens: 24, 48, 16, 40 and 20, 44, 32, 28, of which the fairest halves are 64 and 64, 60 and 64.
        load = sum(3 + row.tokens for row in here)
        assert load in {64, 60}


def test_single_process_keeps_every_row() -> None:
    alone = ProcessGroup()
    many = [Row(rollout_of((1, 2), (3,)))]
    assert assign_to_ranks(many, stage_of(), 1, alone) is many and alone.shard([1, 2]) == [1, 2]
    assert alone.all_reduce_sum({"loss": 0.1}) == {"loss": 0.1} and list(alone.lockstep([1, 2])) == [1, 2]


def test_contiguous_shares_cover_all_and_differ_by_one_at_most() -> None:
    for count in range(9):
        parts = [ProcessGroup(rank, 4).shard(range(count)) for rank in range(4)]
        assert [rank for part in parts for rank in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
