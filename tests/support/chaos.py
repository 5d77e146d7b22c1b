"""Shared helpers of the fault tests, and a program: `python tests/support/chaos.py --kills 500`.

The program runs a study of tiny pocket nodes, kills its process group at random times until that number of kills is reached, lets
it finish, and compares every file with those of an undisturbed study.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from forked_runs import ForkedRuns, ProcessResult
from headwater.report import build as report
from headwater.storage.files import read_json, read_jsonl, write_atomic, write_json
from headwater.storage.run_dir import RunDir
from runs import TIMED, WHOLE_ARM, done, sets, without_seconds

SMALL = (  # every kind of node, a checkpoint a step, evaluations and measurements between steps: a second or two
    "data.labeled.generate.count=32",
    "data.evals.sums.generate.count=3",
    "labels.budget=8",
    "conditions.problems=2",
    "conditions.every=1",
    *(
        f"stages.{stage}.{field}"
        for stage in ("teacher_rl", "warmup", "student_rl")
        for field in ("batch_size=4", "group_size=2", "steps=2", "checkpoint_every=1", "sampling.max_tokens=10")
    ),
    "stages.teacher_rl.sparse.kl_coef=0.01",  # a gradient even if all rewards are equal
    "stages.student_rl.sparse.kl_coef=0.01",
    "stages.opd.batch_size=4",
    "stages.opd.steps=3",
    "stages.opd.checkpoint_every=1",
    "stages.opd.sampling.max_tokens=10",
    "stages.student_rl.eval_every=1",
    "evaluate.samples=2",
    "evaluate.sampling.max_tokens=10",
    "models.teacher=pocket:qwen3-student",  # the smallest model
)


def small(out: Path, *changes: str, verb: str = "run") -> list[str | Path]:
    return [verb, "pocket", *(WHOLE_ARM if verb == "run" else ()), "--out", out, *sets(*SMALL, *changes)]


def digests(out: Path) -> dict[str, str]:
    """sha256 of every file of a run's folder by name, without measured times: equal for runs that did the same.

    Nothing is left out but locks, and when and where nodes ran. A file that should not be there is a difference.
    """
    return {
        str(path.relative_to(out)): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.parent.name not in (".locks", "attempts") and path.name != ".lock"
    }


def _content(path: Path) -> bytes:
    if path.suffix == ".jsonl":
        return _text([without_seconds(row) for row in read_jsonl(path)])
    if path.name == "report.json":
        return _text(without_seconds(read_json(path)))
    if path.name == "DONE":
        return _text(done(path.parent))
    if path.name == "state.json":
        state = read_json(path)
        return _text({**state, "logs": {name: log for name, log in state["logs"].items() if name not in TIMED}})
    if path.name == "sums.json":
        return _text({name: checksum for name, checksum in read_json(path).items() if name != "state.json"})
    return path.read_bytes()


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


def differing(out: Path, whole: Path) -> list[str]:
    """Names of files that differ between two runs or exist in one only."""
    ours, expected = digests(out), digests(whole)
    return sorted(name for name in ours.keys() | expected.keys() if ours.get(name) != expected.get(name))


def report_without_times(out: Path, work: Path) -> dict[str, bytes]:
    """report.json, report.html and labels.csv with every measured time set to 0, and without the times of attempts."""
    copy = Path(shutil.copytree(out, work, ignore=shutil.ignore_patterns("checkpoint", "model", "cache", "attempts")))
    for node in RunDir(copy).nodes():
        for path in (node.metrics, node.ledger):
            if path.exists():
                write_atomic(path, "".join(json.dumps(zero_times(row)) + "\n" for row in read_jsonl(path)))
        write_json(node.done, {"fingerprint": read_json(node.info)["fingerprint"]})
    report.write(copy)
    state = RunDir(copy)
    return {path.name: path.read_bytes() for path in (state.report_json, state.report_html, state.labels)}


def zero_times(value: Any) -> Any:
    """The value with every `seconds…` at 0."""
    if isinstance(value, dict):
        return {key: 0.0 if key.startswith("seconds") else zero_times(child) for key, child in value.items()}
    return [zero_times(child) for child in value] if isinstance(value, list) else value


# The long study of random kills ---------------------------------------------------------------------------------------

LONG = (
    *(f"stages.{stage}.steps=20" for stage in ("teacher_rl", "warmup", "student_rl")),
    "stages.opd.steps=40",
    "stages.student_rl.eval_every=10",
    "conditions.every=10",
)
ARMS = "direct_grpo,raw_teacher,bridge,bridge_rl,replay"


def study(out: Path, seeds: str) -> list[str | Path]:
    return [*small(out, *LONG, verb="study"), "--arms", ARMS, "--seeds", seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seeds", default="0,1,2,3,4,5", help="of the study; more make it longer")
    parser.add_argument("--shortest", type=float, default=0.05, help="seconds a process lives at least")
    parser.add_argument("--longest", type=float, default=1.6, help="and at most")
    parser.add_argument("--draw", type=int, default=0, help="names the random times")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="headwater-chaos-"))
    try:
        sys.exit(0 if survive(args, folder) else 1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def survive(args: argparse.Namespace, folder: Path) -> bool:
    processes, times = ForkedRuns(), random.Random(args.draw)
    whole = folder / "whole"
    result = processes.run(*study(whole, args.seeds), patience=7200)
    assert result.code == 0, result.err
    print(f"undisturbed: {result.seconds:.1f} s, {len(RunDir(whole).nodes())} nodes", flush=True)
    kills = studies = 0
    began = time.monotonic()
    while kills < args.kills:
        out, here = folder / f"killed-{studies}", 0
        while True:
            after = times.uniform(args.shortest, args.longest) if kills < args.kills else None
            result = processes.run(*study(out, args.seeds), kill_after=after, patience=7200)
            if result.code != -signal.SIGKILL:
                break
            kills, here = kills + 1, here + 1
            if kills % 50 == 0:
                done = sum(node.done.exists() for node in RunDir(out).nodes())
                print(f"{kills} kills, {time.monotonic() - began:.0f} s, {done} nodes done", flush=True)
        if not ended_alike(result, out, whole, folder / f"reports-{studies}"):
            return False
        studies += 1
        print(f"study {studies} ended after {here} kills as if there had been none", flush=True)
        shutil.rmtree(out)
    print(f"{kills} kills over {studies} studies in {time.monotonic() - began:.0f} s: every file the same")
    return True


def ended_alike(result: ProcessResult, out: Path, whole: Path, work: Path) -> bool:
    if result.code != 0:
        print(f"ended with {result.code}: {result.err}")
        return False
    if differences := differing(out, whole):
        print(f"differ: {differences}")
        return False
    ours, expected = report_without_times(out, work / "ours"), report_without_times(whole, work / "theirs")
    print(
        f"reports without times, bytes: { {name: len(content) for name, content in ours.items()} }, equal: {ours == expected}"
    )
    return ours == expected


if __name__ == "__main__":
    main()
