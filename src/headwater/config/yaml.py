"""YAML from people we do not know: plain values alone, bounded before they are built.

A few aliases or merge keys can stand for more values than any memory holds. They are counted in the parsed graph, where
each stands once, before anything is made of them.
"""

from __future__ import annotations

import sys
from typing import Any

import yaml

from headwater.errors import UserError

LONGEST = 1 << 18
"""Bytes; the longest recipe that ships has about 5 thousand."""
MOST_VALUES = 20_000
"""Keys and values, each alias counted as often as it stands there."""


def read(text: str, where: str) -> Any:
    """The values of a YAML text. Raises UserError with one sentence that begins with `where`."""
    if len(text) > LONGEST:
        raise UserError(f"{where}: is longer than {LONGEST:,} characters")
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _refuse_bombs(root, where)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not YAML ({' '.join(str(error).split())})") from None
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # Built values that cannot be: a date of month 13, a number of 5,000 digits, `!!bool maybe`.
        raise UserError(
            f"{where}: is not YAML ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply") from None


def _refuse_bombs(root: yaml.Node, where: str) -> None:
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in above:
            raise UserError(f"{where}: an alias refers to what holds it")
        if id(node) not in sizes:
            above.add(id(node))
            parts = (
                [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
            )
            inner = [] if isinstance(node, yaml.ScalarNode) else parts
            sizes[id(node)] = min(sys.maxsize, 1 + sum(map(size, inner)))
            above.remove(id(node))
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise UserError(
            f"{where}: stands for more than {MOST_VALUES:,} values (its aliases are counted as often as they stand)"
        )
