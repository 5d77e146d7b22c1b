"""Run untrusted Python in sandboxed processes, one for a solution and one for its tests.

A server (`sandbox_child`) forks both for each run, and they confine themselves before they read any code (`sandbox_confine`). The
tests' process calls the solution's by messages of plain data and reports the verdict here; the solution's process has no part in that.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from headwater.errors import one_line

LONGEST_REPORT = 10_000
FAILURES = ("different", "error", "unsupported", "memory")
"""Reasons that a report may give besides `equal`."""
BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from headwater.tasks import sandbox_child; del sys.path[0]; "
    "sandbox_child.serve()"
)


@dataclass(frozen=True)
class Limits:
    """Resource limits of one run; its memory is 512 MiB in all, with at most 64 MiB of the kernel's buffers for it.

    seconds      of both processes together; of processor time for each
    solution_mb  address space of the solution's process, shared memory included
    tests_mb     address space of the tests' process
    folder_mb    of the folder, which both share
    processes    threads; no process can be started
    """

    seconds: float = 30.0
    solution_mb: int = 256
    tests_mb: int = 128
    file_mb: int = 16
    folder_mb: int = 64
    open_files: int = 64
    processes: int = 32


@dataclass(frozen=True)
class Outcome:
    """Example: `Outcome(passed=False, reason="different", detail="AssertionError", layers=("seccomp", …))`.

    reason  `equal`, `different` (a test failed), `error` (the solution does not load or ends its process), `unsupported` (the tests
            need an object of the solution's in a way that would let it decide the verdict), `timeout`, `memory`
    """

    passed: bool
    reason: str
    detail: str
    layers: tuple[str, ...]


class Server:
    """The process that forks the runs. It ends when this object's socket is closed, as when this process ends.

    without  layers to leave out, for tests of the others: `namespaces`, `private root`, `user`, `landlock`, `seccomp`
    """

    def __init__(self, without: tuple[str, ...]) -> None:
        self.owner = os.getpid()
        self.control, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with child:
            self.process = subprocess.Popen(
                # Not -I: it would ignore PYTHONHASHSEED. The environment below is complete.
                [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", BOOT, str(Path(__file__).parents[2])],
                stdin=child.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={
                    "PATH": "/usr/bin:/bin",
                    "HOME": "/work",
                    "TMPDIR": "/work",
                    "LANG": "C.UTF-8",
                    "PYTHONHASHSEED": "0",
                },
                start_new_session=True,
            )
        self.control.send(json.dumps({"without": without}).encode())

    def close(self) -> None:
        self.control.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()

    def run(self, job: bytes, limits: Limits) -> tuple[bytes, bool, list[int]]:
        """(report of the tests' process, whether time ran out, exit statuses of the solution's and the tests' process)."""
        deadline = time.monotonic() + limits.seconds
        channel, child = socket.socketpair()
        with channel, child:
            socket.send_fds(self.control, [json.dumps({"limits": asdict(limits)}).encode()], [child.fileno()])
            child.close()
            report, timed_out = _exchange(channel, b"%012d" % len(job) + job, deadline)
        self.control.send(b".")
        return report, timed_out, json.loads(self.control.recv(1000))


def _exchange(channel: socket.socket, job: bytes, deadline: float) -> tuple[bytes, bool]:
    """Send a job to the tests' process; its report, and whether the deadline passed first."""
    report = b""
    try:
        channel.settimeout(max(deadline - time.monotonic(), 0.001))
        channel.sendall(job)
        while len(report) <= LONGEST_REPORT:
            channel.settimeout(max(deadline - time.monotonic(), 0.001))
            data = channel.recv(4096)
            if not data:
                break
            report += data
    except TimeoutError:
        return report, True
    except OSError:  # the process has ended
        pass
    return report, False


_servers: dict[tuple[str, ...], Server] = {}
_lock = threading.Lock()


def run(
    code: str,
    tests: str,
    entry_point: str | None = None,
    limits: Limits = Limits(),
    without: tuple[str, ...] = (),
) -> Outcome:
    """Run a solution and its tests in fresh processes, one run at a time. Raises OSError if the server cannot be used.

    Example: `run("def f(x): return 2 * x", "assert f(2) == 4").passed` is True.
    """
    job = json.dumps({"code": code, "tests": tests, "entry_point": entry_point}).encode()
    with _lock:
        server = _servers.get(without)
        if server is None or server.owner != os.getpid() or server.process.poll() is not None:
            server = _servers[without] = Server(without)
        try:
            report, timed_out, statuses = server.run(job, limits)
        except BaseException:  # a late reply of the server would be taken for the next run's
            server.close()
            del _servers[without]
            raise
    return _outcome(report, timed_out, statuses)


def _outcome(report: bytes, timed_out: bool, statuses: list[int]) -> Outcome:
    """Interpret a report. It may be cut or missing where the tests' process was ended, and hostile tests may write anything there."""
    try:
        fields = json.loads(report)
    except (ValueError, RecursionError):
        fields = {}
    fields = fields if isinstance(fields, dict) else {}
    layers, reason, detail = fields.get("layers"), fields.get("reason"), fields.get("detail")
    layers = tuple(map(str, layers)) if isinstance(layers, list) else ()
    if timed_out or -signal.SIGXCPU in statuses:
        return Outcome(False, "timeout", "", layers)
    if fields.get("passed") is True and reason == "equal":
        return Outcome(True, "equal", "", layers)
    if reason in FAILURES and isinstance(detail, str):
        return Outcome(False, reason, one_line(detail), layers)
    killed = statuses[1] == -signal.SIGKILL
    return Outcome(False, "memory" if killed else "error", f"ended with statuses {statuses}", layers)


@cache
def layers() -> tuple[str, ...]:
    """Restrictions that this machine supports, found by a trial run. Example: `("seccomp", "private root", …, "limits")`."""
    try:
        return run("", "pass").layers
    except (OSError, ValueError):  # the server does not start
        return ()


def refusal() -> str | None:
    """Why this machine cannot confine a program: it has no system-call filter. None if it can."""
    if "seccomp" in layers():
        return None
    present = ", ".join(layers()) or "none"
    return (
        f"this machine cannot confine programs by seccomp (its protections: {present}); grade on Linux with x86-64 or ARM64, or accept "
        "the risk with compute.sandbox=optional in a recipe"
    )
