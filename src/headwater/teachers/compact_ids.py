"""Bit-packing of token ids, which make up most of a top-k teacher cache.

Bytes per id: 2 for a vocabulary of up to 65,536; 2.25 up to 262,144 (the two high bits are stored separately, four ids to
a byte); 4 above that.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LOW_BITS, HIGH_BITS = 16, 2


def pack_ids(ids_NK: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """Pack ids (N, K) into named tensors for storage.

    Example: of 151,936 entries, 64 ids a token take 128 bytes in `ids_low` and 16 in `ids_high`.
    """
    if vocabulary > 1 << (LOW_BITS + HIGH_BITS):
        return {"ids": ids_NK.int()}
    ids_NK = ids_NK.int()
    stored = {"ids_low": ((ids_NK & 0xFFFF) - 0x8000).to(torch.int16)}
    if vocabulary > 1 << LOW_BITS:
        high_NK = ids_NK >> LOW_BITS
        high_NQ4 = torch.nn.functional.pad(high_NK, (0, -ids_NK.shape[1] % 4)).unflatten(1, (-1, 4))
        shifts_4 = torch.arange(0, 8, HIGH_BITS, device=ids_NK.device, dtype=torch.int32)
        stored["ids_high"] = (high_NQ4 << shifts_4).sum(dim=-1).to(torch.uint8)
    return stored


def unpack_ids(stored: Mapping[str, Tensor]) -> Tensor:
    """Unpack the tensors of `pack_ids`: ids (N, K), int32."""
    if "ids" in stored:
        return stored["ids"]
    ids_NK = stored["ids_low"].int() + 0x8000
    if "ids_high" in stored:
        shifts_4 = torch.arange(0, 8, HIGH_BITS, dtype=torch.int32)
        high_NQ4 = (stored["ids_high"].int()[..., None] >> shifts_4) & (2**HIGH_BITS - 1)
        ids_NK = ids_NK | (high_NQ4.flatten(1)[:, : ids_NK.shape[1]] << LOW_BITS)
    return ids_NK
