"""Task `numeric`: numbers within a tolerance, by exact fractions. Units and notation as in `maths`.

A gold answer is a number (`3.14`: within a millionth of it), a number with its tolerance (`3.14 ± 0.01`, `250 +/- 2%`),
or a JSON object `{"value": 3.14, "abs": 0.01, "rel": 0.002}`, where the wider tolerance counts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fractions import Fraction

from headwater.tasks import maths_text
from headwater.tasks.maths_equal import without_unit
from headwater.tasks.maths_numbers import number
from headwater.tasks.thinking import after_thinking

DEFAULT_REL = Fraction(1, 10**6)
LONGEST = 1000  # characters; longer answers are no number
# `9.8 m/s^{2}`: a letter after a number is a unit, except x, y, n, k and M.
_LETTER_UNIT = r"(?:[msghlLNJWVAKCF]|[a-zA-Z]{2,4})(?:\^\{?-?\d\}?)?"
_UNITS = re.compile(
    rf"(.*\d\}}?)\s+({_LETTER_UNIT}(?:\s*(?:/|\\cdot)\s*{_LETTER_UNIT})+|[msghlLNJWVAKCF](?:\^\{{?-?\d\}}?)?)",
    re.DOTALL,
)
_PLUS_MINUS = re.compile(r"±|\+/-|\+-|\\pm(?![a-zA-Z])")


@dataclass(frozen=True)
class Gold:
    """Gold value and absolute tolerance. Example: `Gold(value=Fraction(314, 100), margin=Fraction(1, 100))`."""

    value: Fraction
    margin: Fraction


def read_gold(gold: str) -> Gold | None:
    """Parse value and tolerance of a gold answer; None if it is no number.

    Example: `read_gold("250 ± 2%")` is `Gold(value=Fraction(250), margin=Fraction(5))`.
    """
    gold = gold.strip()
    if gold.startswith("{"):
        return _from_json(gold)
    parts = _PLUS_MINUS.split(gold)
    value = value_of(parts[0])
    if value is None or len(parts) > 2:
        return None
    if len(parts) == 1:
        return Gold(value, abs(value) * DEFAULT_REL)
    share = re.search(r"\\?%\s*$", parts[1])
    margin = value_of(parts[1])
    if margin is None or margin < 0:
        return None
    return Gold(value, abs(value) * margin / 100 if share else margin)


def _from_json(gold: str) -> Gold | None:
    try:
        # Keep numbers as text: `number` parses them exactly and rejects 1e999999999, which would fill the memory.
        fields = json.loads(gold, parse_float=str, parse_int=str, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or fields.keys() - {"value", "abs", "rel"}:
        return None
    numbers: dict[str, Fraction] = {}
    for key, cell in fields.items():
        if cell is None:
            continue
        parsed = value_of(cell) if isinstance(cell, str) else None
        if parsed is None:
            return None
        numbers[key] = parsed
    value = numbers.pop("value", None)
    if value is None or any(margin < 0 for margin in numbers.values()):
        return None
    relative = numbers.get("rel", Fraction(0) if "abs" in numbers else DEFAULT_REL)
    return Gold(value, max(numbers.get("abs", Fraction(0)), relative * abs(value)))


def value_of(text: str) -> Fraction | None:
    """Parse a number, ignoring units. Example: `value_of("$1{,}080$ km")` is `Fraction(1080)`."""
    if len(text) > LONGEST:
        return None
    spelling = maths_text.canonical(text)
    value = number(without_unit(spelling))
    if value is None and (measured := _UNITS.fullmatch(spelling)):
        return number(measured[1])
    return value


def extract(completion: str) -> str | None:
    """Canonical number of a completion for majority votes; the answer's text if it is no number."""
    answer, _ = _answer_of(completion)
    value = None if answer is None else value_of(answer)
    return answer if value is None else str(value)


def _answer_of(completion: str) -> tuple[str | None, str]:
    """Extract as in `maths`; a completion that is only a number is its own answer."""
    answer, missing = maths_text.extract_value(completion)
    whole = after_thinking(completion).strip()
    if answer is None and missing != "truncated" and value_of(whole) is not None:
        return whole, ""
    return answer, missing


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """Compare within the tolerance; reasons `equal`, `different`, `no_answer`, `truncated`, `error` (gold is no number).

    Example: `grade("3.14 ± 0.01", "about \\\\boxed{22/7}")` gives `(True, "equal")`.
    """
    wanted = read_gold(gold)
    if wanted is None:
        return False, "error"
    answer, missing = _answer_of(completion)
    if answer is None:
        return False, missing
    value = value_of(answer)
    near = value is not None and abs(value - wanted.value) <= wanted.margin
    return near, "equal" if near else "different"


def as_completion(gold: str) -> str:
    wanted = read_gold(gold)
    return f"\\boxed{{{gold if wanted is None else wanted.value}}}"
