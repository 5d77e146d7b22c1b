"""Task `json`: the completion's last JSON object must contain the gold object's fields with equal values."""

from __future__ import annotations

import json
import re
from typing import Any

from headwater.tasks.exact import folded
from headwater.tasks.thinking import after_thinking

LONGEST = 20_000  # characters at the end of a completion that are searched for an object
_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n(.*?)```", re.DOTALL)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def last_object(text: str) -> dict[str, Any] | None:
    """Parse the last fenced block that is a JSON object, else the last object anywhere in the text.

    Example: `last_object('so {"a": 1} or rather {"a": {"b": 2}}.')` is `{"a": {"b": 2}}`.
    """
    for block in reversed(_FENCE.findall(text)):
        decoded = _decoded(block.strip(), 0)
        if decoded is not None and not block.strip()[decoded[1] :]:
            return decoded[0]
    last, place = None, text.find("{")
    while place >= 0:
        decoded = _decoded(text, place)
        if decoded is not None:
            last = decoded[0]
        place = text.find("{", place + 1 if decoded is None else decoded[1])
    return last


def _decoded(text: str, place: int) -> tuple[dict[str, Any], int] | None:
    try:
        value, end = _DECODER.raw_decode(text, place)
    except (ValueError, RecursionError):
        return None
    return (value, end) if isinstance(value, dict) else None


def extract(completion: str) -> str | None:
    """Canonical JSON of the object, for majority votes."""
    last = last_object(after_thinking(completion)[-LONGEST:])
    return None if last is None else json.dumps(last, sort_keys=True, ensure_ascii=False)


def holds(given: Any, wanted: Any) -> bool:
    """Whether a value contains the wanted one: objects may have extra fields, lists must match in length and order.

    Numbers compare by value, `1` and `1.0` alike; true is not 1; texts compare up to white space.

    Example: `holds({"a": 1.0, "b": 2}, {"a": 1})` is True, `holds({"a": True}, {"a": 1})` is False.
    """
    if isinstance(wanted, dict):
        return isinstance(given, dict) and all(key in given and holds(given[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        same_length = isinstance(given, list) and len(given) == len(wanted)
        return same_length and all(holds(value, other) for value, other in zip(given, wanted, strict=True))
    if isinstance(wanted, bool) or isinstance(given, bool) or wanted is None:
        return given is wanted
    if isinstance(wanted, str):
        return isinstance(given, str) and folded(given) == folded(wanted)
    return isinstance(given, (int, float)) and given == wanted


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """Compare with the gold object; reasons `equal`, `different`, `no_answer`, `truncated` (object never closes), `error`.

    Example: `grade('{"city": "Paris"}', 'Here: {"city": "Paris", "sure": true}')` gives `(True, "equal")`.
    """
    wanted = _decoded(gold.strip(), 0)
    if wanted is None or not wanted[0]:
        return False, "error"  # no object, or one without fields
    text = after_thinking(completion)[-LONGEST:]
    given = last_object(text)
    if given is None:
        return False, "truncated" if "{" in text else "no_answer"
    try:
        equal = holds(given, wanted[0])
    except RecursionError:
        return False, "error"
    return equal, "equal" if equal else "different"


def as_completion(gold: str) -> str:
    return f"```json\n{gold}\n```"
