"""Disjoint pools of generated problems: a problem's pool is a hash of its text, so pools share none for all seeds and difficulties."""

from __future__ import annotations

import hashlib

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
