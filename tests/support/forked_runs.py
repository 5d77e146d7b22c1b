"""Runs of the program as forks of one process that has done the imports: real processes and signals, started in milliseconds.

    runs = ForkedRuns()                                # starts the parent process once
    runs.run("run", "pocket", "--out", out, fault="step.begun:3=kill").code    # -9

The parent has one thread and never runs a backward pass, so that it can be forked safely. A child leads its own process group.
Preflight and the HTML page, the slowest parts, are skipped unless `whole`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from headwater.doctor.checks import Examination, preflight
from headwater.report.html import Page
from headwater.runs.setup import prepared


@dataclass(frozen=True)
class ProcessResult:
    """Result of a child. `code` is negative for a signal; `arrivals` counts visits of each fault point if the child exited by itself.

    usage  samples twice a second: (seconds, bytes of memory, open files)
    """

    code: int
    err: str
    seconds: float
    arrivals: dict[str, int]
    usage: list[tuple[float, int, int]]


class ForkedRuns:
    def __init__(self) -> None:
        self._number = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        atexit.register(self.close)

    def run(
        self,
        *argv: str | Path,
        fault: str | None = None,
        kill_after: float | None = None,
        signals: Sequence[tuple[float, int]] = (),
        user: int | None = None,
        whole: bool = False,
        then: str = "",
        patience: float = 280,
    ) -> ProcessResult:
        """One run of the program.

        fault       what happens at which point (`headwater.storage.fault_points`)
        kill_after  seconds until its whole process group is killed, if it is still there
        signals     (seconds, number) sent to it alone
        user        id of the user that it runs as
        patience    seconds after which a run that should have ended is killed
        then        a point that stops at its first arrival until a second run of the same program has ended; see `err`
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._number += 1
        request = {
            "number": self._number,
            "argv": [str(word) for word in argv], "fault": fault, "kill_after": kill_after, "signals": list(signals),
            "user": user, "whole": whole, "then": then, "patience": patience,
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        result: dict[str, Any] = {"number": 0}
        while result["number"] != self._number:  # skip the result of an earlier run that timed out here
            line = self._process.stdout.readline()
            assert line, "the warm process is gone"
            result = json.loads(line)
        del result["number"]
        return ProcessResult(**{**result, "usage": [tuple(sample) for sample in result["usage"]]})

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@cache
def warm_runs() -> ForkedRuns:
    """The parent process that all tests of one xdist worker share."""
    return ForkedRuns()


def serve() -> None:
    """Parent process: fork a child for every request line on stdin and print its result."""
    warm_up()
    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            if request["user"] is not None:
                os.chmod(folder, 0o777)
            print(json.dumps({"number": request["number"], **one_run(request, Path(folder))}), file=sink, flush=True)


def warm_up() -> None:
    import torch

    torch.set_num_threads(1)
    import headwater.cli.main
    import headwater.pipeline
    import headwater.report.build
    import headwater.runs.executors.local
    import headwater.runs.progress  # noqa: F401
    from headwater.config.builtin import find_recipe
    from headwater.config.stage import Sampling
    from headwater.models.folder import ModelFolder
    from headwater.models.load import LoadOptions, load_policy
    from headwater.sampling.base import requests_for
    from headwater.sampling.torch_sampler import TorchSampler
    from runs import TINY

    recipe = find_recipe("pocket", list(TINY))
    with prepared(recipe, ["bridge"], [0]) as (plan, inputs):
        preflight(
            plan, inputs
        )  # imports what is loaded on first use, such as jinja2; a child of another user may not read it
    policy = load_policy(
        ModelFolder.open("pocket:qwen3-student", "models.student"),
        LoadOptions(recipe.models, torch.device("cpu"), frozen=True),
    )
    TorchSampler(policy).sample(requests_for([("p", (1, 5, 15, 6, 2))], 2, 0, "warm"), Sampling(max_tokens=3))


def one_run(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            child(request, folder)
        finally:
            os._exit(99)
    until = began + (request["kill_after"] or request["patience"])
    usage: list[tuple[float, int, int]] = []
    signals = sorted((began + after, number) for after, number in request["signals"])
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        now = time.monotonic()
        if ended:
            break
        while signals and now >= signals[0][0]:
            os.kill(pid, signals.pop(0)[1])
        if now >= until:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        if now - began > 0.1 * (len(usage) + 1):
            usage.append((now - began, *process_usage(pid)))
        time.sleep(0.002)
    arrivals = folder / "arrivals"
    return {
        "code": os.waitstatus_to_exitcode(status),
        "err": (folder / "err").read_text(errors="replace") if (folder / "err").exists() else "",
        "seconds": time.monotonic() - began,
        "arrivals": json.loads(arrivals.read_text()) if arrivals.exists() else {},
        "usage": usage,
    }


def process_usage(pid: int) -> tuple[int, int]:
    """(resident bytes, number of open files) of a process; zeros if it has ended."""
    with contextlib.suppress(OSError, IndexError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))
    return 0, 0


def child(request: dict[str, Any], folder: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT by default
    if request["user"] is not None:
        os.setgid(request["user"])
        os.setuid(request["user"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o666), number)
    sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w", buffering=1)
    from headwater.cli.main import main
    from headwater.storage import fault_points

    arrivals: Counter[str] = Counter()
    fault = fault_points.parse_fault(request["fault"]) if request["fault"] else lambda name: None

    def arrived(name: str) -> None:
        arrivals[name] += 1
        if name == request["then"] and arrivals[name] == 1:
            rerun(request["argv"], folder)
        fault(name)

    fault_points.arm(arrived)
    code: Any = 0
    with contextlib.ExitStack() as stack:
        if not request["whole"]:
            stack.enter_context(mock.patch("headwater.doctor.checks.examine", return_value=Examination((), (), ())))
            stack.enter_context(mock.patch("headwater.report.html.page", return_value=Page("")))
        stack.enter_context(mock.patch.object(sys, "argv", ["headwater", *request["argv"]]))
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
    (folder / "arrivals").write_text(json.dumps(arrivals))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def rerun(argv: list[str], folder: Path) -> None:
    """Run the same command in a second process and print its result to this one's stderr."""
    there = folder / "second"
    there.mkdir()
    request = {"argv": argv, "fault": None, "kill_after": None, "signals": [], "user": None, "whole": False, "then": ""}
    result = one_run({**request, "patience": 60}, there)
    print(f"second: {result['code']}: {result['err'].strip().splitlines()[-1]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    serve()
