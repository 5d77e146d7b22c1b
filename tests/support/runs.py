"""Shared helpers of end-to-end tests: the pocket recipe made tiny, and the program called in-process or as a process."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from headwater.cli.main import main
from headwater.doctor.checks import Examination
from headwater.report.html import Page

SHAPE = ("batch_size=16", "group_size=4", "steps=2", "sampling.max_tokens=32")
TINY = (  # two steps a stage, ten graded evaluation texts: a whole arm takes a second or two
    "data.labeled.generate.count=64",
    "data.evals.sums.generate.count=5",
    "labels.budget=16",
    *(f"stages.{stage}.{field}" for stage in ("teacher_rl", "warmup", "student_rl") for field in SHAPE),
    "stages.opd.batch_size=8",
    "stages.opd.steps=2",
    "stages.opd.sampling.max_tokens=32",
    "evaluate.samples=2",
    "evaluate.sampling.max_tokens=32",
    "guards.no_signal=continue",
    "compute.threads=1",
    "compute.keep_checkpoints=true",  # which tests look at
    "compute.workers=1",  # in this process, where tests can inspect and patch; test_executors.py has more
)


WHOLE_ARM = ("--arm", "bridge_rl")
"""Option for the arm that has every kind of stage."""


def sets(*changes: str) -> list[str]:
    """`--set` options of the tiny recipe and these further changes."""
    return [part for change in (*TINY, *changes) for part in ("--set", change)]


@dataclass(frozen=True)
class CommandResult:
    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """Lines of stderr without the progress display's, the choice of an arm and the report's path."""
        return [
            line
            for line in self.err.splitlines()
            if not re.match(r"\d\d:\d\d:\d\d |arm \w+ \(|report: |fitted to ", line)
        ]


def call(*argv: str | Path, entry: Callable[[], None] = main) -> CommandResult:
    """Run `headwater argv…` in this process; `entry` is the entry point of another program."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    words = ["headwater", *(str(word) for word in argv)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", words):
        try:
            entry()
        except SystemExit as end:
            code = end.code
    return CommandResult(0 if code is None else code, out.getvalue(), err.getvalue())


def tiny(verb: str, out: Path, *options: str | Path, changes: Sequence[str] = (), whole: bool = False) -> CommandResult:
    """Call `run` or `study` of the tiny recipe in this process; `run` takes the arm with every kind of stage if it names none.

    Preflight and the HTML page take longest and have their own tests, so they are skipped unless `whole`.
    """
    if verb == "run" and "--arm" not in options:
        options = (*WHOLE_ARM, *options)
    with contextlib.ExitStack() as stack:
        if not whole:
            stack.enter_context(mock.patch("headwater.doctor.checks.examine", return_value=Examination((), (), ())))
            stack.enter_context(mock.patch("headwater.report.html.page", return_value=Page("")))
        return call(verb, "pocket", "--out", out, *sets(*changes), *options)


def program(*argv: str | Path) -> list[str]:
    """Command line of the program."""
    return [sys.executable, "-m", "headwater", *(str(word) for word in argv)]


def spawn(*argv: str | Path, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(program(*argv), cwd=cwd, timeout=timeout, capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def node_names(out: Path, arm: str, seed: int = 0) -> list[str]:
    return load_json(out / "plan.json")["arms"][arm][str(seed)]


def nodes(out: Path, arm: str, seed: int = 0) -> list[Path]:
    """The folders of an arm's nodes, in order."""
    return [out / "nodes" / name for name in node_names(out, arm, seed)]


def node(out: Path, arm: str, stage: str, seed: int = 0) -> Path:
    """The last node of that stage in an arm."""
    return [path for path in nodes(out, arm, seed) if path.name.startswith(f"{stage}.")][-1]


def infos(out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted((out / "nodes").iterdir()):
        yield path, load_json(path / "node.json")


def without_seconds(value: Any) -> Any:
    """The value without its `seconds…` entries."""
    if isinstance(value, dict):
        return {key: without_seconds(child) for key, child in value.items() if not key.startswith("seconds")}
    return [without_seconds(child) for child in value] if isinstance(value, list) else value


def assert_same(out: Path, whole: Path) -> None:
    """Assert bit-identical weights, and equal metrics, ledgers, rollouts, evaluations and report apart from seconds."""
    assert [path.name for path, _ in infos(out)] == [path.name for path, _ in infos(whole)]
    for (ours, _), (reference, _) in zip(infos(out), infos(whole), strict=True):
        assert done(ours) == done(reference)
        for weights in ("model/model.safetensors", "cache/distributions.safetensors"):
            assert (ours / weights).exists() == (reference / weights).exists()
            if (ours / weights).exists():
                a, b = load_file(ours / weights), load_file(reference / weights)
                assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), ours.name
        files = [path.relative_to(reference) for path in sorted(reference.rglob("*.jsonl"))]
        assert files == [path.relative_to(ours) for path in sorted(ours.rglob("*.jsonl"))]
        for name in files:
            assert without_seconds(rows(ours / name)) == without_seconds(rows(reference / name)), f"{ours.name}/{name}"
    assert without_seconds(rows(out / "ledger.jsonl")) == without_seconds(rows(whole / "ledger.jsonl"))
    assert without_seconds(load_json(out / "report.json")) == without_seconds(load_json(whole / "report.json"))


TIMED = ("metrics.jsonl", "ledger.jsonl")
"""Files of a node whose rows contain seconds."""


def done(folder: Path) -> dict[str, Any]:
    """Content of DONE without the checksums of files that contain seconds."""
    result = {key: value for key, value in load_json(folder / "DONE").items() if key != "check"}
    return {**result, "sums": {name: sum_ for name, sum_ in result["sums"].items() if name not in TIMED}}


def tagged(folder: Path, *tags: str) -> tuple[str, str]:
    """Changes to problems whose tags take turns, in labeled.jsonl, and to an evaluation of one problem with the first tag."""
    lines = [
        {"problem": f"{10 + i}+{20 + i}", "answer": str(30 + 2 * i), "kind": tags[i % len(tags)]} for i in range(24)
    ]
    held_out = [{"problem": "55+11", "answer": "66", "kind": tags[0]}]
    for name, content in (("labeled", lines), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    labeled, sums = (f"{{path: {folder / name}.jsonl, columns: {{tag: kind}}}}" for name in ("labeled", "held_out"))
    return f"data.labeled={labeled}", f"data.evals.sums={sums}"


def temporary() -> Path:
    """A folder that is removed when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="headwater-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def all_arms() -> Path:
    """The folder of one finished tiny study of every arm, run once for all test workers. Tests must not change it."""
    shared = Path(os.environ.get("HEADWATER_TESTS_SHARED") or temporary())
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker runs it, the others wait for it
        if not (shared / "finished").exists():
            result = tiny("study", shared / "study", "--arms", "all")
            assert result.code == 0, result.err
            (shared / "finished").touch()
    return shared / "study"
