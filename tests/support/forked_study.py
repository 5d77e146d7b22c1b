"""A study that runs while the test goes on, as a fork of the parent of `ForkedRuns`; its workers are forks of it.

process = start(tmp_path / "process", "study", "pocket", "--workers", "2", "--out", out)
wait_for_steps(out, "student_rl", 2, process)
process.kill()
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import forked_runs
from forked_runs import request_of, warm_runs


@dataclass(frozen=True)
class RunningProcess:
    """Process id of a run, and the folder with its stdout and stderr."""

    pid: int
    folder: Path

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs. To be asked no more once it has answered."""
        return None if is_alive(self.pid) else warm_runs().ask("forked_study:code_of", {"pid": self.pid})

    def wait(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, self.err()
            time.sleep(0.005)
        return code

    def err(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8", errors="replace")

    def out(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8", errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def start(
    folder: Path,
    *argv: str | Path,
    whole: bool = False,
    undrawn: bool = False,
    environment: Mapping[str, str] | None = None,
) -> RunningProcess:
    """Start a run and return while it runs.

    folder       is made for its stdout and stderr
    whole        with preflight and the HTML page
    undrawn      with empty figures on that page
    environment  variables that it gets in addition
    """
    folder.mkdir()
    for name in ("out", "err"):
        (folder / name).touch()
    more = {"whole": whole, "undrawn": undrawn, "folder": str(folder), "environment": dict(environment or {})}
    request = request_of(argv) | more
    return RunningProcess(warm_runs().ask("forked_study:start_run", request), folder)


def wait_for_steps(out: Path, stage: str, count: int, process: RunningProcess) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        assert process.poll() is None, process.err()
        for path in out.glob(f"nodes/{stage}.*/metrics.jsonl"):
            if path.read_text(encoding="utf-8").count("\n") >= count:
                return
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"{stage} did not reach step {count}")


# In the parent process and its forks ------------------------------------------------------------------------------------


def start_run(request: dict[str, Any], _: Path) -> int:
    """Fork a run and return its process id."""
    pid = os.fork()
    if pid == 0:
        os.environ |= request["environment"]
        popen = SimpleNamespace(Popen=ForkedWorker, PIPE=subprocess.PIPE)
        try:
            with mock.patch("headwater.runs.executors.local.subprocess", popen):
                forked_runs.child(request, Path(request["folder"]))
        finally:
            os._exit(99)
    return pid


def code_of(request: dict[str, Any], _: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])


class ForkedWorker:
    """Replaces `subprocess.Popen` for a worker of a study: a fork of the study's process, which has done the imports.

    The study's process trains nothing itself, so autograd accepts its forks.
    """

    def __init__(self, command: list[str], **_: object) -> None:
        (inbox, to_worker), (from_worker, outbox) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                serve_nodes(inbox, outbox)
            finally:
                os._exit(99)
        os.close(inbox)
        os.close(outbox)
        self.stdin, self.stdout = os.fdopen(to_worker, "wb"), os.fdopen(from_worker, "rb")
        self._code: int | None = None

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self) -> int | None:
        return self.poll(0)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def serve_nodes(inbox: int, outbox: int) -> None:
    """A worker's main function on two pipes, with the signals and files of a new process."""
    from headwater.runs.executors.local import serve

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(inbox, 0)
    os.dup2(outbox, 1)
    os.closerange(3, 1024)  # also the study's ends of all pipes, so that this process notices when the study is gone
    sys.stdin, sys.stderr = os.fdopen(0), os.fdopen(2, "w", buffering=1, closefd=False)
    serve(json.loads(sys.stdin.buffer.readline()))
