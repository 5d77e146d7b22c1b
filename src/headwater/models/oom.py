"""When memory runs out: halve how much is done at once, do it again, and remember what fitted."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from headwater.errors import TrainingStoppedError
from headwater.losses.batch import Row
from headwater.types import Rollout

T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's mallopt(3)."""
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What a RuntimeError says when the CPU's allocator or a GPU's library finds no memory."""


def keep_freed_memory() -> bool:
    """Let the C library use freed memory again instead of giving it back: the same large tensors come and go in every step.

    Otherwise each one of some megabytes is new pages, which the system must clear: 50 ms for 64 MiB against 9 ms to write it (measured
    on two virtual cores). Returns whether this C library can (glibc); elsewhere nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@dataclass
class BatchBudget:
    """How much may be done at once (tokens of a pass, sequences of a decoding batch); it only ever falls."""

    size: int

    def fit(self, attempt: Callable[[int], T], most: int, least: int, unit: str, remedy: str) -> T:
        """`attempt(size)`, again with half of it whenever memory runs out, so it must begin anew each time.

        most   what there is to do: half of anything more would change nothing
        least  the smallest piece that cannot be divided; when that does not fit either, nothing will

        Raises TrainingStoppedError in that case. Example: with room for 100 tokens, `Budget(512).fit(f, 300, 40, …)` calls
        f(512), f(150), f(75) and leaves a size of 75.
        """
        while True:
            try:
                return attempt(self.size)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            # Past the handler: its traceback would hold every tensor of the attempt alive.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.size <= least:
                raise TrainingStoppedError(f"memory ran out even with {least} {unit} at a time; {remedy}")
            self.size = max(1, min(self.size, most) // 2)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU.

    Example: `out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))` is True.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def width(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def passes(budget: BatchBudget, rollouts: Sequence[Rollout], attempt: Callable[[int], T]) -> T:
    """`attempt(tokens)` for forward or backward passes over these rollouts, in microbatches of what fits."""
    longest = max((width(one) for one in rollouts), default=1)
    remedy = (
        "shorten sampling.max_tokens or prompt.max_tokens, set models.gradient_checkpointing or models.dtype bfloat16, "
        "or take a larger device"
    )
    return budget.fit(attempt, longest * max(1, len(rollouts)), longest, "tokens (the longest row alone)", remedy)


def passes_over(budget: BatchBudget, rows: Sequence[Row], attempt: Callable[[int], T]) -> T:
    return passes(budget, [row.rollout for row in rows], attempt)
