"""Task `regex`: the gold answer is a Python `re` pattern that must match the whole answer.

Matching can take exponential time and cannot be interrupted, so it runs in a worker that can be killed.
A gold answer is the pattern itself, or a JSON object `{"pattern": …, "example": …}` whose example `validate` grades.
"""

from __future__ import annotations

import json
import re
from typing import Any

from headwater.tasks.exact import answer_of
from headwater.tasks.thinking import after_thinking

try:
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as sre_parser  # type: ignore[attr-defined]
except ImportError:  # other interpreters: no examples can be generated
    sre = sre_parser = None


def read_gold(gold: str) -> tuple[str, str | None]:
    """(pattern, example or None). Example: `read_gold('{"pattern": "a+", "example": "aa"}')` is `("a+", "aa")`."""
    try:
        fields = json.loads(gold)
    except (ValueError, RecursionError):
        return gold, None
    if not isinstance(fields, dict) or not isinstance(fields.get("pattern"), str):
        return gold, None
    example = fields.get("example")
    return fields["pattern"], example if isinstance(example, str) else None


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """Match the answer; reasons `equal`, `different`, `no_answer`, `truncated`, `error` (invalid pattern).

    The answer is extracted as in task `exact`, or is all text after the thinking. Unbounded in time: call it
    through `verifier.Verifier`.

    Example: `grade(r"(?i)paris|lutetia", "The answer is Paris.")` gives `(True, "equal")`.
    """
    pattern, _ = read_gold(gold)
    try:
        wanted = re.compile(pattern)
    except (re.error, RecursionError, OverflowError, ValueError):
        return False, "error"
    whole = after_thinking(completion).strip()
    answer, missing = answer_of(completion)
    if answer is None:
        return False, missing
    if wanted.fullmatch(answer) or wanted.fullmatch(whole):
        return True, "equal"
    return False, "different"


def as_completion(gold: str) -> str | None:
    """Generate a text that the pattern matches; None if the pattern uses lookaround.

    Example: `as_completion("[a-c]{2}-(x|y)")` is `"aa-x"`.
    """
    pattern, example = read_gold(gold)
    if example is not None:
        return example
    if sre_parser is None:
        return None
    try:
        return _example(sre_parser.parse(pattern), {})
    except (re.error, RecursionError, OverflowError, ValueError):
        return None


class _NoExampleError(ValueError):
    """The pattern has a construct without a piecewise example."""


LONGEST_EXAMPLE = 10_000


def _example(parts: Any, groups: dict[int, str]) -> str:
    texts: list[str] = []
    for kind, value in parts:
        if kind is sre.LITERAL:
            texts.append(chr(value))
        elif kind is sre.NOT_LITERAL:
            texts.append("a" if value != ord("a") else "b")
        elif kind is sre.ANY:
            texts.append("a")
        elif kind is sre.IN:
            texts.append(_character_in(value))
        elif kind in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            least, most, inner = value
            times = max(least, 1) if most else 0
            text = _example(inner, groups)  # every repetition is the same text
            if len(text) * times > LONGEST_EXAMPLE:
                raise _NoExampleError
            texts.append(text * times)
        elif kind is sre.SUBPATTERN:
            groups[value[0]] = _example(value[3], groups)
            texts.append(groups[value[0]])
        elif kind is sre.ATOMIC_GROUP:
            texts.append(_example(value, groups))
        elif kind is sre.BRANCH:
            texts.append(_example(value[1][0], groups))
        elif kind is sre.GROUPREF:
            texts.append(groups.get(value, ""))
        elif kind is not sre.AT:
            raise _NoExampleError
        if sum(map(len, texts)) > LONGEST_EXAMPLE:
            raise _NoExampleError
    return "".join(texts)


_CATEGORIES = {
    "CATEGORY_DIGIT": (r"\d", "7"), "CATEGORY_SPACE": (r"\s", " "), "CATEGORY_WORD": (r"\w", "a"),
    "CATEGORY_NOT_DIGIT": (r"\D", "a"), "CATEGORY_NOT_SPACE": (r"\S", "a"), "CATEGORY_NOT_WORD": (r"\W", "-"),
}  # fmt: skip
"""Pattern of a category, and a character that it matches."""


def _character_in(members: Any) -> str:
    if members[0][0] is sre.NEGATE:
        for char in "aZ0 -~_":
            if not _set_contains(char, members[1:]):
                return char
        raise _NoExampleError
    kind, value = members[0]
    if kind is sre.LITERAL:
        return chr(value)
    return chr(value[0]) if kind is sre.RANGE else _CATEGORIES[str(value)][1]


def _set_contains(char: str, members: Any) -> bool:
    for kind, value in members:
        if kind is sre.LITERAL and ord(char) == value:
            return True
        if kind is sre.RANGE and value[0] <= ord(char) <= value[1]:
            return True
        if kind is sre.CATEGORY and re.fullmatch(_CATEGORIES[str(value)][0], char):
            return True
    return False
