"""Read untrusted YAML: plain values only, with bounds checked before values are constructed.

A few aliases or merge keys can expand to more values than fit into memory. They are counted in the parsed graph, where each
occurs once, before anything is constructed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import yaml

from headwater.errors import UserError, error_text

LONGEST = 1 << 18
"""Maximum length; the longest built-in recipe has about 5 thousand characters."""
MOST_VALUES = 20_000
"""Maximum number of keys and values, aliases expanded."""


def read(text: str, where: str) -> Any:
    """Values of a YAML text. Raises UserError that begins with `where`."""
    return read_with_lines(text, where)[0]


def read_with_lines(text: str, where: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """Values of a YAML text, and the line of each key by its path. Raises UserError that begins with `where`."""
    if len(text) > LONGEST:
        raise UserError(f"{where}: is longer than {LONGEST:,} characters")
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None, {}
            _refuse_bombs(root, where)
            _refuse_repeated_keys(root, where)
            lines = dict(_lines(root, ()))  # before values are constructed, which rewrites merged mappings
            return loader.construct_document(root), lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not YAML ({' '.join(str(error).split())})") from None
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # Values that cannot be constructed: a date of month 13, a number of 5,000 digits, `!!bool maybe`.
        raise UserError(f"{where}: is not YAML ({type(error).__name__}: {error_text(error)})") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply") from None


def _lines(node: yaml.Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """(path, line) of every key of nested mappings; sequences are values."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                keys = (*path, key.value)
                yield keys, key.start_mark.line + 1
                yield from _lines(value, keys)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return [] if isinstance(node, yaml.ScalarNode) else node.value


def _refuse_bombs(root: yaml.Node, where: str) -> None:
    sizes: dict[int, int] = {}
    ancestors: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in ancestors:
            raise UserError(f"{where}: an alias refers to a value that contains it")
        if id(node) not in sizes:
            ancestors.add(id(node))
            sizes[id(node)] = min(sys.maxsize, 1 + sum(map(size, _children(node))))
            ancestors.remove(id(node))
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise UserError(f"{where}: has more than {MOST_VALUES:,} values (aliases expanded)")


def _refuse_repeated_keys(root: yaml.Node, where: str) -> None:
    """YAML's reader would keep the last value of a repeated key without a word. Keys that `<<` merges in may be overridden."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        waiting += _children(node)
        first_lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            name = (key.tag, key.value)
            if name in first_lines:
                raise UserError(
                    f"{where}, line {line}: the key {key.value!r} is given twice (first in line {first_lines[name]}); keep one"
                )
            first_lines[name] = line
