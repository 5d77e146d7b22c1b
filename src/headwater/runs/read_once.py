"""Memoized inputs: each is read on first use, and an error is cached like a value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

from headwater.errors import UnsupportedModelError, UserError

Part = Literal[
    "task", "data", "labels", "device", "hub", "model", "tokenizer", "config", "generation config", "weights", "server",
    "engine", "plan", "architecture",
]  # fmt: skip
"""What an InputError is about; the doctor has a finding for each."""


class InputError(UserError):
    """An input that cannot be read or does not fit the recipe."""

    def __init__(self, part: Part, sentence: str) -> None:
        super().__init__(sentence)
        self.part = part


class HasMemo(Protocol):
    """An object that stores what its methods have read, by method name and arguments."""

    @property
    def memo(self) -> dict[Hashable, Any]: ...


S = TypeVar("S", bound=HasMemo)
P = ParamSpec("P")
T = TypeVar("T")


def read_once(part: Part) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """Memoize a method of an object with a `memo`, its UserErrors included; those are raised as InputErrors of `part`."""

    def decorate(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        @functools.wraps(method)
        def once(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
            key = (method.__name__, *args, *kwargs.items())
            if key not in self.memo:
                try:
                    self.memo[key] = method(self, *args, **kwargs)
                except InputError as error:  # of an input that this one is read from
                    self.memo[key] = error
                except UserError as error:
                    unsupported = isinstance(error, UnsupportedModelError)
                    self.memo[key] = InputError("architecture" if unsupported else part, str(error))
            value = self.memo[key]
            if isinstance(value, InputError):
                raise value
            result: T = value
            return result

        return once

    return decorate


SIZED = ("decontaminated", "evals", "pools", "labels")
"""What a limit or the label budget decides."""


def resized(inputs: S, recipe: Any) -> S:
    """The same inputs for a recipe that differs in limits, the label budget and sizes of stages; what is read already is kept.

    They share the grader, which the first of them closes.
    """

    def kept(key: Hashable) -> bool:
        method = key[0] if isinstance(key, tuple) else key
        return key == ("source", "data.labeled") or method not in (*SIZED, "source")

    memo = {key: value for key, value in inputs.memo.items() if kept(key)}
    return replace(inputs, recipe=recipe, memo=memo)  # type: ignore[type-var]
