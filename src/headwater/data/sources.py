"""Where problems come from: files, folders saved by `datasets`, hub ids, generators; all become Problems and golds.

Errors name the file, and the row or the column. A problem's id is its content, so rows with the same text fold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from headwater.config.recipe import Columns, Source
from headwater.data.contamination import Leak, find_leaks
from headwater.errors import UserError
from headwater.tasks import maths_text
from headwater.tasks.registry import TASKS
from headwater.types import Problem

PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "solution", "expected_answer")
# Whole numbers beyond this are not exact as floats; their text stays as it is.
LARGEST_EXACT_FLOAT = 2**53

MOST_BYTES, MOST_ROWS, PARQUET_ROWS = 4 << 30, 50_000_000, 256
"""Of a Parquet file once it is unpacked, and the rows that are unpacked at once."""

Row = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Loaded:
    """What a source held.

    problems         one for each distinct text, in the order of the file
    gold             answers by problem id; problems without one are missing here
    duplicates       how many rows repeated a problem that stood before
    contradictions   ids of problems that stood there with different answers; they are in neither of the above
    without_answer   ids of problems that have no answer
    rows             the rows that each id was read from, contradictions and leaks included
    leaks            the problems that `without_leaks` took out, and why

    Example: `load(Source(path="train.jsonl"), "data.labeled", need_answers=True).gold["9f8b…"]` is `"72"`.
    """

    problems: list[Problem]
    gold: dict[str, str]
    duplicates: int = 0
    contradictions: tuple[str, ...] = ()
    without_answer: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    leaks: tuple[Leak, ...] = ()


def load(source: Source, what: str, need_answers: bool, gold: Callable[[Any], str | None] | None = None) -> Loaded:
    """Read a source; `what` is the recipe's field for it and stands in every error sentence.

    gold  how a cell becomes a gold answer (`Task.gold`); by default `gold_answer`

    Raises UserError with one sentence for whatever is wrong with the file, a row or a column.
    """
    if source.generate is not None:
        return _generated(source, what)
    assert source.path is not None
    where = f"{what}: {source.path}"
    rows = _rows(source, where)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{where} is empty")
    found = [str(name) for name in first[1]]
    problem_column = _column(source.columns.problem, PROBLEM_COLUMNS, found, "problem", where)
    answer_columns = _answer_columns(source.columns, found, where, need_answers)
    read: list[tuple[int, str, str | None]] = []
    tags: dict[int, str] = {}
    for number, row in chain([first], rows):
        place = f"{where}, row {number}"
        if source.columns.tag is not None:
            tags[number] = _tag(row, source.columns.tag, place)
        read.append((number, _problem_text(row, problem_column, place), _answer(row, answer_columns, place, gold)))
    read = read[: source.limit]
    if need_answers:
        lacking = [number for number, _, answer in read if answer is None]
        if lacking:
            among = f" ({len(lacking)} of {len(read)} rows have none)" if len(lacking) > 1 else ""
            raise UserError(f"{where}, row {lacking[0]}: the problem has no answer in {answer_columns[0]!r}{among}")
    return _folded(read, source.path, tags)


def without_leaks(loaded: Loaded, evals: Mapping[str, Loaded]) -> tuple[Loaded, dict[str, list[str]]]:
    """Take out the problems that stand in an evaluation set too, and say which stood in which; `leaks` says why.

    See `contamination`: the same letters and digits, or mostly the same runs of words.

    Example: `without_leaks(train, {"math500": test})[1]` is `{"math500": ["9f8b…"]}`.
    """
    found = find_leaks(loaded.problems, {name: one.problems for name, one in evals.items()})
    leaks = {name: [one.problem_id for one in found if one.eval == name] for name in evals}
    leaked = {one.problem_id for one in found}
    kept = replace(
        loaded,
        problems=[problem for problem in loaded.problems if problem.id not in leaked],
        gold={name: answer for name, answer in loaded.gold.items() if name not in leaked},
        without_answer=tuple(name for name in loaded.without_answer if name not in leaked),
        leaks=tuple(found),
    )
    return kept, leaks


def gold_answer(value: Any) -> str | None:
    """The gold answer in a cell: after GSM8K's last `####`, else in the last box, else the text; None for none.

    Example: `gold_answer("… <<48+24=72>>72 clips.\\n#### 1,080")` is `"1,080"`, `gold_answer(27.0)` is `"27"`.
    """
    if value is None or isinstance(value, bool):
        return None if value is None else str(value)
    if isinstance(value, float):
        if math.isnan(value):  # how tables write a missing cell
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


# Rows -----------------------------------------------------------------------------------------------------------------


def _rows(source: Source, where: str) -> Iterator[Row]:
    """(number, row) pairs; numbers are lines of a text file, else they count from 1."""
    assert source.path is not None
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _saved_folder(path, source.split, where)
    if path.suffix == ".parquet":
        return _parquet(path, where)
    if path.exists() or path.suffix in (".jsonl", ".json", ".txt", ".ndjson"):
        return json_rows(path, where)
    return _hub(source, where)


def json_rows(path: Path, where: str) -> Iterator[Row]:
    """The objects of a JSONL file, or of a JSON file that is one list; blank lines are passed over."""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe has no end
            raise UserError(f"{where}: is not a file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise UserError(f"{where}, row {row}: is not UTF-8 text") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: is not JSON ({error})") from None
        yield from ((number, _object(value, f"{where}, row {number}")) for number, value in enumerate(values, 1))
        return
    # Only \n ends a row: U+2028 and its like may stand unescaped inside JSON strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, row {number}: is not JSON ({error})") from None
        yield number, _object(value, f"{where}, row {number}")


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object but {type(value).__name__}")
    return value


def _parquet(path: Path, where: str) -> Iterator[Row]:
    if not path.exists():
        raise UserError(f"{where}: no such file")
    import pyarrow.parquet  # comes with `datasets`; slow to import

    number = taken = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            held = file.metadata
            unpacked = sum(held.row_group(place).total_byte_size for place in range(held.num_row_groups))
            if max(unpacked, 0) > MOST_BYTES or held.num_rows > MOST_ROWS:
                raise UserError(
                    f"{where}: unpacks to {held.num_rows:,} rows of {unpacked:,} bytes; that is no file of problems"
                )
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                taken += batch.nbytes  # a page of repeats is far smaller in the file than its rows are
                if taken > MOST_BYTES:
                    raise UserError(f"{where}: unpacks to more than {MOST_BYTES:,} bytes; that is no file of problems")
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow has many
        raise UserError(f"{where}: cannot be read as Parquet ({_one_line(error)})") from None


def _saved_folder(path: Path, split: str, where: str) -> Iterator[Row]:
    import datasets

    try:
        held = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{where}: is not a folder saved by datasets ({_one_line(error)})") from None
    yield from _of_split(held, split, where)


def _hub(source: Source, where: str) -> Iterator[Row]:
    import datasets

    try:
        held = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:
        raise UserError(f"{where}: is no file here and cannot be loaded from the hub ({_one_line(error)})") from None
    yield from enumerate(held, 1)


def _of_split(held: Any, split: str, where: str) -> Iterator[Row]:
    import datasets

    if isinstance(held, datasets.DatasetDict):
        if split not in held:
            raise UserError(f"{where}: has no split {split!r}, only {', '.join(held)}")
        held = held[split]
    yield from enumerate(held, 1)


def _one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:200] or type(error).__name__}"


# Columns --------------------------------------------------------------------------------------------------------------


def _column(given: str | None, usual: tuple[str, ...], found: list[str], role: str, where: str) -> str:
    if given is not None:
        if given not in found:
            raise UserError(f"{where}: has no column {given!r} for the {role}; its columns are {', '.join(found)}")
        return given
    for name in usual:
        if name in found:
            return name
    raise UserError(f"{where}: has no column {'|'.join(usual)} for the {role}; its columns are {', '.join(found)}")


def _answer_columns(columns: Columns, found: list[str], where: str, need_answers: bool) -> tuple[str, ...]:
    """The column that holds the answers; none for files of bare problems.

    `answer` is preferred to `solution`, whose last box is read, and to `expected_answer`.
    """
    if columns.answer is None and not need_answers and not any(name in found for name in ANSWER_COLUMNS):
        return ()
    usual = ("answer", "expected_answer", "solution") if columns.answer is None else ANSWER_COLUMNS
    return (_column(columns.answer, usual, found, "answer", where),)


def _problem_text(row: Mapping[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise UserError(f"{where}: has no column {column!r}; its columns are {', '.join(map(str, row))}")
    value = row[column]
    if isinstance(value, list):  # a chat: what the user said last is the problem
        turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") == "user"]
        value = turns[-1].get("content") if turns else value
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is not text but {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{where}: {column!r} is blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is JSON but no text, and could not be written down again
        raise UserError(f"{where}: {column!r} holds half a surrogate pair and is not UTF-8 text") from None
    return value


def _tag(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {column!r} (data.columns.tag) is no text but {value!r:.40}")
    return value


def _answer(
    row: Mapping[str, Any], columns: tuple[str, ...], where: str, gold: Callable[[Any], str | None] | None
) -> str | None:
    value = row.get(columns[0]) if columns else None
    if gold is not None:
        return gold(value)
    if isinstance(value, dict) or (isinstance(value, list) and len(value) != 1):
        raise UserError(f"{where}: {columns[0]!r} is not an answer but {type(value).__name__}")
    return gold_answer(value)


def _folded(rows: list[tuple[int, str, str | None]], name: str, tags: Mapping[int, str]) -> Loaded:
    """One problem for each id. A row without an answer neither contradicts nor hides one with it."""
    problems: dict[str, Problem] = {}
    stood: dict[str, list[int]] = {}
    answers: dict[str, set[str]] = {}
    gold: dict[str, str] = {}
    for number, text, answer in rows:
        problem = Problem.of(text, name, tags.get(number, ""))
        problem = problems.setdefault(problem.id, problem)
        stood.setdefault(problem.id, []).append(number)
        if answer is not None:
            gold.setdefault(problem.id, answer)
            answers.setdefault(problem.id, set()).add(maths_text.squeezed(answer))
    contradictions = tuple(name for name in stood if len(answers.get(name, ())) > 1)
    dropped = set(contradictions)
    return Loaded(
        problems=[problem for problem in problems.values() if problem.id not in dropped],
        gold={name: answer for name, answer in gold.items() if name not in dropped},
        duplicates=len(rows) - len(stood),
        contradictions=contradictions,
        without_answer=tuple(name for name in stood if name not in gold),
        rows={name: tuple(numbers) for name, numbers in stood.items()},
    )


def _generated(source: Source, what: str) -> Loaded:
    made = source.generate
    assert made is not None
    where = f"{what}.generate"
    makers = {name: task.generator for name, task in TASKS.items() if task.generator is not None}
    if made.task not in makers:
        raise UserError(f"{where}.task: {made.task!r} makes no problems; the tasks that do are {', '.join(makers)}")
    generator = makers[made.task]
    known = [one.name for one in fields(generator.dials)]
    unknown = [name for name in made.dials if name not in known]
    if unknown:
        raise UserError(f"{where}.dials: {made.task} has no dial {unknown[0]!r:.80}; its dials are {', '.join(known)}")
    try:
        pairs = generator.make(made.count, made.pool, made.seed, generator.dials(**made.dials))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    rows: list[tuple[int, str, str | None]] = [(number, *pair) for number, pair in enumerate(pairs, 1)]
    return _folded(rows[: source.limit], f"{made.task}:{made.pool}", {number: made.task for number, *_ in rows})
