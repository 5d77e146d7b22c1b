"""Convert cells of data files to gold answers."""

from __future__ import annotations

import math
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from headwater.data.arrow_rows import LARGEST_EXACT_FLOAT, Unreadable
from headwater.tasks import maths_text
from headwater.tasks.announced import announced_answer, is_solution, marked_answer


def plain_value(value: Any) -> Any:
    """A cell as text, number, bool, list, dict or None: what a person would have written in a JSON file.

    Decimals keep their digits (`12.50`) unless they are whole (`72.000` is 72), dates and times become ISO text, numpy scalars and
    arrays Python values. Raises ValueError, which goes on after the name of a column, for bytes that are no text, `Unreadable`
    cells and other types.

    Example: `plain_value(Decimal("12.50"))` is `"12.50"`, `plain_value(date(2024, 5, 1))` is `"2024-05-01"`.
    """
    if isinstance(value, Unreadable):
        raise ValueError(value.reason)
    if hasattr(value, "tolist"):  # numpy's, without importing it
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value  # tables write a missing cell as NaN
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else f"{value:f}"
    if isinstance(value, (list, tuple)):
        return [_plain_part(part) for part in value]
    if isinstance(value, dict):
        return {str(name): _plain_part(part) for name, part in value.items()}
    if isinstance(value, datetime):
        midnight = value.tzinfo is None and value.time() == time()
        return value.date().isoformat() if midnight else value.isoformat(sep=" ")
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray)):
        raise ValueError("holds bytes that are not UTF-8 text")
    raise ValueError(f"is no answer but {type(value).__name__}; store it as text")


def _plain_part(value: Any) -> Any:
    """A value within a list or an object, where a decimal is a number if a float holds it."""
    plain = plain_value(value)
    if isinstance(value, Decimal) and isinstance(plain, str) and Decimal(repr(float(plain))) == value:
        return float(plain)
    return plain


def gold_answer(value: Any) -> str | None:
    """Gold answer of a cell for tasks of mathematics; None if it has none.

    Of a text: what follows GSM8K's `####` on the last line, else the last box, else the answer that a solution of several lines
    announces ("The answer is …"), else a text of one line as it is. A solution without any of these has no answer.

    Example: `gold_answer("… <<48+24=72>>72 clips.\\n#### 1,080")` is `"1,080"`, `gold_answer(27.0)` is `"27"`.
    """
    value = plain_value(value)
    if isinstance(value, list) and len(value) == 1:
        return gold_answer(value[0])
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) <= LARGEST_EXACT_FLOAT else repr(value)
    if value is None or not str(value).strip("# \t\r\n"):
        return None
    text = str(value).strip()
    marked = marked_answer(text)
    if marked is not None:
        return marked
    if "\\boxed" in text or "\\fbox" in text:
        boxed, opened = maths_text.last_box(text)
        if boxed is not None or opened:
            return (boxed or "").strip() or None
    announced = announced_answer(text)
    if announced is not None or is_solution(text):
        return announced or None
    return text
