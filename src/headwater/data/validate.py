"""`headwater grade` and `validate`: grade a file of completions; check every gold answer with its own grader."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from headwater.config.recipe import Source
from headwater.data.cells import plain_value
from headwater.data.rows import file_rows
from headwater.data.sources import load
from headwater.errors import UserError
from headwater.tasks.registry import NO_VERDICT
from headwater.tasks.verifier import Verifier
from headwater.types import Verdict

BATCH = 256  # rows per grading call, enough to keep every worker busy


@dataclass(frozen=True)
class ValidationResult:
    """Result of grading a source's gold answers with their own grader.

    total           distinct problems with an answer
    failed          (problem id, gold, reason) of those that do not grade correct
    without_answer  ids of problems that have no answer
    contradictions  ids of problems that occur with different answers
    duplicates      rows that repeat a problem
    warnings        sentences on columns that may belong to the problems and are not read

    Example: `validate(Source(path="gsm8k/test.jsonl")).failed` is `[]`.
    """

    total: int
    failed: list[tuple[str, str, str]]
    without_answer: tuple[str, ...]
    contradictions: tuple[str, ...]
    duplicates: int
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is a gold answer, and every one grades correct."""
        return self.total > 0 and not self.failed


def grade_file(path: Path, task: str = "maths", seconds: float = 2.0, workers: int = 2) -> Iterator[dict[str, Any]]:
    """Grade `{"id", "gold", "completion"}` rows: `{"id", "correct", "reason", "seconds"}` each, in order, as they come.

    A missing `id` becomes the row number. A gold that is a number or an object becomes its JSON text. Raises UserError that names
    the row, after the verdicts of all rows before it, and after all verdicts for a user's grader that returned something else.
    """
    rows = file_rows(Path(path), str(path))
    with Verifier(task, workers=workers, seconds=seconds) as verifier:
        seen, failure = 0, None
        refused: list[Verdict] = []
        while failure is None:
            batch: list[tuple[Any, str, str]] = []
            try:
                batch.extend(_parse_row(number, row, str(path)) for number, row in islice(rows, BATCH))
            except UserError as error:
                failure = error  # raised once the rows before it are graded
            verdicts = verifier([(gold, completion) for _, gold, completion in batch])
            for (name, _, _), verdict in zip(batch, verdicts, strict=True):
                yield {"id": name, "correct": verdict.correct, "reason": verdict.reason, "seconds": verdict.seconds}
            seen += len(batch)
            refused += [verdict for verdict in verdicts if verdict.reason.startswith(NO_VERDICT)][:1]
            if not batch:
                break
        if failure is not None:
            raise failure
        if not seen:
            raise UserError(f"{path} is empty")
        verifier.refuse_no_verdict(refused)


def _parse_row(number: int, row: Any, path: str) -> tuple[Any, str, str]:
    for field in ("gold", "completion"):
        if field not in row:
            raise UserError(f"{path}, row {number}: has no {field!r}; its fields are {', '.join(row)}")
    try:
        gold, completion = plain_value(row["gold"]), row["completion"]
    except ValueError as error:
        raise UserError(f"{path}, row {number}: 'gold' {error}") from None
    if isinstance(gold, (int, float)) and not isinstance(gold, bool):
        gold = str(gold)
    elif isinstance(gold, dict):
        gold = json.dumps(gold, ensure_ascii=False)
    for field, value in (("gold", gold), ("completion", completion)):
        if not isinstance(value, str):
            raise UserError(f"{path}, row {number}: {field!r} is not text but {type(value).__name__}")
    return row.get("id", number), gold, completion


def failing(verifier: Verifier, golds: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(problem id, gold, reason) of the (problem id, gold) pairs that fail their own grader.

    A gold answer written as a completion must grade correct. One that only describes a test (a regex, a program) must be usable
    (not `error`) and must reject an empty answer (`passes_blank`). Raises UserError for a user's grader that returns no verdict.
    """
    task = verifier.task
    completions = [task.as_completion(gold) for _, gold in golds]
    tried = [task.blank if completion is None else completion for completion in completions]
    verdicts = verifier([(gold, completion) for (_, gold), completion in zip(golds, tried, strict=True)])
    verifier.refuse_no_verdict(verdicts)
    failed = []
    for (name, gold), completion, verdict in zip(golds, completions, verdicts, strict=True):
        if completion is not None and not verdict.correct:
            failed.append((name, gold, verdict.reason))
        elif completion is None and (
            verdict.correct or verdict.reason in ("error", "timeout", "memory", "unsupported")
        ):
            failed.append((name, gold, "passes_blank" if verdict.correct else verdict.reason))
    return failed


def validate(source: Source, task: str = "maths", seconds: float = 2.0, workers: int = 2) -> ValidationResult:
    """Grade every gold answer, written as a completion, with its own grader: each must grade correct.

    Raises UserError when the source cannot be read.
    """
    with Verifier(task, workers=workers, seconds=seconds) as verifier:
        loaded = load(source, "validate", False, verifier.task.gold, verifier)
        golds = list(loaded.gold.items())
        failed = failing(verifier, golds)
    return ValidationResult(
        total=len(golds),
        failed=failed,
        without_answer=loaded.without_answer,
        contradictions=loaded.contradictions,
        duplicates=loaded.duplicates,
        warnings=tuple(f"{source.path}: {unused.evidence}; {unused.remedy('--problem')}" for unused in loaded.unused),
    )
