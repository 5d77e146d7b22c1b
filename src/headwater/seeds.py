"""One rule for every random draw: a draw is named by what it is for, never by when it happens.

A seed depends on (run seed, stage, step, problem, sample) and on nothing else, so that neither the batch order, nor the
batch size, nor a resume in between changes any draw.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(*parts: str | int) -> int:
    """A 128-bit seed named by its parts.

    Example: `seed_of(0, "opd", 3, "a1b2", 7)` is the seed of run 0, stage opd, step 3, problem a1b2, sample 7.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(*parts: str | int) -> np.random.Generator:
    """A counter-based generator (Philox) named by its parts; cheap enough to make one for every rollout."""
    return np.random.Generator(np.random.Philox(key=seed_of(*parts)))


def uniforms(count: int, *parts: str | int) -> np.ndarray:
    """`count` float64 draws in [0, 1) named by their parts: draw t decides token t of a rollout."""
    return generator(*parts).random(count)


def shuffled(items: list[str], *parts: str | int) -> list[str]:
    """The items in an order named by the parts; the order given does not matter (they are sorted by hash)."""
    return sorted(items, key=lambda item: hashlib.blake2b(f"{parts}\x1f{item}".encode(), digest_size=16).digest())
