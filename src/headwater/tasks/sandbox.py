"""Run untrusted Python with limits: in a process of its own, in an empty folder, without network, environment or friends.

`sandbox_child` runs inside and shuts the doors; this side starts it, waits, kills and judges. What counts as passed is a
random proof that the child reads only after the last test: an exit code or a printed word says nothing.
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
    """What one run may use. `processes` counts threads; new processes are refused altogether where seccomp is there."""

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
    """Run a solution and then its tests.

    Example: `run("def f(x): return 2 * x", "assert f(2) == 4").passed` is True.
    """
    _sweep()
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
        with tempfile.TemporaryFile() as box:
            box.write(b"%08d" % len(setup) + setup + parts[0] + parts[1] + proof.encode())
            box.seek(0)
            process = subprocess.Popen(
                # The environment is ours, so -I would only keep the hash seed from being fixed.
                [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", str(CHILD)],
                stdin=box,
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
        said, late = _listen(process, limits.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _judge(said, late, process.returncode, proof)


def _listen(process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, bool]:
    """What the child reported until its end, and whether it had to be ended for its time."""
    assert process.stdout is not None
    deadline, said, late = time.monotonic() + seconds, b"", False
    try:
        while len(said) <= LONGEST_REPORT:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                late = True
                break
            more = os.read(process.stdout.fileno(), 4096)
            if not more:
                break
            said += more
        # Nobody holds the pipe any more; a process that closed it and lives on is ended all the same.
        if not late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(0.2, max(0.0, deadline - time.monotonic())))
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()
    return said, late


def _judge(said: bytes, late: bool, status: int, proof: str) -> Outcome:
    try:
        told: Any = json.loads(said)
    except (ValueError, RecursionError):
        told = None
    told = told if isinstance(told, dict) else {}
    layers = told.get("layers")
    named = tuple(str(one) for one in layers) if isinstance(layers, list) else ()
    failed = str(told.get("failed", ""))[:200]
    if not late and told.get("proof") == proof and not failed:
        return Outcome(True, "equal", "", named)
    if late or status in (-signal.SIGXCPU,):
        return Outcome(False, "timeout", "", named)
    if failed == "MemoryError" or (status == -signal.SIGKILL and not said):
        return Outcome(False, "memory", failed, named)
    if told.get("at") == "tests" and failed not in ("", "SystemExit"):
        return Outcome(False, "different", failed, named)
    return Outcome(False, "error", failed or f"ended with status {status} before its tests did", named)


@cache
def layers() -> tuple[str, ...]:
    """Which doors this machine lets a sandbox shut; a trial run tells. Example: `("network namespace", …, "limits")`."""
    return run("", "pass").layers


@cache
def _sweep() -> None:
    """Remove folders whose makers were killed before they could."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        maker = path.name.removeprefix(PREFIX).partition("-")[0]
        if maker.isdigit() and not Path(f"/proc/{maker}").exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)
