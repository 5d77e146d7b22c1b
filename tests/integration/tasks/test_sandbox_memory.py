"""Memory of a sandboxed run: all of its processes, their shared memory and their folder together stay within one bound."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from headwater.tasks import sandbox

PAGE_BYTES = 4096
LIMITS = sandbox.Limits(seconds=30.0)
HOG = """
import mmap, os
blocks = []
def fill(shared):
    flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
    size = 1 << 25
    while size >= mmap.PAGESIZE:
        try:
            block = mmap.mmap(-1, size, flags=flags)
        except (OSError, MemoryError):
            size //= 2
            continue
        for place in range(0, size, mmap.PAGESIZE):
            block[place] = 1
        blocks.append(block)
def fill_folder():
    written = 0
    try:
        for number in range(100):
            with open(str(number), "wb", buffering=0) as file:
                for _ in range(16):
                    written += file.write(bytes(2**20))
    except OSError:
        pass
    return written
"""
"""Takes memory of each kind until the kernel refuses more."""


def resident_bytes(server: int) -> int:
    """Resident memory of the server's children: heaps, shared memory and the parts of libraries in use."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text(encoding="ascii").split()
    total = 0
    for child in children:
        try:
            total += int(Path(f"/proc/{child}/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES
        except OSError:  # it has just ended
            continue
    return total


@pytest.mark.parametrize("shared", [False, True], ids=["heap", "shared memory"])
def test_memory_of_both_processes_and_folder_is_bounded_together(shared: bool) -> None:
    if "private root" not in sandbox.layers():
        pytest.skip("no memory file system can be mounted here: the memory of the whole run was NOT tested")
    solution = f"{HOG}\nwritten = fill_folder()\nfill({shared})\ndef f():\n    return written"
    tests = f"{HOG}\nfill({shared})\nassert 60 * 2**20 < f() <= 64 * 2**20\nimport time\ntime.sleep(0.5)"
    server = sandbox._servers[()].process.pid
    peak, ended = [0], threading.Event()

    def measure() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], resident_bytes(server))

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        result = sandbox.run(solution, tests, limits=LIMITS)
    finally:
        ended.set()
        thread.join()
    most = (LIMITS.solution_mb + LIMITS.tests_mb) * 2**20
    assert result.passed, result
    assert 0.8 * most < peak[0] <= most  # the programs took what they could get, and no more


def test_limits_of_one_run_sum_to_documented_bound() -> None:
    documented = (Path(__file__).parents[3] / "docs" / "safety.md").read_text(encoding="utf-8")
    shares = (LIMITS.solution_mb, LIMITS.tests_mb, LIMITS.folder_mb, 64)
    assert sum(shares) == 512 and "memory of 512 MiB in all" in documented
    assert all(f"{share} MiB" in documented for share in shares)
