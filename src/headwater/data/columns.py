"""Find the problem, the answer and the tag in a row: usual column names, and paths into nested cells."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from headwater.config.recipe import Columns
from headwater.data.arrow_rows import Unreadable
from headwater.data.choices import read_choices
from headwater.data.conversations import messages_of
from headwater.errors import UserError
from headwater.types import letters_and_digits

PROBLEM_COLUMNS = ("problem", "question", "prompt", "messages", "conversations", "conversation", "query")
FURTHER_PROBLEM_COLUMNS = (
    "problem_statement", "problem_text", "question_content", "question_text", "ctx", "instruction", "input",
)  # fmt: skip
"""Read where a row has none of the above; of several with different texts none is preferred."""
JOINED_COLUMNS = {("body", "question"): " ", ("instruction", "input"): "\n\n"}
"""Two columns that make one problem, as in SVAMP and Alpaca, and what stands between them."""
ANSWER_COLUMNS = (
    "answer", "expected_answer", "solution", "ground_truth", "final_answer", "reference_answer", "correct_answer",
    "gold_answer", "reward_model.ground_truth", "extra_info.answer",
)  # fmt: skip
"""In order of preference, in any case; of a solution the last box is read."""
FURTHER_ANSWER_COLUMNS = (
    "answer_key", "answerkey", "gold", "gold_label", "gt", "gt_answer", "target", "label", "output", "response", "completion",
)  # fmt: skip
"""Read where answers are used and a row has none of the above; of several with different values none is preferred."""
CONTEXT_COLUMNS = (
    "context", "contexts", "passage", "article", "document", "paragraph", "story", "background", "premise", "support", "body",
    "facts", "table", "dialogue", "history", "instructions",
)  # fmt: skip
"""Columns besides the problem that its text may need; they are written before it."""
_FIELD = re.compile(r"\{([^{}]+)\}")
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


def column_names(row: Mapping[str, Any], levels: int = NESTED) -> Iterator[str]:
    """A row's columns, each followed by the paths into it if it is an object."""
    for name, value in row.items():
        yield str(name)
        if levels and isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in column_names(value, levels - 1))


def is_template(problem: str, row: Mapping[str, Any]) -> bool:
    """Whether `columns.problem` is a template of columns, such as `{context}\\n\\n{question}`, and no column's name."""
    return problem not in row and _FIELD.search(problem) is not None


def template_columns(template: str) -> list[str]:
    return list(dict.fromkeys(_FIELD.findall(template)))


def required_cell(row: Mapping[str, Any], path: str, where: str) -> Any:
    """`value_at` for a column that a row must have. Raises UserError where it is missing or cannot be read."""
    try:
        value = value_at(row, path)
    except KeyError:
        raise UserError(f"{where}: has no column {path!r}; its columns are {', '.join(map(str, row))}") from None
    if isinstance(value, Unreadable):
        raise UserError(f"{where}: {path!r} {value.reason}")
    return value


def fill_template(template: str, row: Mapping[str, Any], where: str) -> str:
    """The text of a problem that is made of several columns; an empty cell adds nothing.

    Choices become lettered lines, numbers and lists of numbers their JSON. Raises UserError for a missing column and other cells.

    Example: `fill_template("{a} {b}", {"a": "Ann has 3 pens.", "b": "How many?"}, "")` is `"Ann has 3 pens. How many?"`.
    """

    def cell_text(match: re.Match[str]) -> str:
        name = match[1]
        value = required_cell(row, name, where)
        if value is None or isinstance(value, str):
            return value or ""
        choices = read_choices(name, value)
        if choices is not None:
            return choices.text
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise UserError(f"{where}: {name!r} is not text but {type(value).__name__}, and the template needs text")
        return json.dumps(value)

    return _FIELD.sub(cell_text, template).strip()


def find_problem_column(given: Columns, row: Mapping[str, Any], where: str) -> str:
    """The column with the problems, or a template of the columns that make them. Raises UserError."""
    if given.problem is not None and is_template(given.problem, row):
        fill_template(given.problem, row, where)
        return given.problem
    column = _find(given.problem, PROBLEM_COLUMNS, row)
    if given.problem is None:
        further = FURTHER_PROBLEM_COLUMNS
        column = _only(further, row, "problem", where) if column is None else _joined(row, column) or column
    return column or _refuse(given.problem, PROBLEM_COLUMNS, row, "problem", where)


def find_answer_column(
    given: Columns, row: Mapping[str, Any], where: str, needed: bool, further: Sequence[str]
) -> str | None:
    """The column with the answers; None for a file without answers that needs none.

    further  names that are tried after ANSWER_COLUMNS; a cell that is true or false is a judgement there and no answer
    """
    column = _find(given.answer, ANSWER_COLUMNS, row)
    if column is None and given.answer is None:
        unjudged = {name: cell for name, cell in row.items() if not isinstance(cell, bool)}
        column = _only(further, unjudged, "answer", where)
    if column is None and (needed or given.answer is not None):
        _refuse(given.answer, ANSWER_COLUMNS, row, "answer", where)
    return column


@dataclass(frozen=True)
class UnusedColumn:
    """A column that may belong to the problem and is not read.

    rows    number of rows, of `of`, in which it holds a text that the problem does not contain
    fields  what a template of columns writes for it; None where the problem is a conversation, which no template holds
    """

    column: str
    problem_column: str
    rows: int
    of: int
    fields: str | None

    @property
    def evidence(self) -> str:
        columns = template_columns(self.problem_column)
        read = " and ".join(map(repr, columns)) if columns else repr(self.problem_column)
        return (
            f"column {self.column!r} holds text in {self.rows} of {self.of} rows and is not read; the problem is {read}"
        )

    def remedy(self, field: str) -> str:
        """What to do about it; `field` is the field or option that names the problem's column."""
        if self.column.lower() in PROBLEM_COLUMNS:
            return f"name the right one in {field}: {self.problem_column} or {self.column}"
        if self.fields is None:
            return "write it into the conversation, or remove the column"
        whole = self.problem_column if template_columns(self.problem_column) else f"{{{self.problem_column}}}"
        after = self.column.lower() not in CONTEXT_COLUMNS
        both = f"{whole}\n\n{self.fields}" if after else f"{self.fields}\n\n{whole}"
        joined, alone = (json.dumps(template, ensure_ascii=False) for template in (both, whole))
        return f"set {field} to {joined} to read both, or to {alone} to leave it out"


def context_columns(given: Columns, row: Mapping[str, Any], used: Iterable[str | None]) -> list[str]:
    """Columns besides the problem that its text may need; none where the recipe has a template of columns."""
    if given.problem is not None and is_template(given.problem, row):
        return []
    taken = {name for path in used if path for name in (path, path.partition(".")[0], *template_columns(path))}
    usual = (*FURTHER_PROBLEM_COLUMNS, *CONTEXT_COLUMNS, *(PROBLEM_COLUMNS if given.problem is None else ()))
    return [name for name in row if name not in taken and name.lower() in usual]


def lacks_column(problem: str, column: str, cell: Any) -> bool:
    """Whether a cell holds a text that a problem does not contain.

    A second problem column (`prompt` next to `question`) that contains the problem adds only an instruction and does not count.
    """
    texts = [text for text in _texts(cell) if text.strip()]
    if not texts or (messages_of(cell) is not None and column.lower() not in CONTEXT_COLUMNS):
        return False
    shown = letters_and_digits(problem)
    missing = [text for text in map(letters_and_digits, texts) if text not in shown]
    return bool(missing) and (column.lower() in CONTEXT_COLUMNS or not any(shown in text for text in missing))


def _texts(cell: Any, levels: int = NESTED) -> Iterator[str]:
    """The texts in a cell, in the order of the file."""
    if isinstance(cell, str):
        yield cell
    elif levels and isinstance(cell, (list, Mapping)):
        for part in cell.values() if isinstance(cell, Mapping) else cell:
            yield from _texts(part, levels - 1)


def _folded(names: Iterable[str]) -> dict[str, str]:
    """Names in lower case with `_` for spaces -> names as they are, the first of equal ones."""
    return {name.lower().replace(" ", "_"): name for name in reversed(list(map(str, names)))}


def _joined(row: Mapping[str, Any], column: str) -> str | None:
    """The template of a pair in JOINED_COLUMNS if the column is one of them and both hold texts."""
    folded = _folded(row)
    for pair, separator in JOINED_COLUMNS.items():
        if column.lower() in pair and all(name in folded and _is_text(row[folded[name]]) for name in pair):
            return separator.join(f"{{{folded[name]}}}" for name in pair)
    return None


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and messages_of(value) is None)


def _only(usual: Sequence[str], row: Mapping[str, Any], role: str, where: str) -> str | None:
    """The column of a row that has one of these names. Raises UserError if two of them hold different values."""
    folded = _folded(column_names(row))
    pair = next((_joined(row, folded[name]) for name in usual if name in folded), None)
    if pair is not None:
        return pair
    filled = [folded[name] for name in usual if name in folded and value_at(row, folded[name]) not in (None, "", [])]
    if not filled:
        return next((folded[name] for name in usual if name in folded), None)
    first, *others = filled
    for other in others:
        if value_at(row, other) != value_at(row, first) and not other.startswith(f"{first}."):
            raise UserError(
                f"{where}: {first!r} and {other!r} could both be the {role}; name the column in columns.{role} (--{role})"
            )
    return first


def _find(given: str | None, usual: Sequence[str], row: Mapping[str, Any]) -> str | None:
    """The column that a recipe names, or the first usual one, preferably in its usual case; None if the row has none."""
    names = list(column_names(row))
    if given is None:
        folded = _folded(names)
        for column in (*(name for name in usual if name in names), *(folded[name] for name in usual if name in folded)):
            return column
    for path in usual if given is None else (given,):  # what is left are paths into JSON text and lists
        with contextlib.suppress(KeyError):
            value_at(row, path)
            return path
    return None


def _refuse(given: str | None, usual: Sequence[str], row: Mapping[str, Any], role: str, where: str) -> NoReturn:
    wanted = "|".join(usual[:3]) if given is None else repr(given)
    raise UserError(
        f"{where}: has no column {wanted} for the {role}; its columns are {', '.join(column_names(row))}; name one in columns.{role} "
        f"(--{role})"
    )
