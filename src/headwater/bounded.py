"""Run somebody else's small program (a chat template) in this process, within bounds of time and memory."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path


class OutOfTimeError(Exception):
    """The time allowed is over."""


@contextlib.contextmanager
def within(seconds: float, megabytes: int) -> Iterator[None]:
    """Raises OutOfTimeError or MemoryError from the body when it takes more; best effort where it cannot be bounded.

    Time is bounded in the main thread alone, where signals are heard; memory by the address space of the whole process, so
    another thread's large allocation could fail meanwhile: keep bodies short.
    """
    main = threading.current_thread() is threading.main_thread()

    def over(number: int, frame: object) -> None:
        raise OutOfTimeError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _used() + megabytes * 2**20
    bounds = [one for one in (soft, hard, limit) if one != resource.RLIM_INFINITY]
    handler = signal.signal(signal.SIGALRM, over) if main else None
    held = signal.setitimer(signal.ITIMER_REAL, seconds) if main else (0.0, 0.0)
    try:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
        yield
    finally:
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, *held)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _used() -> int:
    """Bytes of address space that the process has now; nothing known about it is no bound."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 1 << 62
