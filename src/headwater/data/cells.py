"""Convert cells of data files to plain values, from which a task reads its gold answers (`tasks.golds`)."""

from __future__ import annotations

import math
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from headwater.data.arrow_rows import Unreadable


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
    if isinstance(value, (list, tuple, dict)):
        try:
            if isinstance(value, dict):
                return {str(name): _plain_part(part) for name, part in value.items()}
            return [_plain_part(part) for part in value]
        except RecursionError:
            raise ValueError("is nested too deeply") from None
    if isinstance(value, datetime):
        midnight = value.tzinfo is None and value.time() == time()
        return value.date().isoformat() if midnight else value.isoformat(sep=" ")
    if isinstance(value, time):  # 15:45, as a person writes it
        return value.isoformat("auto" if value.second or value.microsecond else "minutes")
    if isinstance(value, date):
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
