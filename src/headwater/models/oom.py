"""Retry on out-of-memory: halve the batch, run again, and remember the size that fits."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from headwater.errors import TrainingStoppedError
from headwater.types import Rollout

T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of glibc's mallopt(3)."""
OOM_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How RuntimeErrors of the CPU allocator and of GPU libraries report out-of-memory."""


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory instead of returning it to the system: every step allocates the same large tensors.

    Otherwise each allocation of some megabytes gets new pages, which the system must clear: 50 ms for 64 MiB against 9 ms to
    write it (measured on two virtual cores). Returns whether the C library supports it; elsewhere nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@dataclass
class BatchBudget:
    """The most that is processed at once (tokens of a pass, sequences of a decoding batch); it only shrinks."""

    size: int

    def fit(self, attempt: Callable[[int], T], most: int, least: int, unit: str, remedy: str) -> T:
        """Call `attempt(size)`; on out-of-memory, again with half the size, so each attempt must start from scratch.

        most   the total work: half of anything larger would change nothing
        least  the smallest indivisible piece

        Raises TrainingStoppedError if even `least` does not fit. Example: with room for 100 tokens,
        `BatchBudget(512).fit(f, 300, 40, …)` calls f(512), f(150), f(75) and leaves a size of 75.
        """
        while True:
            try:
                return attempt(self.size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: its traceback would keep every tensor of the attempt alive.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.size <= least:
                raise TrainingStoppedError(f"memory ran out even with {least} {unit} at a time; {remedy}")
            self.size = max(1, min(self.size, most) // 2)

    def fit_passes(self, attempt: Callable[[int], T], rollouts: Sequence[Rollout], settings: Sequence[str] = ()) -> T:
        """`fit` for forward or backward passes over rollouts, in microbatches of at most `size` tokens.

        settings  recipe settings that would lower the memory of these passes
        """
        longest = max((rollout.length for rollout in rollouts), default=1)
        remedies = ["shorten sampling.max_tokens or prompt.max_tokens", *(f"set {setting}" for setting in settings)]
        remedy = f"{', '.join(remedies)}, or take a larger device"
        return self.fit(attempt, longest * max(1, len(rollouts)), longest, "tokens (the longest row alone)", remedy)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that memory ran out, on a GPU or on the CPU.

    Example: `is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))` is True.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in OOM_MESSAGES)
