"""Runs of the program as forks of one process that has done the imports: real processes and signals, started in milliseconds.

    runs = ForkedRuns()                                # forks the parent process once
    runs.run("run", "pocket", "--out", out, fault="step.begun:3=kill").code    # -9

The parent is itself a fork of this process, from before its first backward pass (autograd refuses one in a fork of a process that
has run one). It has one thread and runs no backward pass, so that it can be forked safely. A child leads its own process group.
Preflight and the HTML page, the slowest parts, are skipped unless `whole`, and the page's figures if `undrawn`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TextIO
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
    out: str = ""


class ForkedRuns:
    def __init__(self) -> None:
        here, there = socket.socketpair()
        self._number = 0
        self._pid = os.fork()
        if self._pid == 0:
            here.close()
            serve(there.makefile("rw"))
        there.close()
        self._channel = here.makefile("rw")
        atexit.register(self.close)

    def run(
        self,
        *argv: str | Path,
        fault: str | None = None,
        kill_after: float | None = None,
        signals: Sequence[tuple[float, int]] = (),
        user: int | None = None,
        whole: bool = False,
        undrawn: bool = False,
        then: str = "",
        patience: float = 280,
        place: Place | None = None,
    ) -> ProcessResult:
        """One run of the program.

        fault       what happens at which point (`headwater.storage.fault_points`)
        kill_after  seconds until its whole process group is killed, if it is still there
        signals     (seconds, number) sent to it alone
        user        id of the user that it runs as
        whole       with preflight and the HTML page
        undrawn     with empty figures on that page
        patience    seconds after which a run that should have ended is killed
        then        a point that stops at its first arrival until a second run of the same program has ended; see `err`
        """
        request = request_of(argv, place, fault) | {
            "kill_after": kill_after, "signals": list(signals), "user": user, "whole": whole, "undrawn": undrawn,
            "then": then, "patience": patience,
        }  # fmt: skip
        result = self.ask("forked_runs:one_run", request)
        return ProcessResult(**{**result, "usage": [tuple(sample) for sample in result["usage"]]})

    def ask(self, function: str, request: dict[str, Any]) -> Any:
        """Result of a function `module:name`, called in the parent with the request and an empty folder."""
        self._number += 1
        print(json.dumps([self._number, function, request]), file=self._channel, flush=True)
        number = 0
        while number != self._number:  # skip the result of an earlier run that timed out here
            line = self._channel.readline()
            assert line, "the parent process has ended"
            number, result = json.loads(line)
        return result

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


@dataclass(frozen=True)
class Place:
    """Where and from what a child runs.

    cwd     its working directory, which Python also imports from
    source  folder of another copy of the package to import; the libraries stay those that the parent has imported
    script  Python file, or name of a module, to run instead of the program
    """

    cwd: Path | None = None
    source: Path | None = None
    script: Path | str | None = None


def request_of(argv: Sequence[str | Path], place: Place | None = None, fault: str | None = None) -> dict[str, Any]:
    """What `child` is asked to run, with the defaults of `ForkedRuns.run`."""
    where = {name: None if path is None else str(path) for name, path in vars(place or Place()).items()}
    plain = {"user": None, "whole": False, "undrawn": False, "then": ""}
    return {"argv": [str(word) for word in argv], "fault": fault, **plain, **where}


@cache
def warm_runs() -> ForkedRuns:
    """The parent process that all tests of one xdist worker share. conftest.py forks it when the tests are collected."""
    return ForkedRuns()


def serve(channel: TextIO) -> NoReturn:
    """Parent process: answer requests, a line each, until the process that forked it ends."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "dumb", "TOKENIZERS_PARALLELISM": "false"}
        for line in channel:
            warm_up()
            number, function, request = json.loads(line)
            module, name = function.split(":")
            with tempfile.TemporaryDirectory() as folder:
                result = getattr(importlib.import_module(module), name)(request, Path(folder))
            print(json.dumps([number, result]), file=channel, flush=True)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    os._exit(1)


@cache
def warm_up() -> None:
    import torch

    torch.set_num_threads(1)
    import headwater.cli.main
    import headwater.pipeline
    import headwater.report.build
    import headwater.runs.executors.local
    import headwater.runs.executors.torchrun
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
    TorchSampler(policy).sample(requests_for([("p", (1, 5, 15, 6, 2))], 2, "warm"), Sampling(max_tokens=3))
    gc.freeze()  # the children's full collections then skip the objects of the libraries


def one_run(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    if request["user"] is not None:
        folder.chmod(0o777)
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
        **{
            name: path.read_text(errors="replace") if (path := folder / name).exists() else ""
            for name in ("err", "out")
        },
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
    main = entry(request)
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
        if request["undrawn"]:
            stack.enter_context(mock.patch("headwater.report.figures.as_file", return_value="<svg><g></g></svg>"))
        stack.enter_context(mock.patch.object(sys, "argv", ["headwater", *request["argv"]]))
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    (folder / "arrivals").write_text(json.dumps(arrivals))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def entry(request: dict[str, Any]) -> Callable[[], object]:
    """Go where the request wants to run, and return what it runs there."""
    if request["cwd"] is not None:
        os.chdir(request["cwd"])
        sys.path.insert(0, request["cwd"])
    if request["source"] is not None:
        own = str(Path(__file__).parent)
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in ("headwater", "tests", "tools") or (
                getattr(module, "__file__", None) or ""
            ).startswith(own):
                del sys.modules[name]
        sys.path.insert(0, request["source"])
    if (script := request["script"]) is not None:
        run = runpy.run_path if script.endswith(".py") else runpy.run_module
        return lambda: run(script, run_name="__main__")
    from headwater.cli.main import main

    return main


def rerun(argv: list[str], folder: Path) -> None:
    """Run the same command in a second process and print its result to this one's stderr."""
    there = folder / "second"
    there.mkdir()
    result = one_run(request_of(argv) | {"kill_after": None, "signals": [], "patience": 60}, there)
    print(f"second: {result['code']}: {result['err'].strip().splitlines()[-1]}", file=sys.stderr, flush=True)
