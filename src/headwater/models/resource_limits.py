"""Limit the time and memory of untrusted code (a chat template) and untrusted sizes (a config) that run in this process."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

PAGE_BYTES = resource.getpagesize()
LAYOUT_SECONDS, LAYOUT_MB = 120.0, 4096
"""Limits of a model's layout, which takes under a second for any model whose weights exist."""


class OutOfTimeError(BaseException):
    """The time limit has passed. A BaseException, because Jinja's constant folding and other library code ignore an Exception."""


@contextlib.contextmanager
def resource_limits(seconds: float, megabytes: int) -> Iterator[None]:
    """Raises OutOfTimeError or MemoryError from the body if it takes more. Has no effect outside the main thread.

    Time is limited by SIGALRM, which only the main thread receives; memory by the address space of the whole process, so that
    another thread's large allocation could fail meanwhile: keep bodies short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_alarm(number: int, frame: object) -> None:
        raise OutOfTimeError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard, _used() + megabytes * 2**20) if limit != resource.RLIM_INFINITY]
    handler = signal.signal(signal.SIGALRM, on_alarm)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # the alarm may go off on this very line
            signal.signal(signal.SIGALRM, handler)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if timer[0]:
            signal.setitimer(signal.ITIMER_REAL, *timer)


@contextlib.contextmanager
def layout_limits() -> Iterator[None]:
    """Limits for reading a config and laying out its model without weights. Raises ValueError where it takes more."""
    try:
        with resource_limits(LAYOUT_SECONDS, LAYOUT_MB):
            yield
    except (OutOfTimeError, MemoryError):
        raise ValueError(
            f"laying out the model that its config.json describes takes more than {LAYOUT_SECONDS:g} seconds or {LAYOUT_MB} MiB"
        ) from None


def _used() -> int:
    """Bytes of address space in use; a number too large to limit anything on a system without /proc."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[0]) * PAGE_BYTES
    except OSError:
        return 1 << 62
