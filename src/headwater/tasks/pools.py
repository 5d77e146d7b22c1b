"""Disjoint pools of generated problems, and the random draws that generators make.

A problem's pool is a hash of its text, so pools share none for all seeds and difficulties.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Draw = Callable[[], float]  # uniform in [0, 1)

POOLS: dict[str, tuple[int, int]] = {
    "pretrain": (0, 128),
    "train": (128, 176),
    "unlabelled": (176, 224),
    "eval": (224, 256),
}
"""Range of the first hash byte. Pretraining uses the most problems, so it gets half of the range."""


def pool_of(task: str, text: str) -> str:
    """Pool of a problem of a task."""
    byte = hashlib.sha256(f"headwater-{task}:{text}".encode()).digest()[0]
    return next(name for name, (low, high) in POOLS.items() if low <= byte < high)


def check_request(task: str, n: int, pool: str) -> None:
    """Raise ValueError unless n problems of the pool can be asked for."""
    if pool not in POOLS:
        raise ValueError(f"{task}: no pool {pool!r}; the pools are {', '.join(POOLS)}")
    if n < 0:
        raise ValueError(f"{task}: cannot generate {n} problems")


def draws(task: str, n: int, pool: str, seed: int | str) -> Draw:
    """Random draws for n problems of a pool, the same for every n. Raises as `check_request` does."""
    check_request(task, n, pool)
    # Python guarantees the same sequence across versions for random() only, so nothing else is drawn from.
    return random.Random(f"{task}:{pool}:{seed}").random


def randint(draw: Draw, low: int, high: int) -> int:
    """Uniform integer, both ends inclusive."""
    return low + int(draw() * (high - low + 1))


def choice(draw: Draw, options: Sequence[T]) -> T:
    return options[int(draw() * len(options))]


def sample(draw: Draw, options: Sequence[T], count: int) -> list[T]:
    """`count` distinct options in random order."""
    remaining = list(options)
    return [remaining.pop(int(draw() * len(remaining))) for _ in range(count)]
