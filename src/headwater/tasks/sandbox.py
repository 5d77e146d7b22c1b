"""Run untrusted Python in a sandboxed process: limits, an empty folder, no network, no inherited environment.

`sandbox_child` runs inside and restricts itself; this module starts it, enforces the time limit and interprets the report.
Passing is proven by a random token that the child reads only after the last test: code under test can fake an exit code or
output, but not the token.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("sandbox_child.py")
PREFIX = "headwater-sandbox-"
LONGEST_REPORT = 10_000


@dataclass(frozen=True)
class Limits:
    """Resource limits of one run. `processes` counts threads; with seccomp, new processes are refused altogether."""

    seconds: float = 30.0
    memory_mb: int = 512
    file_mb: int = 16
    folder_mb: int = 64
    open_files: int = 64
    processes: int = 32


@dataclass(frozen=True)
class Outcome:
    """Example: `Outcome(passed=False, reason="different", detail="AssertionError", layers=("landlock 7", …))`.

    reason  `equal`, `different` (a test failed), `error` (the solution does not load or ends the process), `timeout`,
            `memory`
    """

    passed: bool
    reason: str
    detail: str
    layers: tuple[str, ...]


def run(code: str, tests: str, entry_point: str | None = None, limits: Limits = Limits()) -> Outcome:
    """Run a solution, then its tests, in a fresh sandbox.

    Example: `run("def f(x): return 2 * x", "assert f(2) == 4").passed` is True.
    """
    _remove_stale_folders()
    proof = secrets.token_hex(16)
    parts = [text.encode("utf-8", "surrogatepass") for text in (code, tests)]
    setup = json.dumps(
        {
            **asdict(limits),
            "parent": os.getpid(),
            "code": len(parts[0]),
            "tests": len(parts[1]),
            "entry_point": entry_point,
        }
    ).encode()
    folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")
    try:
        with tempfile.TemporaryFile() as payload:
            payload.write(b"%08d" % len(setup) + setup + parts[0] + parts[1] + proof.encode())
            payload.seek(0)
            process = subprocess.Popen(
                # Not -I: it would ignore PYTHONHASHSEED. The environment below is complete.
                [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", str(CHILD)],
                stdin=payload,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={
                    "PATH": "/usr/bin:/bin",
                    "HOME": folder,
                    "TMPDIR": folder,
                    "LANG": "C.UTF-8",
                    "PYTHONHASHSEED": "0",
                },
                start_new_session=True,
            )
        report, timed_out = _read_report(process, limits.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _outcome(report, timed_out, process.returncode, proof)


def _read_report(process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, bool]:
    """The child's report, and whether it was killed at the time limit."""
    assert process.stdout is not None
    deadline, report, timed_out = time.monotonic() + seconds, b"", False
    try:
        while len(report) <= LONGEST_REPORT:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([process.stdout], [], [], remaining)[0]:
                timed_out = True
                break
            data = os.read(process.stdout.fileno(), 4096)
            if not data:
                break
            report += data
        # The pipe is closed. A process that keeps running without it is killed below.
        if not timed_out:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(0.2, max(0.0, deadline - time.monotonic())))
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()
    return report, timed_out


def _outcome(report: bytes, timed_out: bool, status: int, proof: str) -> Outcome:
    """Interpret a report. It is untrusted: the code under test may have written it."""
    try:
        fields: Any = json.loads(report)
    except (ValueError, RecursionError):
        fields = None
    fields = fields if isinstance(fields, dict) else {}
    names = fields.get("layers")
    layers = tuple(str(name) for name in names) if isinstance(names, list) else ()
    failure = str(fields.get("failed", ""))[:200]
    if not timed_out and fields.get("proof") == proof and not failure:
        return Outcome(True, "equal", "", layers)
    if timed_out or status == -signal.SIGXCPU:
        return Outcome(False, "timeout", "", layers)
    if failure == "MemoryError" or (status == -signal.SIGKILL and not report):
        return Outcome(False, "memory", failure, layers)
    if fields.get("at") == "tests" and failure not in ("", "SystemExit"):
        return Outcome(False, "different", failure, layers)
    return Outcome(False, "error", failure or f"ended with status {status} before its tests did", layers)


@cache
def layers() -> tuple[str, ...]:
    """Restrictions that this machine supports, found by a trial run. Example: `("network namespace", …, "limits")`."""
    return run("", "pass").layers


@cache
def _remove_stale_folders() -> None:
    """Remove folders of processes that were killed before they could clean up."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        pid = path.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)
