"""Messages between the tests' process and the solution's process: frames of JSON, and the encoding of plain Python data in it.

Plain data (numbers, texts, bytes, containers, dates, named tuples) crosses by value; any other object crosses as a reference, which
`export` makes and `resolve` reads. Decoding builds values of standard types only, so a message cannot run code.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import operator
import os
import struct
from collections.abc import Callable
from typing import Any

LARGEST_MESSAGE = 4 * 2**20
LARGEST_JSON_INTEGER = 2**4000
"""Integers beyond it cross in hexadecimal: reading decimal digits takes quadratic time, and Python limits it."""

PREDICATES = frozenset(
    name for kind in (str, float, set) for name in dir(kind) if name.startswith("is") or name.endswith("swith")
)
"""Methods of data that answer yes or no: an object of a solution's own that has one could only be posing as data."""

Reference = Callable[[Any], Any]

TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, slice, object,
        collections.deque, collections.Counter, collections.OrderedDict, collections.defaultdict, decimal.Decimal, fractions.Fraction,
        datetime.date, datetime.time, datetime.datetime, datetime.timedelta,
    )
}  # fmt: skip
"""Types that cross by name, such as the argument of `f(int)`."""
_NAMES = {kind: name for name, kind in TYPES.items()}
_SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter,
}  # fmt: skip
_MAPPINGS = {"dict": dict, "OrderedDict": collections.OrderedDict, "Counter": collections.Counter}
_FIELDS: dict[str, Callable[[Any], list[Any]]] = {
    "complex": lambda value: [value.real, value.imag],
    "range": lambda value: [value.start, value.stop, value.step],
    "slice": lambda value: [value.start, value.stop, value.step],
    "Fraction": lambda value: [value.numerator, value.denominator],
    "Decimal": lambda value: [str(value)],
    "date": lambda value: [value.year, value.month, value.day],
    "time": lambda value: [value.hour, value.minute, value.second, value.microsecond],
    "datetime": lambda value: [*value.timetuple()[:6], value.microsecond],
    "timedelta": lambda value: [value.days, value.seconds, value.microseconds],
}
"""Arguments with which a type makes an equal value."""


class TooLargeError(ValueError):
    """A message is larger than LARGEST_MESSAGE."""


class EndedError(EOFError):
    """The other process has ended or closed the connection."""


class Link:
    """Connection of two processes: frames of a 4-byte length and JSON."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        if len(data) > LARGEST_MESSAGE:
            raise TooLargeError
        data = struct.pack("!I", len(data)) + data
        try:
            while data:
                data = data[os.write(self.descriptor, data) :]
        except OSError:
            raise EndedError from None

    def receive(self) -> Any:
        """Raises TooLargeError, EndedError, and ValueError or RecursionError for a frame that is no JSON."""
        size = struct.unpack("!I", self._read(4))[0]
        if size > LARGEST_MESSAGE:
            raise TooLargeError
        return json.loads(self._read(size))

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                more = os.read(self.descriptor, count - len(data))
            except OSError:
                more = b""
            if not more:
                raise EndedError
            data += more
        return bytes(data)


def encode(value: Any, export: Reference) -> Any:
    """JSON of a value. Scalars and lists are themselves; anything else is an object with one key, its kind."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if -LARGEST_JSON_INTEGER < value < LARGEST_JSON_INTEGER else {"int": hex(value)}
    if kind is list:
        return [encode(item, export) for item in value]
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(item, export) for item in value]}
    if kind is collections.deque:
        return {"deque": [[encode(item, export) for item in value], value.maxlen]}
    if kind in (dict, collections.defaultdict, collections.OrderedDict, collections.Counter):
        name = "dict" if kind is collections.defaultdict else kind.__name__
        return {name: [[encode(key, export), encode(item, export)] for key, item in value.items()]}
    if kind is type and value in _NAMES:
        return {"type": _NAMES[value]}
    name = _NAMES.get(kind, "")
    if name in _FIELDS and getattr(value, "tzinfo", None) is None:
        return {name: [encode(field, export) for field in _FIELDS[name](value)]}
    if kind.__bases__ == (tuple,) and isinstance(getattr(value, "_fields", None), tuple):
        return {"namedtuple": [kind.__name__, list(value._fields), [encode(item, export) for item in value]]}
    return {"reference": export(value)}


def decode(wire: Any, resolve: Reference) -> Any:
    """Value of JSON from `encode`. Raises some Exception for anything else: the sender is not trusted."""
    if isinstance(wire, list):
        return [decode(item, resolve) for item in wire]
    if not isinstance(wire, dict):
        return wire
    ((name, content),) = wire.items()
    if name == "reference":
        return resolve(content)
    if name == "int":
        return int(content, 16)
    if name in ("bytes", "bytearray"):
        return TYPES[name].fromhex(content)  # type: ignore[attr-defined]
    if name == "type":
        return TYPES[content]
    if name == "deque":
        return collections.deque([decode(item, resolve) for item in content[0]], content[1])
    if name in _MAPPINGS:
        return _MAPPINGS[name]({decode(key, resolve): decode(item, resolve) for key, item in content})
    if name == "namedtuple":
        return _named_tuple(content[0], content[1], [decode(item, resolve) for item in content[2]])
    items = [decode(item, resolve) for item in content]
    return _SEQUENCES[name](items) if name in _SEQUENCES else TYPES[name](*items) if name in _FIELDS else _refuse(name)


def _refuse(name: str) -> None:
    raise ValueError(f"unknown kind {name!r:.40}")


def _named_tuple(name: str, fields: list[str], items: list[Any]) -> tuple[Any, ...]:
    """A tuple with attributes. Not by `collections.namedtuple`, which compiles the names that it is given."""
    invalid = any(not field.isidentifier() or field.startswith("_") or field in PREDICATES for field in fields)
    if len(fields) != len(items) or invalid:
        raise ValueError("fields of a named tuple")
    attributes: dict[str, Any] = {field: property(operator.itemgetter(place)) for place, field in enumerate(fields)}
    return type(name, (tuple,), {**attributes, "_fields": tuple(fields), "__module__": "solution"})(items)


def update(old: Any, new: Any) -> Any:
    """Change a mutable value in place to equal a new one, inner values included; the value to store, which is new if it cannot.

    Example: `update([1, [2]], [3, [4]])` is the first list with its inner list, now `[3, [4]]`.
    """
    if type(old) is not type(new):
        return new
    if isinstance(old, list):
        old[:] = [update(*pair) for pair in zip(old, new, strict=False)] + new[len(old) :]
    elif isinstance(old, dict):
        merged = {key: update(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(merged)
    elif isinstance(old, (set, bytearray, collections.deque)):
        old.clear()
        (old.update if isinstance(old, set) else old.extend)(new)
    else:
        return new
    return old
