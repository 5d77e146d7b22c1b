"""Find the problem, the answer and the tag in a row: usual column names, and paths into nested cells."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from headwater.config.recipe import Columns
from headwater.errors import UserError
from headwater.types import letters_and_digits

PROBLEM_COLUMNS = ("problem", "question", "prompt", "messages", "conversations", "conversation", "query")
ANSWER_COLUMNS = (
    "answer", "expected_answer", "solution", "ground_truth", "final_answer", "reference_answer", "correct_answer",
    "gold_answer", "reward_model.ground_truth", "extra_info.answer",
)  # fmt: skip
"""In order of preference, in any case; of a solution the last box is read."""
CHOICE_COLUMNS = ("choices", "options")
_LETTER = re.compile(r"\(?[A-Ja-j]\)?\.?")
_LABEL = re.compile(r"\(?[A-Ja-j][).:]\s*")
NESTED = 3
"""Levels of nested cells in which usual names are looked for and shown."""


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The cell of a column, or what a dotted path leads to: through objects, positions of lists, and both as JSON text.

    Raises KeyError where nothing is there.

    Example: `value_at({"reward_model": {"ground_truth": "7"}}, "reward_model.ground_truth")` is `"7"`.
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise KeyError(path) from None
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise KeyError(path)
    return value


def answer_at(row: Mapping[str, Any], path: str) -> Any:
    """The cell with the answer, None where the row has none; a reward model's `["7"]` (JSON text, as in Skywork-OR1) is `7`."""
    try:
        value = value_at(row, path)
    except KeyError:
        return None
    if path.endswith("ground_truth") and isinstance(value, str) and value.startswith('["'):
        try:
            listed = json.loads(value)
        except ValueError:
            return value
        return listed[0] if len(listed) == 1 else value
    return value


def refuse_hidden_choices(row: Mapping[str, Any], text: str, answer: Any, where: str) -> None:
    """Raise UserError for a row whose answer is a letter or a position among choices that the problem's text does not show.

    MMLU has them in `choices`, MMLU-Pro in `options`, ARC in `choices.text`, MedQA by letter. A text shows them if it holds all:
    a single one may stand there by chance, such as the 2 in "What is 2+2?".
    """
    shown = letters_and_digits(text)
    for name in CHOICE_COLUMNS:
        cell = row.get(name)
        cell = cell.get("text", list(cell.values())) if isinstance(cell, Mapping) else cell
        listed = [choice.strip() for choice in cell if isinstance(choice, str)] if isinstance(cell, list) else []
        choices = [_LABEL.sub("", choice, count=1) if _LABEL.match(choice) else choice for choice in listed]
        given = str(answer).strip()
        if len(choices) < 2 or given in choices or all(letters_and_digits(choice) in shown for choice in choices):
            continue
        position = not isinstance(answer, bool) and given.isdecimal() and int(given) < len(choices)
        if position or (isinstance(answer, str) and _LETTER.fullmatch(answer.strip())):
            raise UserError(
                f"{where}: the answer {answer!r} is one of {name!r}, which the problem does not show; write the choices into the "
                "problem (A. …, B. …), and the letter as the answer"
            )


def column_names(row: Mapping[str, Any], levels: int = NESTED) -> Iterator[str]:
    """A row's columns, each followed by the paths into it if it is an object."""
    for name, value in row.items():
        yield str(name)
        if levels and isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in column_names(value, levels - 1))


def find_problem_column(given: Columns, row: Mapping[str, Any], where: str) -> str:
    """The column with the problems. Raises UserError."""
    return _find(given.problem, PROBLEM_COLUMNS, row) or _refuse(given.problem, PROBLEM_COLUMNS, row, "problem", where)


def find_answer_column(given: Columns, row: Mapping[str, Any], where: str, needed: bool) -> str | None:
    """The column with the answers; None for a file without answers that needs none."""
    column = _find(given.answer, ANSWER_COLUMNS, row)
    if column is None and (needed or given.answer is not None):
        _refuse(given.answer, ANSWER_COLUMNS, row, "answer", where)
    return column


def _find(given: str | None, usual: Sequence[str], row: Mapping[str, Any]) -> str | None:
    """The column that a recipe names, or the first usual one, preferably in its usual case; None if the row has none."""
    names = list(column_names(row))
    if given is None:
        folded = {name.lower(): name for name in reversed(names)}
        for column in (*(name for name in usual if name in names), *(folded[name] for name in usual if name in folded)):
            return column
    for path in usual if given is None else (given,):  # what is left are paths into JSON text and lists
        with contextlib.suppress(KeyError):
            value_at(row, path)
            return path
    return None


def _refuse(given: str | None, usual: Sequence[str], row: Mapping[str, Any], role: str, where: str) -> NoReturn:
    wanted = "|".join(usual[:3]) if given is None else repr(given)
    raise UserError(f"{where}: has no column {wanted} for the {role}; its columns are {', '.join(column_names(row))}")
