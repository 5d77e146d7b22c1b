"""Alignment of two tokenizations of one text into the smallest spans whose ends agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, starmap


@dataclass(frozen=True)
class Spans:
    """Common spans of two token sequences. Span c ends after `first_ends[c]` tokens of the first and `second_ends[c]` of the second.

    Both are strictly increasing and equally long. Tokens after the last span stand for bytes on which the two do not agree.
    """

    first_ends: tuple[int, ...]
    second_ends: tuple[int, ...]

    @property
    def first_read(self) -> int:
        """Number of tokens of the first sequence that a span holds."""
        return self.first_ends[-1] if self.first_ends else 0

    def pairs(self) -> list[tuple[range, range]]:
        """Tokens of each span in the two sequences. Example: ends (1, 3) and (2, 3): [(0…0, 0…1), (1…2, 2…2)]."""
        first, second = (starmap(range, pairwise((0, *ends))) for ends in (self.first_ends, self.second_ends))
        return list(zip(first, second, strict=True))


def align(first: Sequence[bytes], second: Sequence[bytes]) -> Spans:
    """Spans of two token sequences, given as the bytes of each token, in time linear in tokens and bytes.

    A span ends wherever both sequences have a token that ends at the same byte, so none can be divided. A token without bytes
    belongs to the span after it, or to the last one. If the bytes differ, the spans end before the first difference.

    Example: `ab`, `c` and `a`, `b`, `c` give the spans (ab | a b) and (c | c).
    """
    agreed = common_prefix(b"".join(first), b"".join(second))
    first_ends, second_ends = _ends(first), _ends(second)
    shared = [offset for offset in first_ends if 0 < offset <= agreed and offset in second_ends]
    for pieces, ends in ((first, first_ends), (second, second_ends)):
        if shared and shared[-1] == max(ends):  # tokens without bytes at the end
            ends[shared[-1]] = len(pieces)
    return Spans(tuple(first_ends[offset] for offset in shared), tuple(second_ends[offset] for offset in shared))


def _ends(pieces: Sequence[bytes]) -> dict[int, int]:
    """Byte offset -> how many tokens there are up to the first that ends there, in ascending order."""
    ends: dict[int, int] = {}
    for count, offset in enumerate(accumulate(map(len, pieces)), start=1):
        ends.setdefault(offset, count)
    return ends


def common_prefix(a: bytes, b: bytes) -> int:
    """Number of leading bytes in which two byte strings agree, by bisection on slices."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # invariant: a[:low] == b[:low], and they differ before `high`
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
