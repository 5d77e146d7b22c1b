"""Alignment of two tokenizations of one text into the smallest spans whose ends agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
        return list(zip(_ranges(self.first_ends), _ranges(self.second_ends), strict=True))


def _ranges(ends: tuple[int, ...]) -> list[range]:
    return [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]


def align(first: Sequence[bytes], second: Sequence[bytes]) -> Spans:
    """Spans of two token sequences, given as the bytes of each token, in time linear in tokens and bytes.

    A span ends wherever both sequences have a token that ends at the same byte, so none can be divided. A token without bytes
    belongs to the span after it, or to the last one. If the bytes differ, the spans end before the first difference.

    Example: `ab`, `c` and `a`, `b`, `c` give the spans (ab | a b) and (c | c).
    """
    agreed = common_prefix(b"".join(first), b"".join(second))
    first_offsets, second_offsets = _end_offsets(first), _end_offsets(second)
    first_ends: list[int] = []
    second_ends: list[int] = []
    j = 0
    for i, offset in enumerate(first_offsets):
        if offset > agreed:
            break
        while j < len(second_offsets) and second_offsets[j] < offset:
            j += 1
        if j == len(second_offsets) or second_offsets[j] != offset:
            continue
        if offset and (not first_ends or first_offsets[first_ends[-1] - 1] != offset):
            first_ends.append(i + 1)
            second_ends.append(j + 1)
    if first_ends and first_offsets[-1] == first_offsets[first_ends[-1] - 1]:  # tokens without bytes at the end
        first_ends[-1] = len(first)
    if second_ends and second_offsets[-1] == second_offsets[second_ends[-1] - 1]:
        second_ends[-1] = len(second)
    return Spans(tuple(first_ends), tuple(second_ends))


def _end_offsets(pieces: Iterable[bytes]) -> list[int]:
    """Byte offset at which each token ends."""
    offsets, total = [], 0
    for piece in pieces:
        total += len(piece)
        offsets.append(total)
    return offsets


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
