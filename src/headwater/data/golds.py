"""Convert cells of data files to gold answers."""

from __future__ import annotations

import math
from typing import Any

from headwater.tasks import maths_text

# Integers beyond this are not exact as floats; their text is kept.
LARGEST_EXACT_FLOAT = 2**53


def gold_answer(value: Any) -> str | None:
    """Gold answer of a cell: the text after GSM8K's last `####`, else in the last box, else all of it; None if empty.

    Example: `gold_answer("… <<48+24=72>>72 clips.\\n#### 1,080")` is `"1,080"`, `gold_answer(27.0)` is `"27"`.
    """
    if value is None or isinstance(value, bool):
        return None if value is None else str(value)
    if isinstance(value, float):
        if math.isnan(value):  # a missing cell of a table
            return None
        return str(int(value)) if value.is_integer() and abs(value) <= LARGEST_EXACT_FLOAT else repr(value)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return gold_answer(value[0])
    text = str(value)
    if "####" in text:
        text = text.rpartition("####")[2]
    elif "\\boxed" in text or "\\fbox" in text:
        boxed, _ = maths_text.last_box(text)
        text = text if boxed is None else boxed
    return text.strip() or None
