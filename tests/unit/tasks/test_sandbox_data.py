"""Encoding of data between a solution and its tests: hostile messages make no value and run no code."""

from __future__ import annotations

import json
import os
import random
import struct
from typing import Any

import pytest

from headwater.tasks.sandbox_data import LARGEST_MESSAGE, EndedError, Link, TooLargeError, decode, encode, update


def refuse(content: Any) -> Any:
    raise LookupError(content)


def round_trip(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value, refuse))), refuse)


def drawn(draw: random.Random, depth: int = 0) -> Any:
    scalars = [
        None,
        True,
        draw.randint(-(10**9), 10**9),
        2 ** draw.randint(3990, 4010),
        draw.random(),
        "a\ud800\n",
        b"\0\xff",
    ]
    kind = draw.randrange(12 if depth < 4 else 6)
    if kind < 6:
        return draw.choice(scalars)
    items = [drawn(draw, depth + 1) for _ in range(draw.randrange(4))]
    keys = [draw.choice(scalars) for _ in items]
    return [items, tuple(items), set(keys), frozenset(keys), dict(zip(keys, items, strict=True)), {"list": items}][
        kind - 6
    ]


def test_plain_data_survive_round_trip() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        value = drawn(draw)
        assert repr(round_trip(value)) == repr(value) or round_trip(value) == value


def test_subclasses_of_data_cross_as_references() -> None:
    class Sneaky(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    for value in (Sneaky(3), [Sneaky(3)], {"a": Sneaky(3)}, (lambda: 0), object(), Exception()):
        with pytest.raises(LookupError):
            encode(value, refuse)


HOSTILE = [
    {}, {"a": 1, "b": 2}, {"int": "zz"}, {"int": None}, {"tuple": 3}, {"set": [[1]]}, {"dict": [[[1], 2]]}, {"dict": [1]},
    {"type": "exec"}, {"type": "__import__"}, {"type": []}, {"os.system": ["true"]}, {"object": []}, {"list": [1]}, {"str": [1]},
    {"namedtuple": ["P", ["__eq__"], [1]]}, {"namedtuple": ["P", ["_x"], [1]]}, {"namedtuple": ["P", ["a b"], [1]]},
    {"namedtuple": ["P", ["x"], []]}, {"namedtuple": [1, ["x"], [1]]}, {"range": ["a", 1, 1]}, {"range": [1, 2, 0]},
    {"Fraction": [1, 0]}, {"date": [0, 0, 0]}, {"datetime": [1]}, {"Decimal": ["x"]}, {"deque": [[1], -1]}, {"bytes": "x"},
    {"bytes": 10**9}, {"iterator": 3}, {"reference": {"id": 1}}, [{"reference": None}],
]  # fmt: skip


@pytest.mark.parametrize("wire", HOSTILE, ids=json.dumps)
def test_hostile_messages_raise_exceptions(wire: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017 - any, which the tests' process turns into a verdict
        decode(wire, refuse)


def test_link_refuses_large_cut_and_malformed_frames() -> None:
    cases = [
        (struct.pack("!I", LARGEST_MESSAGE + 1), TooLargeError),
        (struct.pack("!I", 10) + b"[1", EndedError),
        (b"\0", EndedError),
        (struct.pack("!I", 2) + b"[[", ValueError),
        (struct.pack("!I", 200_000) + b"[" * 200_000, RecursionError),
    ]
    for frame, error in cases:
        source, sink = os.pipe()
        if len(frame) > 60_000:
            import fcntl

            fcntl.fcntl(sink, 1031, 1 << 20)  # F_SETPIPE_SZ
        os.write(sink, frame)
        os.close(sink)
        with pytest.raises(error):
            Link(source).receive()
        os.close(source)
    with pytest.raises(TooLargeError):
        Link(-1).send("x" * LARGEST_MESSAGE)


def test_update_changes_inner_values_in_place() -> None:
    inner, keyed, numbers = [1], {"a": [1]}, {1}
    outer = [inner, keyed, numbers, bytearray(b"a")]
    assert update(outer, [[2, 3], {"a": [4], "b": 5}, {6}, bytearray(b"bc"), "new"]) is outer
    assert outer[0] is inner and inner == [2, 3] and keyed == {"a": [4], "b": 5} and numbers == {6}
    assert outer == [[2, 3], {"a": [4], "b": 5}, {6}, bytearray(b"bc"), "new"]
    assert update(inner, (1,)) == (1,) and inner == [2, 3]
