"""Texts that only a supervising teacher reads, and whether they state a gold answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from headwater.data.columns import fill_template, is_template, required_cell
from headwater.errors import UserError


def context_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text of a column or of a template of columns; empty for a row without one. Raises UserError for a cell that is no text."""
    if is_template(column, row):
        return fill_template(column, row, where)
    value = required_cell(row, column, where)
    if value is not None and not isinstance(value, (str, int, float)):
        raise UserError(f"{where}: {column!r} (columns.context) is not text but {type(value).__name__}")
    return "" if value is None else str(value).strip()


def states_answer(context: str, gold: str | None) -> bool:
    """Whether a context holds the gold answer as a word of its own. A hint that names it by chance counts too.

    Example: `states_answer("17 + 45 = 62", "62")`, and not `states_answer("1623", "62")`.
    """
    if gold is None or not gold.strip():
        return False
    written = re.escape(re.sub(r"\s+", " ", gold.strip()))
    return re.search(rf"(?<!\w){written}(?!\w)", re.sub(r"\s+", " ", context), re.IGNORECASE) is not None


def fingerprint(contexts: Mapping[str, str]) -> str:
    """sha256 of the contexts and their problems."""
    return hashlib.sha256(json.dumps(sorted(contexts.items())).encode()).hexdigest()[:16]
