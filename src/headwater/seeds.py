"""Named random streams: a seed derives from what a draw is for, not from when it happens.

A seed depends only on (run seed, stage, step, problem, sample), so batch order, batch size and a resume change no draw.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np


def seed_of(*parts: str | int) -> int:
    """Hash the parts into a 128-bit seed.

    Example: `seed_of(0, "opd", 3, "a1b2", 7)` is the seed of run 0, stage opd, step 3, problem a1b2, sample 7.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(*parts: str | int) -> np.random.Generator:
    """Counter-based generator (Philox) seeded by the parts; cheap enough to create one per rollout."""
    return np.random.Generator(np.random.Philox(key=seed_of(*parts)))


def uniforms(count: int, *parts: str | int) -> np.ndarray:
    """`count` float64 draws in [0, 1), seeded by the parts: draw t decides token t of a rollout."""
    return generator(*parts).random(count)


def shuffled(items: list[str], *parts: str | int) -> list[str]:
    """Shuffle the items by hash, seeded by the parts; the input order does not matter."""
    return sorted(items, key=lambda item: hashlib.blake2b(f"{parts}\x1f{item}".encode(), digest_size=16).digest())


@contextlib.contextmanager
def python_draws(*parts: str | int) -> Iterator[None]:
    """Seed Python's global `random` by the parts for library code, and restore its state afterwards."""
    state = random.getstate()
    random.seed(seed_of(*parts))
    try:
        yield
    finally:
        random.setstate(state)
