"""Task `python`: run the completion's last Python block against the gold answer's unit tests, in a sandbox.

A gold answer is test code (`assert` lines, `test_` functions, `unittest` cases), or a JSON object `{"tests": …,
"solution": …, "entry_point": …}`: `validate` grades the solution, and `entry_point` names the argument of `check(candidate)`.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass

from headwater.tasks import sandbox
from headwater.tasks.thinking import after_thinking

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*$", re.MULTILINE)
LANGUAGES = ("python", "py", "python3", "")
BLANK = "```python\npass\n```"
"""An empty solution: if it passes, the tests test nothing."""
WARM_UP = ("assert f(2) == 4", "```python\ndef f(x): return 2 * x\n```")
"""A gold answer and a completion that start the sandbox's server."""


@dataclass(frozen=True)
class Gold:
    tests: str
    solution: str | None = None
    entry_point: str | None = None


def read_gold(gold: str) -> Gold | None:
    """Parse a gold answer; None if it has no tests or they are no valid Python. Parsing hostile tests may take minutes and gigabytes.

    Example: `read_gold("assert f(1) == 2")` is `Gold(tests="assert f(1) == 2")`.
    """
    parsed = _fields(gold)
    try:
        return parsed if parsed and ast.parse(parsed.tests).body else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _fields(gold: str) -> Gold | None:
    """The fields of a gold answer, its tests unparsed; None if they are of other types."""
    if not gold.lstrip().startswith("{"):
        return Gold(gold)
    try:
        fields = json.loads(gold)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("tests"), str):
        return None
    solution, entry_point = fields.get("solution"), fields.get("entry_point")
    if not all(value is None or isinstance(value, str) for value in (solution, entry_point)):
        return None
    return Gold(fields["tests"], solution, entry_point)


def last_block(completion: str) -> tuple[str | None, str]:
    """Code of the last closed Python block (or None and the reason). A block without a language counts as Python.

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
    """Outcome for a completion without code; None if something must be run."""
    code, missing = last_block(completion)
    return (False, missing) if code is None else None


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """Run the tests; reasons: `equal` (all passed), `different` (one failed), `error` (the code does not load, ends the
    process, or the tests are none), `unsupported` (the tests need what the sandbox refuses; docs/safety.md), `timeout`, `memory`,
    `no_answer`, `truncated`.

    Example: ``grade("assert f(2) == 4", "```python\\ndef f(x): return 2 * x\\n```")`` gives `(True, "equal")`.
    """
    code, missing = last_block(completion)
    if code is None:
        return False, missing
    wanted = read_gold(gold)
    if wanted is None:
        return False, "error"
    outcome = sandbox.run(code, wanted.tests, wanted.entry_point)
    return outcome.passed, outcome.reason


def as_completion(gold: str) -> str | None:
    """The gold's own solution, or None if it has none. Always fast: the tests are not parsed."""
    wanted = _fields(gold)
    return None if wanted is None or wanted.solution is None else f"```python\n{wanted.solution}\n```"
