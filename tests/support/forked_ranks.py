"""Ranks of one run as forks of one process that has done the imports: real processes and a real gloo group.

run_ranks(2, "run", "pocket", "--out", out, faults={1: "step.ended:3=kill"})    # one Rank for each
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked_runs
from forked_runs import Place, request_of, warm_runs
from runs import free_port


@dataclass(frozen=True)
class Rank:
    """Result of one rank: exit code (negative for a signal), stdout, stderr, seconds since all ranks started."""

    code: int
    out: str
    err: str
    seconds: float


def run_ranks(
    size: int,
    *argv: str | Path,
    faults: Mapping[int, str] | None = None,
    signals: Sequence[tuple[str, int]] = (),
    patience: float = 120,
    script: str | Path | None = None,
) -> list[Rank]:
    """Run the program, or a script in its place, in several processes of one group.

    faults   rank -> fault to inject (`storage.fault_points`)
    signals  (file, signal number): sent to every rank once the file exists
    """
    request = {"size": size, "argv": [str(word) for word in argv], "faults": faults or {}, "signals": list(signals)}
    request |= {"patience": patience, "script": None if script is None else str(script)}
    return [Rank(**fields) for fields in warm_runs().ask("forked_ranks:all_ranks", request)]


def all_ranks(request: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    size, port, began, pids = request["size"], free_port(), time.monotonic(), {}
    for rank in range(size):
        (folder / str(rank)).mkdir()
        pid = os.fork()
        if pid == 0:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in world.items()}
            fault = request["faults"].get(str(rank))
            try:
                forked_runs.child(
                    request_of(request["argv"], Place(script=request["script"]), fault), folder / str(rank)
                )
            finally:
                os._exit(99)
        pids[pid] = rank
    ended: dict[int, dict[str, Any]] = {}
    signals = list(request["signals"])
    while len(ended) < size:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            printed = {name: (folder / str(pids[pid]) / name).read_text(errors="replace") for name in ("out", "err")}
            code = os.waitstatus_to_exitcode(status)
            ended[pids[pid]] = {"code": code, "seconds": time.monotonic() - began, **printed}
        for path, number in [due for due in signals if list(Path("/").glob(due[0].lstrip("/")))]:
            signals.remove([path, number])
            for running in [pid for pid, rank in pids.items() if rank not in ended]:
                os.kill(running, number)
        if time.monotonic() - began > request["patience"]:
            for running in [pid for pid, rank in pids.items() if rank not in ended]:
                os.kill(running, signal.SIGKILL)
        time.sleep(0.005)
    return [ended[rank] for rank in range(size)]
