"""Ranks of one run as forks of one process that has done the imports: real processes and a real gloo group.

ranks = ForkedRanks()
ranks.run(2, "run", "pocket", "--out", out, faults={1: "step.ended:3=kill"})    # one Rank for each
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import forked_runs


@dataclass(frozen=True)
class Rank:
    """Result of one rank: exit code (negative for a signal), stderr, seconds since all ranks started."""

    code: int
    err: str
    seconds: float


class ForkedRanks:
    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        atexit.register(self._process.kill)

    def run(
        self,
        size: int,
        *argv: str | Path,
        faults: Mapping[int, str] | None = None,
        signals: Sequence[tuple[str, int]] = (),
        patience: float = 120,
    ) -> list[Rank]:
        """faults   rank -> fault to inject (`storage.fault_points`)
        signals  (file, signal number): sent to every rank once the file exists
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"size": size, "argv": [str(word) for word in argv], "faults": faults or {}, "signals": list(signals)}
        self._process.stdin.write(json.dumps({**request, "patience": patience}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the parent process has ended"
        return [Rank(**fields) for fields in json.loads(line)]


@cache
def warm_ranks() -> ForkedRanks:
    """The parent process that all tests of one xdist worker share."""
    return ForkedRanks()


def serve() -> None:
    forked_runs.warm_up()

    from headwater.runs.executors import torchrun  # noqa: F401

    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(all_ranks(json.loads(line), Path(folder))), file=sink, flush=True)


def all_ranks(request: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size, began, pids = request["size"], time.monotonic(), {}
    for rank in range(size):
        (folder / str(rank)).mkdir()
        pid = os.fork()
        if pid == 0:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in world.items()}
            fault = request["faults"].get(str(rank))
            run_request = {"argv": request["argv"], "fault": fault, "user": None, "whole": False, "then": ""}
            try:
                forked_runs.child(run_request, folder / str(rank))
            finally:
                os._exit(99)
        pids[pid] = rank
    ended: dict[int, dict[str, Any]] = {}
    signals = list(request["signals"])
    while len(ended) < size:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            message = (folder / str(pids[pid]) / "err").read_text(errors="replace")
            code = os.waitstatus_to_exitcode(status)
            ended[pids[pid]] = {"code": code, "err": message, "seconds": time.monotonic() - began}
        for path, number in [signal for signal in signals if list(Path("/").glob(signal[0].lstrip("/")))]:
            signals.remove([path, number])
            for run_request in [pid for pid, rank in pids.items() if rank not in ended]:
                os.kill(run_request, number)
        if time.monotonic() - began > request["patience"]:
            for run_request in [pid for pid, rank in pids.items() if rank not in ended]:
                os.kill(run_request, 9)
        time.sleep(0.005)
    return [ended[rank] for rank in range(size)]


if __name__ == "__main__":
    serve()
