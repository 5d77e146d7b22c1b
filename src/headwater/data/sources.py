"""Load problems and gold answers from files, folders saved by `datasets`, hub ids or generators.

Errors name the file and the row or column. A problem's id is a hash of its content, so rows with the same text merge.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from headwater.config.recipe import Source
from headwater.data.columns import answer_at, find_answer_column, find_problem_column, value_at
from headwater.data.contamination import Leak, find_leaks
from headwater.data.conversations import Conversation, messages_of, read_conversation, refuse_media
from headwater.errors import UserError
from headwater.tasks import maths_text
from headwater.tasks.registry import TASKS
from headwater.types import Problem

REFERENCE = "the assistant's last turn"
"""Where the answer stands in a file of conversations without a column for it."""
# Integers beyond this are not exact as floats; their text is kept.
LARGEST_EXACT_FLOAT = 2**53

MOST_BYTES, MOST_ROWS, PARQUET_ROWS = 4 << 30, 50_000_000, 256
"""Limits of a decompressed Parquet file, and the rows decompressed at once."""

Row = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True)
class LoadedProblems:
    """Problems and gold answers of a source.

    problems         one per distinct text or conversation, in the order of the file
    gold             answers by problem id; problems without an answer are missing
    duplicates       number of rows that repeat an earlier problem
    contradictions   ids of problems that occur with different answers; they are in neither of the above
    without_answer   ids of problems that have no answer
    rows             row numbers of each id, contradictions and leaks included
    leaks            problems that `without_leaks` removed, and why

    Example: `load(Source(path="train.jsonl"), "data.labeled", need_answers=True).gold["9f8b…"]` is `"72"`.
    """

    problems: list[Problem]
    gold: dict[str, str]
    duplicates: int = 0
    contradictions: tuple[str, ...] = ()
    without_answer: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    leaks: tuple[Leak, ...] = ()


def load(
    source: Source, what: str, need_answers: bool, gold: Callable[[Any], str | None] | None = None
) -> LoadedProblems:
    """Read a source; `what` is the recipe's field for it, which every error names.

    gold  converts a cell to a gold answer (`Task.gold`); `gold_answer` by default

    Raises UserError for anything wrong with the file, a row or a column.
    """
    if source.generate is not None:
        return _generated(source, what)
    assert source.path is not None
    where = f"{what}: {source.path}"
    rows = _rows(source, where)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{where} is empty")
    problem_column = find_problem_column(source.columns, first[1], where)
    referenced = _conversation(first[1], problem_column, f"{where}, row {first[0]}").reference is not None
    answer_column = find_answer_column(source.columns, first[1], where, need_answers and not referenced)
    read: list[tuple[int, Conversation, str | None]] = []
    tags: dict[int, str] = {}
    for number, row in chain([first], rows):
        place = f"{where}, row {number}"
        if source.columns.tag is not None:
            tags[number] = _tag(row, source.columns.tag, place)
        asked = _conversation(row, problem_column, place)
        answer = asked.reference if answer_column is None else answer_at(row, answer_column)
        read.append((number, asked, _answer({answer_column or REFERENCE: answer}, answer_column or REFERENCE, place, gold)))
    read = read[: source.limit]
    if need_answers:
        lacking = [number for number, _, answer in read if answer is None]
        if lacking:
            among = f" ({len(lacking)} of {len(read)} rows have none)" if len(lacking) > 1 else ""
            raise UserError(f"{where}, row {lacking[0]}: the problem has no answer in {answer_column or REFERENCE!r}{among}")
    return _merged(read, source.path, tags)


def without_leaks(
    loaded: LoadedProblems, evals: Mapping[str, LoadedProblems]
) -> tuple[LoadedProblems, dict[str, list[str]]]:
    """Remove problems that an evaluation set contains too; also returns their ids by evaluation. `leaks` has the reasons.

    See `contamination`: the same letters and digits, or mostly the same runs of words.

    Example: `without_leaks(train, {"math500": test})[1]` is `{"math500": ["9f8b…"]}`.
    """
    found = find_leaks(loaded.problems, {name: other.problems for name, other in evals.items()})
    leaks = {name: [leak.problem_id for leak in found if leak.eval == name] for name in evals}
    leaked = {leak.problem_id for leak in found}
    kept = replace(
        loaded,
        problems=[problem for problem in loaded.problems if problem.id not in leaked],
        gold={name: answer for name, answer in loaded.gold.items() if name not in leaked},
        without_answer=tuple(name for name in loaded.without_answer if name not in leaked),
        leaks=tuple(found),
    )
    return kept, leaks


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


# Rows -----------------------------------------------------------------------------------------------------------------


def _rows(source: Source, where: str) -> Iterator[Row]:
    """Yield (number, row) pairs; the number is the line of a text file, else counted from 1."""
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
    """Yield the objects of a JSONL file, or of a JSON file that is one list; blank lines are skipped."""
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
    # Only \n ends a row: U+2028 and the like may occur unescaped in JSON strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, row {number}: is not JSON ({error})") from None
        yield number, _object(value, f"{where}, row {number}")


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, list) and messages_of(value) is not None:  # a conversation alone, as in ORZ's files
        return {"conversation": value}
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object but {type(value).__name__}")
    return value


def _parquet(path: Path, where: str) -> Iterator[Row]:
    if not path.exists():
        raise UserError(f"{where}: no such file")
    import pyarrow.parquet  # comes with `datasets`; slow to import

    number = unpacked_bytes = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata = file.metadata
            declared = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
            if max(declared, 0) > MOST_BYTES or metadata.num_rows > MOST_ROWS:
                raise UserError(
                    f"{where}: unpacks to {metadata.num_rows:,} rows of {declared:,} bytes; that is no file of problems"
                )
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                unpacked_bytes += batch.nbytes  # repeated values are far smaller in the file than in memory
                if unpacked_bytes > MOST_BYTES:
                    raise UserError(f"{where}: unpacks to more than {MOST_BYTES:,} bytes; that is no file of problems")
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow raises many kinds
        raise UserError(f"{where}: cannot be read as Parquet ({_one_line(error)})") from None


def _saved_folder(path: Path, split: str, where: str) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{where}: is not a folder saved by datasets ({_one_line(error)})") from None
    yield from _rows_of_split(data, split, where)


def _hub(source: Source, where: str) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:
        raise UserError(f"{where}: is no file here and cannot be loaded from the hub ({_one_line(error)})") from None
    yield from enumerate(data, 1)


def _rows_of_split(data: Any, split: str, where: str) -> Iterator[Row]:
    import datasets

    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{where}: has no split {split!r}, only {', '.join(data)}")
        data = data[split]
    yield from enumerate(data, 1)


def _one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:200] or type(error).__name__}"


# Cells ----------------------------------------------------------------------------------------------------------------


def _conversation(row: Mapping[str, Any], column: str, where: str) -> Conversation:
    """The problem in a row: a conversation, or a text as its only turn."""
    try:
        value = value_at(row, column)
    except KeyError:
        raise UserError(f"{where}: has no column {column!r}; its columns are {', '.join(map(str, row))}") from None
    messages = messages_of(value)
    if messages is not None:
        refuse_media(row, where)
        return read_conversation(messages, column, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is not text but {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{where}: {column!r} is blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is valid JSON but cannot be encoded
        raise UserError(f"{where}: {column!r} holds half a surrogate pair and is not UTF-8 text") from None
    return Conversation((("user", value),))


def _tag(row: Mapping[str, Any], column: str, where: str) -> str:
    value = answer_at(row, column)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {column!r} (data.columns.tag) is no text but {value!r:.40}")
    return value


def _answer(
    row: Mapping[str, Any], column: str | None, where: str, gold: Callable[[Any], str | None] | None
) -> str | None:
    value = None if column is None else row.get(column)
    if gold is not None:
        return gold(value)
    if isinstance(value, dict) or (isinstance(value, list) and len(value) != 1):
        raise UserError(f"{where}: {column!r} is not an answer but {type(value).__name__}")
    return gold_answer(value)


def _merged(rows: list[tuple[int, Conversation, str | None]], name: str, tags: Mapping[int, str]) -> LoadedProblems:
    """One problem per id. A row without an answer neither contradicts nor replaces one with an answer."""
    problems: dict[str, Problem] = {}
    numbers: dict[str, list[int]] = {}
    answers: dict[str, set[str]] = {}
    gold: dict[str, str] = {}
    for number, asked, answer in rows:
        problem = replace(Problem.of_turns(asked.turns, name, tags.get(number, "")), row=number)
        problem = problems.setdefault(problem.id, problem)
        numbers.setdefault(problem.id, []).append(number)
        if answer is not None:
            gold.setdefault(problem.id, answer)
            answers.setdefault(problem.id, set()).add(maths_text.squeezed(answer))
    contradictions = tuple(name for name in numbers if len(answers.get(name, ())) > 1)
    dropped = set(contradictions)
    return LoadedProblems(
        problems=[problem for problem in problems.values() if problem.id not in dropped],
        gold={name: answer for name, answer in gold.items() if name not in dropped},
        duplicates=len(rows) - len(numbers),
        contradictions=contradictions,
        without_answer=tuple(name for name in numbers if name not in gold),
        rows={name: tuple(found) for name, found in numbers.items()},
    )


def _generated(source: Source, what: str) -> LoadedProblems:
    settings = source.generate
    assert settings is not None
    where, name = f"{what}.generate", settings.task
    generators = {task: row.generator for task, row in TASKS.items() if row.generator is not None}
    if name not in generators:
        raise UserError(f"{where}.task: {name!r} has no generator; the tasks that have one are {', '.join(generators)}")
    generator = generators[name]
    known = [dial.name for dial in fields(generator.dials)]
    unknown = [dial for dial in settings.dials if dial not in known]
    if unknown:
        raise UserError(f"{where}.dials: {name} has no dial {unknown[0]!r:.80}; its dials are {', '.join(known)}")
    try:
        pairs = generator.make(settings.count, settings.pool, settings.seed, generator.dials(**settings.dials))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    rows = [(number, Conversation((("user", text),)), answer) for number, (text, answer) in enumerate(pairs, 1)]
    return _merged(rows[: source.limit], f"{name}:{settings.pool}", {number: name for number, *_ in rows})
