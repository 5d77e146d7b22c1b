"""Run somebody else's small program (a chat template) in this process, within bounds of time and memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Iterator

PAGE = resource.getpagesize()


class OutOfTimeError(Exception):
    """The time allowed is over."""


@contextlib.contextmanager
def within(seconds: float, megabytes: int) -> Iterator[None]:
    """Raises OutOfTimeError or MemoryError from the body when it takes more. Outside the main thread nothing is bounded.

    Time is bounded by an alarm, which only the main thread hears; memory by the address space of the whole process, so another
    thread's large allocation could fail meanwhile: keep bodies short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: object) -> None:
        raise OutOfTimeError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [one for one in (soft, hard, _used() + megabytes * 2**20) if one != resource.RLIM_INFINITY]
    handler = signal.signal(signal.SIGALRM, over)
    held = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # the alarm may go off on this very line
            signal.signal(signal.SIGALRM, handler)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if held[0]:
            signal.setitimer(signal.ITIMER_REAL, *held)


def _used() -> int:
    """Bytes of address space that the process has now; nothing known about it is no bound."""
    try:
        at = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return 1 << 62
    try:
        return int(os.read(at, 100).split()[0]) * PAGE
    finally:
        os.close(at)
