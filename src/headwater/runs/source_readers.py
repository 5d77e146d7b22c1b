"""Ways to read a data source: as a run does (`data.sources.load`), with missing answers, or with placeholders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from headwater.config.recipe import Source
from headwater.data.sources import LoadedProblems, load
from headwater.errors import UserError
from headwater.types import Problem


class SourceReader(Protocol):
    """How a data source is read; `load`, or one of the two below."""

    def __call__(
        self, source: Source, what: str, need_answers: bool, gold: Callable[[Any], str | None] | None = None
    ) -> LoadedProblems: ...


def load_with_missing_answers(
    source: Source, what: str, need_answers: bool, gold: Callable[[Any], str | None] | None = None
) -> LoadedProblems:
    """For the doctor, which reports every problem without an answer."""
    return load(source, what, need_answers=False, gold=gold)


def placeholder_reader(missing: list[str]) -> SourceReader:
    """For an estimate: a missing file is replaced by as many placeholder problems as its limit, and noted in `missing`."""

    def read(
        source: Source, what: str, need_answers: bool, gold: Callable[[Any], str | None] | None = None
    ) -> LoadedProblems:
        if source.path is None or Path(source.path).expanduser().exists():
            return load(source, what, need_answers, gold)
        if source.limit is None:
            raise UserError(
                f"{what}: {source.path} is not here, and {what}.limit does not say how many problems to assume"
            )
        missing.append(f"{what}: {source.path} is not here; assumed to hold {source.limit:,} problems, its limit")
        problems = [Problem.of(f"{what} {number}", what) for number in range(source.limit)]
        return LoadedProblems(problems, {problem.id: "" for problem in problems})

    return read
