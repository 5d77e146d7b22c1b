"""Describe a file of problems: what its answers are, which grader fits them, and its worked solutions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from headwater.config.recipe import Source
from headwater.data.cells import plain_value
from headwater.data.choices import choices_of
from headwater.data.columns import answer_at
from headwater.data.rows import read_rows
from headwater.data.sources import find_columns
from headwater.errors import UserError
from headwater.tasks.choice import letters_of
from headwater.tasks.golds import gold_answer

SOLUTION_COLUMNS = (
    "solution", "reference_solution", "worked_solution", "rationale", "explanation", "reasoning", "generated_solution",
)  # fmt: skip
"""Columns with a worked solution, where the answer's own cell holds none; in order of preference."""
WORKED_WORDS = 8
"""Fewest words of a worked solution; a shorter cell is an answer alone."""
MOST_ROWS = 2000
"""Rows that are read; the rest of a longer file is assumed to be alike."""
NEARLY_ALL, MOST = 0.95, 0.6
_MATHS = re.compile(r"\d|\\[a-zA-Z]|π|√|∞")
_TESTS = re.compile(r"\s*(?:assert\b|def (?:test_|check\b)|import |from \w+ import )")


@dataclass(frozen=True)
class FileDescription:
    """What the rows of a file hold.

    task       built-in task whose grader fits the answers
    reason     what the task was chosen by, as a phrase with its numbers
    solutions  texts of worked solutions; empty if there are none
    """

    task: str
    reason: str
    solutions: tuple[str, ...]


def describe(source: Source, where: str) -> FileDescription:
    """Read the first rows of a file. Raises UserError, which begins with `where`, for a file that cannot be read or is empty."""
    numbered = list(islice(read_rows(source, where), MOST_ROWS))
    if not numbered:
        raise UserError(f"{where} is empty")
    _, answer = find_columns(source, numbered[0], where, need_answers=False)
    rows = [row for _, row in numbered]
    cells = [] if answer is None else [_converted(plain_value, answer_at(row, answer)) for row in rows]
    listed = sum(choices_of(row) is not None for row in rows)
    choice = "choice", f"{listed} of {len(rows)} rows list choices, which are written into the problem with letters"
    task, reason = choice if listed >= NEARLY_ALL * len(rows) else task_of(cells)
    return FileDescription(task, reason, _solutions(rows, answer, cells))


def task_of(cells: Sequence[Any]) -> tuple[str, str]:
    """(built-in task, reason) for the cells that hold the answers of a file.

    Example: `task_of(["B", "(C)", "A"])` is `("choice", "3 of 3 answers are letters from A to J")`.
    """
    given = [cell for cell in cells if cell is not None and str(cell).strip()]
    count = len(given)
    if not count:
        return "maths", "no answers were found to choose by"
    objects = [cell for cell in given if isinstance(cell, dict)]
    texts = [str(cell) for cell in given]
    if len(objects) >= NEARLY_ALL * count:
        if all("tests" in cell for cell in objects):
            return "python", f"{len(objects)} of {count} answers are objects with tests"
        if all("value" in cell for cell in objects):
            return "numeric", f"{len(objects)} of {count} answers are objects with a value"
        return "json", f"{len(objects)} of {count} answers are JSON objects"
    tests = sum(_TESTS.match(text) is not None and "assert" in text for text in texts)
    if tests >= NEARLY_ALL * count:
        return "python", f"{tests} of {count} answers are tests in Python"
    letters = sum(len(text) <= 8 and letters_of(text) is not None for text in texts)
    if letters >= NEARLY_ALL * count:
        return "choice", f"{letters} of {count} answers are letters from A to J"
    golds = [gold for cell in given if (gold := _converted(gold_answer, cell)) is not None]
    mathematical = sum(_MATHS.search(gold) is not None for gold in golds)
    if mathematical >= MOST * count:
        return "maths", f"{mathematical} of {count} answers hold a number or an expression"
    return "exact", f"{count - mathematical} of {count} answers are texts without a number or an expression"


def _converted(convert: Callable[[Any], Any], value: Any) -> Any:
    """The converted value; None for one that cannot be converted, which loading the file refuses with its row."""
    try:
        return convert(value)
    except ValueError:
        return None


def _solutions(rows: Sequence[Mapping[str, Any]], answer: str | None, cells: Sequence[Any]) -> tuple[str, ...]:
    """The worked solutions: the answers' own cells if most of them are, else those of a column that usually has them."""
    columns = {} if answer is None else {answer: cells}
    columns |= {
        name: [row.get(name) for row in rows] for name in SOLUTION_COLUMNS if name in rows[0] and name != answer
    }
    for values in columns.values():
        worked = tuple(text for text in values if isinstance(text, str) and len(text.split()) >= WORKED_WORDS)
        if len(worked) >= MOST * len(rows):
            return worked
    return ()
