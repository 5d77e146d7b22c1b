"""Packed token ids of a teacher cache: round trip and size."""

from __future__ import annotations

import pytest
import torch

from headwater.teachers.compact_ids import pack_ids, unpack_ids


@pytest.mark.parametrize(
    ("vocabulary", "bytes_of_64"), [(30, 128), (65_536, 128), (65_537, 144), (151_936, 144), (262_144, 144), (300_000, 256)]
)  # fmt: skip
@pytest.mark.parametrize("kept", [1, 3, 4, 64])
def test_compact_ids_round_trip(vocabulary: int, bytes_of_64: int, kept: int) -> None:
    ids = torch.randint(0, vocabulary, (50, kept), generator=torch.Generator().manual_seed(0))
    ids[0, 0], ids[1, 0] = 0, vocabulary - 1
    stored = pack_ids(ids, vocabulary)
    assert torch.equal(unpack_ids(stored), ids.int())
    if kept == 64:
        assert sum(array.nbytes for array in stored.values()) == 50 * bytes_of_64


def test_top_64_of_large_vocabulary_takes_under_300_bytes_per_token() -> None:
    ids = torch.randint(0, 151_936, (10, 64))
    logp = torch.randn(10, 64).half()
    assert (sum(array.nbytes for array in pack_ids(ids, 151_936).values()) + logp.nbytes) / 10 == 272
