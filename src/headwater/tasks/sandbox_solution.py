"""The solution's process of the Python sandbox: runs the program, then answers the tests' calls with plain data.

It is never sent the tests or a value that they expect. Its answers are not trusted (`sandbox_tests.py`).
"""

from __future__ import annotations

import asyncio
import builtins
import copy
import inspect
import io
import operator
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from headwater.tasks.sandbox_data import EndedError, Link, TooLargeError, decode, encode

LONGEST_OUTPUT = 2**20
DATA_TYPES = (int, float, complex, str, bytes, list, tuple, dict, set, frozenset)


class Output(io.TextIOBase):
    """Standard output: the first LONGEST_OUTPUT characters that a call prints go to the tests."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.room = LONGEST_OUTPUT

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.room > 0:
            self.parts.append(text[: self.room])
            self.room -= len(text)
        return len(text)

    def take(self) -> str:
        text = "".join(self.parts)
        self.parts, self.room = [], LONGEST_OUTPUT
        return text


def plain(value: Any) -> Any:
    """Convert an object whose class derives from a type of data to that type."""
    return next(kind for kind in DATA_TYPES if isinstance(value, kind))(value)


def leave(value: Any, failed: bool) -> bool:
    """End a `with` block; whether the object suppresses the block's exception."""
    error = RuntimeError("an exception in the tests")
    details = (RuntimeError, error, None) if failed else (None, None, None)
    return bool(type(value).__exit__(value, *details))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr, "setattr": setattr, "delattr": delattr, "isinstance": isinstance, "issubclass": issubclass,
    "getitem": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem, "contains": operator.contains,
    "call": operator.call, "len": len, "iter": iter, "next": next, "bool": bool, "str": str, "repr": repr, "hash": hash,
    "reversed": reversed, "int": int, "float": float, "complex": complex, "index": operator.index, "round": round, "abs": abs,
    "neg": operator.neg, "pos": operator.pos, "invert": operator.invert, "copy": copy.copy, "deepcopy": copy.deepcopy,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv, "floordiv": operator.floordiv,
    "mod": operator.mod, "pow": operator.pow, "matmul": operator.matmul, "and": operator.and_, "or": operator.or_,
    "xor": operator.xor, "plain": plain, "enter": lambda value: type(value).__enter__(value), "exit": leave,
    "await": asyncio.run,
}  # fmt: skip


def reference_of_error(kind: type[BaseException]) -> dict[str, Any]:
    """Name of an exception class, and of the built-in class that it derives from."""
    base = next(parent for parent in kind.__mro__ if getattr(builtins, parent.__name__, None) is parent)
    return {"name": kind.__name__, "base": base.__name__}


def builtin_error(name: Any) -> type[BaseException]:
    """The built-in exception class of a name; RuntimeError for any other name."""
    kind = getattr(builtins, str(name), None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseException) else RuntimeError


def make_error(kind: type[BaseException], arguments: tuple[Any, ...]) -> BaseException:
    """An exception with its arguments, without running its class's `__init__`."""
    try:
        error = kind.__new__(kind)
    except TypeError:  # exception groups
        error = RuntimeError.__new__(RuntimeError)
    error.args = arguments
    return error


class Session:
    """The program's namespace, and the objects that the tests hold references to."""

    def __init__(self, link: Link, run: Callable[[str], types.ModuleType]) -> None:
        self.link = link
        self.run = run
        self.module = types.ModuleType("solution")
        self.objects: list[Any] = []
        self.places: dict[int, int] = {}
        self.output = Output()

    def serve(self) -> None:
        """Answer requests until the tests' process closes the connection."""
        sys.stdout = self.output
        while True:
            self._answer(self.link.receive())

    def _answer(self, message: dict[str, Any]) -> None:
        try:
            reply = self._perform(message)
        except EndedError:
            raise
        except BaseException as error:
            reply = {"raised": self._describe(error)}
        if printed := self.output.take():
            reply["printed"] = printed
        try:
            self.link.send(reply)
        except TooLargeError:
            self.link.send({"large": True})

    def _perform(self, message: dict[str, Any]) -> dict[str, Any]:
        operation = message["do"]
        if operation == "load":
            self.module = self.run(message["code"])
            return {"value": None}
        if operation == "names":
            return {"value": [name for name in vars(self.module) if isinstance(name, str)][:10_000]}
        if operation == "name":
            return {"value": encode(getattr(self.module, message["name"]), self._export)}
        arguments = [decode(wire, self._resolve) for wire in message["arguments"]]
        keywords = {name: decode(wire, self._resolve) for name, wire in message["keywords"].items()}
        value = OPERATIONS[operation](*arguments, **keywords)
        reply: dict[str, Any] = {}
        if operation == "call":
            after = {place: encode(argument, self._export) for place, argument in enumerate(arguments[1:], 1)}
            reply["changed"] = [[place, wire] for place, wire in after.items() if wire != message["arguments"][place]]
            same = [place for place, argument in enumerate(arguments) if place and argument is value]
            if same and isinstance(value, (list, dict, set, bytearray)):
                return reply | {"same": same[0]}
        return reply | {"value": encode(value, self._export)}

    def _export(self, value: Any) -> dict[str, Any]:
        if isinstance(value, types.ModuleType):
            return {"module": value.__name__}
        place = self.places.get(id(value))
        if place is None:
            place = self.places[id(value)] = len(self.objects)
            self.objects.append(value)
        if isinstance(value, type) and issubclass(value, BaseException):
            parents = [self._export(base) for base in value.__bases__ if base.__module__ != "builtins"]
            parents = [parent for parent in parents if "error" in parent]
            return {"id": place, "error": {**reference_of_error(value), "parents": parents}}
        kind = type(value)
        own = next((parent not in (object, *DATA_TYPES) for parent in kind.__mro__ if "__eq__" in vars(parent)), False)
        flags = {
            "call": callable(value), "equality": own, "data": isinstance(value, DATA_TYPES), "await": inspect.iscoroutine(value)
        }  # fmt: skip
        return {"id": place, "type": kind.__name__, "flags": [name for name, is_set in flags.items() if is_set]}

    def _resolve(self, content: dict[str, Any]) -> Any:
        if "function" in content:
            return self._callback(content["function"])
        if "items" in content:
            items = [decode(item, self._resolve) for item in content["items"]]
            return iter(items) if content["once"] else items
        return builtin_error(content["error"]) if "error" in content else self.objects[content["id"]]

    def _callback(self, number: int) -> Callable[..., Any]:
        """A function of the tests that the program was given as an argument."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("a function of the tests can be called in the main thread only")
            encoded = {name: encode(value, self._export) for name, value in keywords.items()}
            self.link.send({
                "callback": number, "arguments": [encode(value, self._export) for value in arguments], "keywords": encoded
            })  # fmt: skip
            while "do" in (message := self.link.receive()):
                self._answer(message)
            if "raised" in message:
                raise make_error(builtin_error(message["raised"]["base"]), (message["raised"]["text"],))
            return decode(message["value"], self._resolve)

        return call

    def _describe(self, error: BaseException) -> dict[str, Any]:
        described = self._export(type(error))["error"]
        described["id"] = self.places[id(type(error))]
        try:
            described["text"] = str(error)[:10_000]
            described["arguments"] = [encode(value, self._export) for value in error.args[:10]]
            attributes = {name: value for name, value in vars(error).items() if not name.startswith("_")}
            described["attributes"] = {name: encode(value, self._export) for name, value in attributes.items()}
        except Exception:  # a class with a broken __str__
            described |= {"text": "", "arguments": [], "attributes": {}}
        return described
