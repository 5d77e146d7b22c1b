"""Write settings as YAML with a comment for each, for a person to read and edit."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

WIDTH, COMMENT_COLUMN = 128, 40


@dataclass(frozen=True)
class Setting:
    """A value (or nested settings) and the comment that explains it."""

    value: Any
    comment: str = ""


def commented_yaml(settings: Mapping[str, Any], indent: int = 0) -> str:
    """YAML of nested settings: a mapping is a block, a Setting of a dict without Settings is one line `{…}`.

    A comment stands to the right of its field, or above it where it is long.

    Example: `commented_yaml({"steps": Setting(80, "two passes")})` is `"steps: 80  …  # two passes\\n"`.
    """
    return "".join(f"{line}\n" for line in _lines(settings, indent))


def _lines(settings: Mapping[str, Any], indent: int) -> Iterator[str]:
    pad = " " * indent
    for name, given in settings.items():
        setting = given if isinstance(given, Setting) else Setting(given)
        nested = isinstance(setting.value, Mapping) and any(
            isinstance(value, (Setting, Mapping)) for value in setting.value.values()
        )
        line = f"{pad}{name}:" if nested else f"{pad}{name}: {flow(setting.value)}"
        commented = f"{line:<{COMMENT_COLUMN - 2}}  # {setting.comment}"
        if not setting.comment:
            yield line
        elif len(commented) <= WIDTH:
            yield commented
        else:
            yield from (f"{pad}# {part}" for part in textwrap.wrap(setting.comment, WIDTH - indent - 2))
            yield line
        if nested:
            yield from _lines(setting.value, indent + 2)


def flow(value: Any) -> str:
    """A value on one line, as YAML 1.1 reads it back.

    Example: `flow({"lr": 3e-06, "schedule": "linear"})` is `"{lr: 3.0e-06, schedule: linear}"`.
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {flow(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else repr(value)
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS_OF_YAML:
        return value
    return json.dumps(value, ensure_ascii=False)


_PLAIN = re.compile(r"(?:[A-Za-z/]|\.{1,2}/)[A-Za-z0-9_./-]*")
_WORDS_OF_YAML = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
