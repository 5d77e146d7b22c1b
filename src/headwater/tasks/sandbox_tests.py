"""The tests' process of the Python sandbox: proxies of a solution's functions and objects, whose values are decided here.

The solution's process sends plain data; comparisons with plain data happen on this side, so no expected value reaches it and no `==` of
its own decides one. A comparison that would need either is refused, and the refusal is the verdict even if the tests catch the
exception.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import itertools
import sys
import threading
import types
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any, NoReturn

from headwater.tasks.sandbox_data import PREDICATES, EndedError, Link, TooLargeError, decode, encode, update
from headwater.tasks.sandbox_solution import builtin_error, make_error, reference_of_error

_BUILTINS = frozenset(dir(builtins))
LONGEST_ITERATOR = 100_000
_READABLE = frozenset({"__name__", "__qualname__", "__doc__", "__annotations__", "__dict__"})


class UnsupportedError(Exception):
    """The tests do something that proxies cannot do safely."""


class ModuleName(str):
    """A module of the solution's, by name: the tests import their own."""


class Solution:
    """Connection to the solution's process.

    failures  (reason, detail) that decide the verdict, whatever the tests do afterwards; the first one counts
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.failures: list[tuple[str, str]] = []
        self._lock = threading.RLock()
        self._functions: list[Callable[..., Any]] = []
        self._proxies: dict[int, Any] = {}

    def refuse(self, detail: str) -> NoReturn:
        self.failures.append(("unsupported", detail))
        raise UnsupportedError(detail)

    def load(self, code: str) -> None:
        """Run the program. Raises what it raised."""
        self._exchange({"do": "load", "code": code}, ())

    def names(self) -> list[str]:
        """Names that the program defined."""
        return [str(name) for name in self._exchange({"do": "names"}, ())]

    def lookup(self, name: str) -> Any:
        """A global of the program. Raises AttributeError if there is none, or a module but for those of the standard library."""
        value = self._exchange({"do": "name", "name": name}, ())
        if isinstance(value, ModuleName):
            if value != name or name not in sys.stdlib_module_names:
                raise AttributeError(name)
            return importlib.import_module(name)
        return value

    def perform(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        """Perform an operation on objects in the solution's process. Raises what it raised there, by type."""
        try:
            message = {
                "do": operation,
                "arguments": [encode(value, self._export) for value in arguments],
                "keywords": {name: encode(value, self._export) for name, value in keywords.items()},
            }
        except RecursionError:
            self.refuse("an argument that contains itself, or is nested too deeply")
        return self._exchange(message, arguments)

    def _exchange(self, message: dict[str, Any], arguments: tuple[Any, ...]) -> Any:
        with self._lock:
            try:
                self.link.send(message)
                while "callback" in (reply := self.link.receive()):
                    self.link.send(self._call_back(reply))
                if "large" in reply:
                    raise TooLargeError
                if printed := reply.get("printed"):
                    sys.stdout.write(str(printed))
                error = self._error(reply["raised"], message["do"]) if "raised" in reply else None
                value = None if error else self._value(reply, arguments)
            except EndedError:
                self.failures.append(("error", "the solution's process ended"))
                raise
            except TooLargeError:
                self.refuse("an argument or an answer of more than 4 MiB")
            except (UnsupportedError, MemoryError):
                raise
            except Exception:
                self.refuse("an answer that is not plain data")
        if error is not None:
            raise error from None
        return value

    def _value(self, reply: dict[str, Any], arguments: tuple[Any, ...]) -> Any:
        for place, wire in reply.get("changed", ()):
            update(arguments[place], decode(wire, self._resolve))
        return arguments[reply["same"]] if "same" in reply else decode(reply["value"], self._resolve)

    def _call_back(self, reply: dict[str, Any]) -> dict[str, Any]:
        """Call a function that the tests passed to the solution."""
        function = self._functions[reply["callback"]]
        arguments = [decode(wire, self._resolve) for wire in reply["arguments"]]
        keywords = {str(name): decode(wire, self._resolve) for name, wire in reply["keywords"].items()}
        try:
            return {"value": encode(function(*arguments, **keywords), self._export)}
        except Exception as error:
            if isinstance(error, AssertionError):
                self.failures.append(("different", "AssertionError"))  # the solution could suppress it
            return {"raised": {**reference_of_error(type(error)), "text": str(error)[:1000]}}

    def _export(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Proxy):
            return {"id": value._headwater_id}
        if isinstance(value, type) and builtin_error(value.__name__) is value:
            return {"error": value.__name__}
        if isinstance(value, (Iterator, KeysView, ValuesView, ItemsView)):
            items = [encode(item, self._export) for item in itertools.islice(value, LONGEST_ITERATOR)]
            return {"items": items, "once": isinstance(value, Iterator)}
        if callable(value) and not isinstance(value, type):
            self._functions.append(value)
            return {"function": len(self._functions) - 1}
        return self.refuse(f"an argument of type {type(value).__name__}")

    def _resolve(self, content: dict[str, Any]) -> Any:
        """A value of the solution's, but for classes as wide as AssertionError: `except` with one would hide failed assertions."""
        value = ModuleName(content["module"]) if "module" in content else self._reference(content)
        if isinstance(value, type) and issubclass(AssertionError, value):
            self.refuse(
                f"the solution's use of {value.__name__}, an exception class that catches the tests' assertions"
            )
        return value

    def _reference(self, content: dict[str, Any]) -> Any:
        number = int(content["id"])
        if number not in self._proxies:
            is_error = "error" in content
            self._proxies[number] = self._error_class(content["error"]) if is_error else self._proxy(number, content)
        return self._proxies[number]

    def _proxy(self, number: int, content: dict[str, Any]) -> Any:
        flags = content["flags"]
        proxy = (CallableProxy if "call" in flags else Proxy)(self, number, "equality" in flags, "data" in flags)
        return self._awaited(proxy) if "await" in flags else proxy

    async def _awaited(self, proxy: Proxy) -> Any:
        return self.perform("await", proxy)

    def _error_class(self, content: dict[str, Any]) -> type[BaseException]:
        base, name = builtin_error(content["base"]), str(content["name"])
        parents = tuple(self._resolve(parent) for parent in content["parents"]) or (base,)
        return base if base.__name__ == name else type(name, parents, {"__module__": "solution"})

    def _error(self, raised: dict[str, Any], operation: str) -> BaseException:
        base = builtin_error(raised["base"])
        kind = self._reference({"id": raised["id"], "error": raised})
        # Such an error, by any of its parents, would end a loop of the tests before its assertions.
        ends_loop = issubclass(kind, (StopIteration, StopAsyncIteration, GeneratorExit))
        if ends_loop and operation != "next":
            return RuntimeError(f"the solution raised {kind.__name__}")
        error = make_error(kind, tuple(decode(wire, self._resolve) for wire in raised["arguments"]))
        if kind is not base:
            for name, wire in raised["attributes"].items():
                if not name.startswith("_"):
                    setattr(error, name, decode(wire, self._resolve))
        return error


class Proxy:
    """An object in the solution's process."""

    __slots__ = ("_headwater_data", "_headwater_equality", "_headwater_id", "_headwater_solution")

    def __init__(self, solution: Solution, number: int, equality: bool, data: bool) -> None:
        for name, value in zip(Proxy.__slots__, (data, equality, number, solution), strict=True):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in _READABLE:
            raise AttributeError(name)
        value = self._headwater_solution.perform("getattr", self, name)
        if name in PREDICATES and callable(value):  # a class of data too: `startswith = bool`
            self._headwater_solution.refuse(f"{name}() of an object that is no data")
        return value

    def __eq__(self, other: object) -> Any:
        """Equality of two proxies is the solution's; with plain data it is decided here, and only for objects that are data."""
        if isinstance(other, Proxy):
            return self._headwater_solution.perform("eq", self, other)
        if other is None:
            return False
        if self._headwater_equality:
            self._headwater_solution.refuse("a comparison of plain data with an object that defines __eq__")
        return self._headwater_data and self._headwater_solution.perform("plain", self) == other

    def __ne__(self, other: object) -> Any:
        return self._headwater_solution.perform("ne", self, other) if isinstance(other, Proxy) else not self == other

    def __deepcopy__(self, memo: Any) -> Any:
        return self._headwater_solution.perform("deepcopy", self)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._headwater_solution.perform("exit", self, kind is not None) and kind is not None:
            self._headwater_solution.refuse("an object that suppresses the exceptions of a with block")


class CallableProxy(Proxy):
    """A function, a class or another callable object in the solution's process."""

    __slots__ = ()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._headwater_solution.perform("call", self, *arguments, **keywords)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Proxy) and self._headwater_solution.perform("isinstance", value, self)

    def __subclasscheck__(self, value: Any) -> bool:
        return isinstance(value, Proxy) and self._headwater_solution.perform("issubclass", value, self)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> Any:
        return self._headwater_solution.refuse("a class that derives from one of the solution's")


def _forwarded(operation: str) -> Callable[..., Any]:
    def method(self: Proxy, *arguments: Any) -> Any:
        return self._headwater_solution.perform(operation, self, *arguments)

    return method


def _between_proxies(operation: str) -> Callable[[Proxy, Any], Any]:
    def method(self: Proxy, other: Any) -> Any:
        if not isinstance(other, Proxy):
            self._headwater_solution.refuse(f"the operator {operation} of an object that is no data with plain data")
        return self._headwater_solution.perform(operation, self, other)

    return method


# A docstring of the solution's, not the class's.
Proxy.__doc__ = CallableProxy.__doc__ = property(lambda self: self.__getattr__("__doc__"))  # type: ignore[assignment]
_FORWARDED = """
setattr delattr getitem setitem delitem hash round enter len iter next bool str repr reversed int float complex index abs neg pos invert
copy
"""
_COMPARISONS, _ARITHMETIC = "lt le gt ge contains", "add sub mul truediv floordiv mod pow matmul and or xor"
for _name in _FORWARDED.split():
    setattr(Proxy, f"__{_name}__", _forwarded(_name))
for _name in f"{_COMPARISONS} {_ARITHMETIC}".split():
    setattr(Proxy, f"__{_name}__", _between_proxies(_name))
for _name in _ARITHMETIC.split():
    setattr(Proxy, f"__r{_name}__", _between_proxies(_name))


class SolutionModule(types.ModuleType):
    """What `import solution` gives the tests."""

    def __init__(self, solution: Solution) -> None:
        super().__init__("solution")
        self.__dict__["_headwater_solution"] = solution

    def __getattr__(self, name: str) -> Any:
        solution: Solution = self.__dict__["_headwater_solution"]
        if name == "__all__":
            return []  # `namespace` has set what the tests use; a program must not replace names that the tests define
        if name.startswith("__"):
            raise AttributeError(name)
        return solution.lookup(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):  # the import system's
            super().__setattr__(name, value)
        else:
            self.__dict__["_headwater_solution"].refuse("a change of the solution's globals")


def namespace(solution: Solution, tests: ast.Module, entry_point: str | None) -> dict[str, Any]:
    """Globals for the tests: the names that they use and the program defines.

    A built-in name is the program's only if it is the entry point, or if the tests use no other name of the program and do not
    import `solution`, whose attributes they may use: otherwise a program could replace the `abs` or `sorted` that its answers are
    compared by. A name that the tests use as a module of the standard library, such as `math` in `math.isclose`, is that module for
    the same reason.
    """
    nodes = list(ast.walk(tests))
    attributes: dict[str, set[str]] = {}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.setdefault(node.value.id, set()).add(node.attr)
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    defined = set(solution.names()) & used
    own = {name for name in defined if name not in _BUILTINS}
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    if entry_point is not None:
        own.add(entry_point)
    elif not own and len(defined) == 1 and "solution" not in imported:
        own = defined
    values = {}
    for name in own:
        with contextlib.suppress(AttributeError):
            module = _standard_module(name, attributes.get(name, set())) if name != entry_point else None
            values[name] = module or solution.lookup(name)
    return values


def _standard_module(name: str, attributes: set[str]) -> types.ModuleType | None:
    """The module of the standard library that has these attributes, at least one; None if the tests mean something else."""
    if not attributes or name not in sys.stdlib_module_names:
        return None
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    return module if all(hasattr(module, attribute) for attribute in attributes) else None
