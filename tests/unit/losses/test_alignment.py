"""Alignment of two tokenizations: properties over random divisions of random bytes, and linear time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.losses.alignment import Spans, align, common_prefix

DIVISIONS = st.lists(st.binary(max_size=4), max_size=30)


@st.composite
def two_divisions(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """One text, cut twice; cuts may repeat, which gives tokens without bytes."""
    text = draw(st.binary(max_size=60))
    cuts = st.lists(st.integers(0, len(text)), max_size=20)
    pieces = []
    for _ in range(2):
        places = [0, *sorted(draw(cuts)), len(text)]
        pieces.append([text[a:b] for a, b in itertools.pairwise(places)])
    return pieces[0], pieces[1]


def test_spans_by_hand() -> None:
    assert align([b"ab", b"c"], [b"a", b"b", b"c"]) == Spans((1, 2), (2, 3))
    assert align([b"a", b"bc"], [b"ab", b"c"]) == Spans((2,), (2,))
    assert align([b"a", b"b"], [b"a", b"x"]) == Spans((1,), (1,))
    assert align([b"", b"a", b""], [b"a"]) == Spans((3,), (1,))
    assert align([], []) == Spans((), ())
    assert align([b"a"], []).first_read == 0


@given(two_divisions())
def test_spans_give_bytes_back_and_cannot_be_divided(pieces: tuple[list[bytes], list[bytes]]) -> None:
    first, second = pieces
    pairs = align(first, second).pairs()
    joined = b""
    for own, other in pairs:
        text = b"".join(first[i] for i in own)
        assert text and text == b"".join(second[j] for j in other)
        inner_own = {len(b"".join(first[i] for i in own[:end])) for end in range(1, len(own))}
        inner_other = {len(b"".join(second[j] for j in other[:end])) for end in range(1, len(other))}
        assert inner_own & inner_other <= {0, len(text)}, "a common end within a span"
        joined += text
    assert joined == b"".join(first)
    if joined:
        assert [i for own, _ in pairs for i in own] == list(range(len(first)))
        assert [j for _, other in pairs for j in other] == list(range(len(second)))


@given(DIVISIONS, DIVISIONS)
def test_different_bytes_end_spans_before_difference(first: list[bytes], second: list[bytes]) -> None:
    pairs = align(first, second).pairs()
    joined = b"".join(first[i] for own, _ in pairs for i in own)
    agreed = common_prefix(b"".join(first), b"".join(second))
    assert b"".join(second[j] for _, other in pairs for j in other) == joined
    assert len(joined) <= agreed


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_common_prefix_is_longest(a: bytes, b: bytes) -> None:
    length = common_prefix(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]


@given(DIVISIONS.map(lambda pieces: [piece for piece in pieces if piece]))
def test_equal_divisions_give_one_token_per_span(pieces: list[bytes]) -> None:
    ends = tuple(range(1, len(pieces) + 1))
    assert align(pieces, pieces) == Spans(ends, ends)


class Counted(bytes):
    """Bytes that count how often their length is read."""

    reads = 0

    def __len__(self) -> int:
        Counted.reads += 1
        return super().__len__()


@pytest.mark.parametrize("count", [1_000, 10_000])
def test_time_is_linear_by_operation_count(count: int) -> None:
    """Lengths are read once per token, and each sequence is passed over once, whatever the text."""

    class Passes(list[bytes]):
        passes = 0

        def __iter__(self) -> Iterator[bytes]:
            Passes.passes += 1
            return super().__iter__()

    first = Passes([Counted(b"ab")] * count)
    second = Passes([Counted(b"a"), *[Counted(b"ba")] * (count - 1), Counted(b"b")])
    Counted.reads = Passes.passes = 0
    spans = align(first, second)
    assert spans == Spans((count,), (count + 1,))
    assert Counted.reads <= 2 * count + 2
    assert Passes.passes <= 4
