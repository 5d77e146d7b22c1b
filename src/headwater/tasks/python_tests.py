"""The task `python`: the completion's last Python block must pass the gold answer's unit tests, in a sandbox.

A gold answer is test code (`assert` lines, `test_` functions, `unittest` cases), or a JSON object `{"tests": …,
"solution": …, "entry_point": …}`: `validate` tries the solution, and `entry_point` names what `check(candidate)` is given.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass

from headwater.tasks import sandbox
from headwater.tasks.exact import after_thinking

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*$", re.MULTILINE)
LANGUAGES = ("python", "py", "python3", "")
BLANK = "```python\npass\n```"
"""A solution that solves nothing: tests that it passes test nothing."""


@dataclass(frozen=True)
class Gold:
    tests: str
    solution: str | None = None
    entry_point: str | None = None


def read_gold(gold: str) -> Gold | None:
    """None for what holds no tests that Python can read, or none at all.

    Example: `read_gold("assert f(1) == 2")` is `Gold(tests="assert f(1) == 2")`.
    """
    held = Gold(gold)
    if gold.lstrip().startswith("{"):
        try:
            told = json.loads(gold)
        except (ValueError, RecursionError):
            return None
        if not isinstance(told, dict) or not isinstance(told.get("tests"), str):
            return None
        solution, entry_point = told.get("solution"), told.get("entry_point")
        if not all(one is None or isinstance(one, str) for one in (solution, entry_point)):
            return None
        held = Gold(told["tests"], solution, entry_point)
    try:
        return held if ast.parse(held.tests).body else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def last_block(completion: str) -> tuple[str | None, str]:
    """The code of the last closed Python block, and why there is none. A block without a language counts as Python.

    Example: `last_block("Here:\\n```python\\nx = 1\\n```")` gives `("x = 1", "")`.
    """
    text = after_thinking(completion)
    best, opened, start = None, None, 0
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened, start = fence[1].lower(), fence.end()
        elif not fence[1]:
            if opened in LANGUAGES:
                best = text[start : fence.start()]
            opened = None
    if best is not None:
        return best.strip("\n"), ""
    return None, "truncated" if opened in LANGUAGES else "no_answer"


def quick(gold: str, completion: str) -> tuple[bool, str] | None:
    """The outcome where nothing need be run: a completion without code."""
    code, missing = last_block(completion)
    return (False, missing) if code is None else None


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """(correct, reason): `equal` (every test passed), `different` (one failed), `error` (the code does not load, ends the
    process, or the tests are none), `timeout`, `memory`, `no_answer`, `truncated`.

    Example: ``grade("assert f(2) == 4", "```python\\ndef f(x): return 2 * x\\n```")`` gives `(True, "equal")`.
    """
    code, missing = last_block(completion)
    if code is None:
        return False, missing
    wanted = read_gold(gold)
    if wanted is None:
        return False, "error"
    found = sandbox.run(code, wanted.tests, wanted.entry_point)
    return found.passed, found.reason


def as_completion(gold: str) -> str | None:
    """The gold's own solution; None where it has none, since tests do not tell how to pass them."""
    wanted = read_gold(gold)
    return None if wanted is None or wanted.solution is None else f"```python\n{wanted.solution}\n```"
