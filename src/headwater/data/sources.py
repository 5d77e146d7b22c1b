"""Load problems and gold answers from files, folders saved by `datasets`, hub ids or generators.

Errors name the file and the row or column. A problem's id is a hash of its content, so rows with the same text merge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from typing import Any

from headwater.config.recipe import Source
from headwater.data.cells import plain_value
from headwater.data.choices import CHOICE_COLUMNS, ReadRow, choices_of, with_choices
from headwater.data.columns import (
    FURTHER_ANSWER_COLUMNS,
    UnusedColumn,
    answer_at,
    context_columns,
    fill_template,
    find_answer_column,
    find_problem_column,
    is_template,
    lacks_column,
    required_cell,
    template_columns,
    value_at,
)
from headwater.data.contamination import Leak, find_leaks
from headwater.data.contexts import context_of, states_answer
from headwater.data.conversations import (
    Conversation,
    encodable,
    messages_of,
    read_conversation,
    reference_of,
    refuse_media,
    spells_messages,
    with_columns,
)
from headwater.data.rows import Row, read_rows
from headwater.errors import UserError
from headwater.tasks import maths_text
from headwater.tasks.golds import gold_answer
from headwater.tasks.registry import TASKS
from headwater.tasks.verifier import Verifier
from headwater.types import Problem, family_of

REFERENCE = "the assistant's last turn"
"""Where the answer is in a file of conversations without a column for it."""


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
    unused           filled columns that may belong to the problems and are not read
    contexts         text for the teacher alone, of problems that have one
    answer_in_context   ids of problems whose context states the gold answer

    Example: `load(Source(path="train.jsonl"), "data.labeled", need_answers=True).gold["9f8b…"]` is `"72"`.
    """

    problems: list[Problem]
    gold: dict[str, str]
    duplicates: int = 0
    contradictions: tuple[str, ...] = ()
    without_answer: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    leaks: tuple[Leak, ...] = ()
    unused: tuple[UnusedColumn, ...] = ()
    contexts: Mapping[str, str] = field(default_factory=dict)
    answer_in_context: frozenset[str] = frozenset()


def load(
    source: Source,
    what: str,
    need_answers: bool,
    gold: Callable[[Any], str | None] | None = None,
    grader: Verifier | None = None,
    further_answers: Sequence[str] = FURTHER_ANSWER_COLUMNS,
) -> LoadedProblems:
    """Read a source; `what` is the recipe's field for it, which every error names.

    gold    converts a cell to a gold answer (`Task.gold`); `gold_answer` by default
    grader  decides whether two answers of one problem agree (`Verifier.same_gold`); None compares their texts
    further_answers   names of answer columns tried after the usual ones; none for prompts whose answers nobody uses

    Raises UserError for anything wrong with the file, a row or a column.
    """
    if source.generate is not None:
        return _generated(source, what)
    assert source.path is not None
    where = f"{what}: {source.path}"
    rows = read_rows(source, where)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{where} is empty")
    problem_column, answer_column = find_columns(source, first, where, need_answers, further_answers)
    answer_name = answer_column or REFERENCE
    context_names = context_columns(source.columns, first[1], (problem_column, answer_column, source.columns.tag))
    lists_choices = choices_of(first[1]) is not None or any(name.lower() in CHOICE_COLUMNS for name in first[1])
    every: list[ReadRow] = []
    unused = dict.fromkeys(context_names, 0)
    for number, row in chain([first], rows):
        place = f"{where}, row {number}"
        tag = "" if source.columns.tag is None else _tag(row, source.columns.tag, place)
        context = "" if source.columns.context is None else context_of(row, source.columns.context, place)
        conversation = _conversation(row, problem_column, place)
        answer = conversation.reference if answer_column is None else answer_at(row, answer_column)
        choices = choices_of(row) if lists_choices else None
        if choices is None:
            answer = _answer(answer, answer_name, place, gold)
        every.append(ReadRow(number, conversation, answer, choices, tag, context))
        if context_names:
            problem = "\n".join(content for _, content in conversation.turns)
            for name in context_names:
                unused[name] += name in row and lacks_column(problem, name, row[name])
    template = template_columns(problem_column) if is_template(problem_column, first[1]) else []
    every, hidden = with_choices(every, template, where)
    every = [
        row
        if row.choices is None
        else replace(row, answer=_answer(row.answer, answer_name, f"{where}, row {row.number}", gold))
        for row in every
    ]
    read = _within(every, source)
    if not read:
        raise UserError(
            f"{where}: hash_range {list(source.hash_range or ())} keeps none of its {len(every)} rows; widen it"
        )
    if need_answers:
        without_answer = [row.number for row in read if row.answer is None]
        if without_answer:
            among = f" ({len(without_answer)} of {len(read)} rows have none)" if len(without_answer) > 1 else ""
            raise UserError(f"{where}, row {without_answer[0]}: the problem has no answer in {answer_name!r}{among}")
    is_text = bool(template) or messages_of(value_at(first[1], problem_column)) is None
    columns = [(name, f"{{{name}}}", rows) for name, rows in unused.items() if rows]
    columns += [(hidden[0].column, hidden[0].fields, len(hidden))] if hidden else []
    return replace(
        _merged(read, source.path, grader),
        unused=tuple(
            UnusedColumn(name, problem_column, rows, len(every), fields if is_text else None)
            for name, fields, rows in columns
        ),
    )


def find_columns(
    source: Source, first: Row, where: str, need_answers: bool, further_answers: Sequence[str] = FURTHER_ANSWER_COLUMNS
) -> tuple[str, str | None]:
    """(problem column, answer column) by a file's first row; no answer column where a conversation's last turn is the answer.

    Raises UserError as `load` does.
    """
    number, row = first
    problem_column = find_problem_column(source.columns, row, where)
    referenced = _conversation(row, problem_column, f"{where}, row {number}").reference is not None
    further = () if referenced else further_answers
    return problem_column, find_answer_column(source.columns, row, where, need_answers and not referenced, further)


def without_leaks(loaded: LoadedProblems, evals: Mapping[str, LoadedProblems]) -> LoadedProblems:
    """Remove problems that an evaluation set contains too (see `contamination`); `leaks` of the result says which and why."""
    leaks = tuple(find_leaks(loaded.problems, {name: other.problems for name, other in evals.items()}))
    leaked = {leak.problem_id for leak in leaks}
    return replace(
        loaded,
        problems=[problem for problem in loaded.problems if problem.id not in leaked],
        gold={name: answer for name, answer in loaded.gold.items() if name not in leaked},
        without_answer=tuple(name for name in loaded.without_answer if name not in leaked),
        leaks=leaks,
    )


# Cells ----------------------------------------------------------------------------------------------------------------


def _conversation(row: Mapping[str, Any], column: str, where: str) -> Conversation:
    """The problem in a row: a conversation, or a text as its only turn, with the turns in columns of their own."""
    if is_template(column, row):
        value: Any = fill_template(column, row, where)
        if not value:
            raise UserError(f"{where}: {' and '.join(map(repr, template_columns(column)))} are blank")
        return with_columns(Conversation((("user", encodable(value, f"{where}: {column!r}")),)), row, where)
    value = required_cell(row, column, where)
    messages = messages_of(value)
    if messages is not None:
        conversation = read_conversation(messages, column, where)
        for holder in (value, row) if isinstance(value, dict) else (row,):
            refuse_media(holder, where)
            conversation = with_columns(conversation, holder, where)
        return conversation
    if not isinstance(value, str):
        expected = ", nor a list of messages with role and content" if isinstance(value, (list, dict)) else ""
        raise UserError(f"{where}: {column!r} is not text but {type(value).__name__}{expected}")
    if not value.strip():
        raise UserError(f"{where}: {column!r} is blank")
    if spells_messages(value):
        raise UserError(
            f"{where}: {column!r} looks like a list of messages and cannot be read as one; write it as JSON (json.dumps)"
        )
    if "<image>" in value:  # as in sets of geometry problems
        refuse_media(row, where)
    return with_columns(Conversation((("user", encodable(value, f"{where}: {column!r}")),)), row, where)


def _tag(row: Mapping[str, Any], column: str, where: str) -> str:
    value = answer_at(row, column)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {column!r} (data.columns.tag) is no text but {value!r:.40}")
    return value


def _answer(value: Any, column: str, where: str, gold: Callable[[Any], str | None] | None) -> str | None:
    messages = messages_of(value) if isinstance(value, list) else None
    if messages:  # a completion in the form of messages, as TRL writes it
        value = reference_of(messages[-1], f"{where}: the last turn of {column!r}")
    try:
        return (gold or gold_answer)(plain_value(value))
    except ValueError as error:
        raise UserError(f"{where}: {column!r} {error}") from None
    except RecursionError:
        raise UserError(f"{where}: {column!r} is nested too deeply") from None


def _within(rows: Sequence[ReadRow], source: Source) -> Sequence[ReadRow]:
    """The rows that `hash_range` and then `limit` keep."""
    if source.hash_range is not None:
        low, high = source.hash_range
        rows = [row for row in rows if low <= content_fraction(Problem.of_turns(row.conversation.turns, "").id) < high]
    return rows[: source.limit]


def content_fraction(problem_id: str) -> float:
    """A problem's place in [0, 1) by a hash of its content; copies that differ in punctuation or case have the same.

    Independent of the halves of the labels (`data.labels.half_of`).
    """
    return int.from_bytes(hashlib.sha256(f"part:{family_of(problem_id)}".encode()).digest()[:6]) / 2**48


def _agree(first: str, second: str, grader: Verifier | None) -> bool:
    """Whether two answers of one problem are written alike up to spaces, or are the same to the grader."""
    written_alike = maths_text.squeezed(first) == maths_text.squeezed(second)
    return written_alike or (grader is not None and grader.same_gold(first, second))


def _merged(rows: Sequence[ReadRow], name: str, grader: Verifier | None = None) -> LoadedProblems:
    """One problem per id, with its first answer. A row without an answer neither contradicts nor replaces one with an answer."""
    problems: dict[str, Problem] = {}
    numbers: dict[str, list[int]] = {}
    answers: dict[str, str] = {}
    contradictions: set[str] = set()
    for row in rows:
        problem = replace(Problem.of_turns(row.conversation.turns, name, row.tag), row=row.number)
        problems.setdefault(problem.id, problem)
        numbers.setdefault(problem.id, []).append(row.number)
        if row.answer is not None:
            first = answers.setdefault(problem.id, row.answer)
            if not _agree(first, row.answer, grader):
                contradictions.add(problem.id)
    kept = [problem for problem in problems.values() if problem.id not in contradictions]
    gold = {id_: answer for id_, answer in answers.items() if id_ not in contradictions}
    context_of_row = {row.number: row.context for row in rows if row.context}
    contexts = {problem.id: context_of_row[problem.row] for problem in kept if problem.row in context_of_row}
    return LoadedProblems(
        problems=kept,
        gold=gold,
        duplicates=len(rows) - len(numbers),
        contradictions=tuple(id_ for id_ in numbers if id_ in contradictions),
        without_answer=tuple(id_ for id_ in numbers if id_ not in answers),
        rows={id_: tuple(row_numbers) for id_, row_numbers in numbers.items()},
        contexts=contexts,
        answer_in_context=frozenset(id_ for id_, text in contexts.items() if states_answer(text, gold.get(id_))),
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
    rows = [
        ReadRow(number, Conversation((("user", text),)), answer, tag=name)
        for number, (text, answer) in enumerate(pairs, 1)
    ]
    return _merged(_within(rows, source), f"{name}:{settings.pool}")


def leak_row(source: str, leak: Leak, loaded: LoadedProblems) -> dict[str, Any]:
    return {"data": source, **asdict(leak), "rows": list(loaded.rows.get(leak.problem_id, ()))}
