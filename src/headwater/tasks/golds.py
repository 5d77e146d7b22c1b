"""Read gold answers from the cells of data files."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from headwater.tasks import maths_text
from headwater.tasks.announced import announced_answer, is_solution, marked_answer, without_announcement
from headwater.tasks.thinking import after_thinking

PLACEHOLDERS = frozenset(
    {"proof", "notfound", "not found", "n/a", "nan", "null", "<na>", "tbd", "?", "??", "???", "-", "–", "—"}
    | {"#n/a", "#div/0!", "#value!", "#ref!", "#name?", "#num!", "#null!"}
)
"""Texts that stand for a missing answer, in lower case: of NuminaMath-1.5 (`proof`, `notfound`), of pandas, of people, and of Excel
(with #). `None` is not among them: it may be an answer."""
LARGEST_EXACT_FLOAT = 2**53
"""Integers beyond this are not exact as floats; their text is kept."""
_LIST_OF_TEXTS = re.compile(r"""\[\s*(["'])(?P<first>.*?)(?<!\\)\1\s*(?P<more>[,\s].*)?\]""", re.DOTALL)


def cell_as_is(value: Any) -> str | None:
    """Convert a data cell to a gold answer: text unchanged, numbers as text, objects as JSON; None if empty.

    Example: `cell_as_is({"value": 3.14, "abs": 0.01})` is `'{"value": 3.14, "abs": 0.01}'`.
    """
    if value is None or value != value:  # tables write a missing cell as NaN
        return None
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, bool)) else str(value)
    return text if text.strip() else None


def gold_answer(value: Any) -> str | None:
    """Gold answer of a cell for tasks of mathematics; None if it has none.

    Of a text: what follows GSM8K's `####` on the last line, else the last box, else the answer that it announces ("The answer is …"),
    else a text of one line as it is. A solution of several lines without any of these has no answer: as a gold it would be equal to
    itself and to nothing that a model writes. Nor has one of the PLACEHOLDERS.

    A list of one, also one that is written as text (`["4"]`), gives its element.

    Raises ValueError for an object and for a list of more than one.

    Example: `gold_answer("… <<48+24=72>>72 clips.\\n#### 1,080")` is `"1,080"`, `gold_answer(27.0)` is `"27"`.
    """
    text = _text_of(value)
    if text.lower() in PLACEHOLDERS:
        return None
    text = after_thinking(text).strip()  # a box within the thinking is no answer
    marked = _marked_or_boxed(text)
    if marked is not None:
        return _without_label(without_announcement(marked)) or None
    answer = announced_answer(text)
    if answer is None and not is_solution(text):
        answer = _without_label(text)
    return answer or None


def marked_gold(value: Any) -> str | None:
    """Gold answer of a cell for a user's grader: what follows `####` on the last line, else the last box, else all of the text.

    Raises ValueError as `gold_answer` does.

    Example: `marked_gold("First line.\\nSecond line.")` is the text itself.
    """
    text = after_thinking(_text_of(value)).strip()
    return _marked_or_boxed(text) or text or None


def _text_of(value: Any) -> str:
    """A cell's text, numbers as a person writes them; "" if it is empty, or a bare mark."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return _text_of(value[0])
    if isinstance(value, (dict, list, tuple)):
        raise ValueError(f"is not an answer but {type(value).__name__}")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) <= LARGEST_EXACT_FLOAT else _float_text(value)
    text = str(value).strip()
    if listed := _LIST_OF_TEXTS.fullmatch(text):
        if listed["more"]:
            raise ValueError("is not an answer but a list of several, written as text")
        # JSON and Python double every backslash in a text; a list written by hand may not.
        runs = re.findall(r"\\+", listed["first"])
        doubled = all(len(run) % 2 == 0 for run in runs)
        return _text_of(listed["first"].replace("\\\\", "\\") if doubled else listed["first"])
    return text if text.strip("# \t\r\n") else ""


def _without_label(text: str) -> str:
    """The value after a word and a colon: `Total: 7` gives `7`."""
    return re.sub(r"^[A-Za-z][A-Za-z ]{0,30}:\s+(?=[-+−]?[$\\]?[\d.\\])", "", text)


def _float_text(value: float) -> str:
    """Write a float as a person would: 0.3 for 0.1 * 3, which is 0.30000000000000004 by rounding."""
    exact, rounded = repr(value), repr(float(f"{value:.15g}"))
    return rounded if len(rounded) <= len(exact) - 4 else exact


def _marked_or_boxed(text: str) -> str | None:
    """What a mark or a box gives: "" for an empty or unclosed box, None without either."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    boxed, opened = maths_text.last_box(text)
    return (boxed or "").strip() if opened else None
