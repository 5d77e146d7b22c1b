"""Core data types: problems, rollouts and grader verdicts."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Turn = tuple[str, str]
"""(role, content) of a conversation's turn; the roles are `system`, `user` and `assistant`."""

IdsNK = npt.NDArray[np.int32]
"""k token ids at each of N tokens."""

RolloutKey = tuple[str, int]
"""(problem id, sample): names one rollout of a step."""

_SPACES = re.compile(r"\s+")
# Copies of one problem differ in spaces ("$2x$" and "$2 x$"), but "1 2" is not "12".
_INSIGNIFICANT_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_SIZING_COMMANDS = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])")
FAMILY_DIGITS = 6  # leading hex digits of an id that near-duplicates share


def problem_id(text: str) -> str:
    """Content hash of a problem's text, 16 hex digits: splits by id are splits by content.

    White space counts between digits only, so rows that differ in nothing else are the same problem, in any file. The first
    digits hash the letters and digits alone (`family_of`).

    Example: `problem_id("1 + 1") == problem_id(" 1+\\n1 ")`, but `problem_id("1 2") != problem_id("12")`.
    """
    return _digest(letters_and_digits(text))[:FAMILY_DIGITS] + _digest(_folded(text))[: 16 - FAMILY_DIGITS]


def conversation_id(turns: Sequence[Turn]) -> str:
    """Content hash of a whole conversation: equal for conversations whose roles are the same and whose contents would be the
    same problem as texts. Its family is that of what the user says, so copies with another system turn are near-duplicates.

    Example: `family_of(conversation_id([("system", "Be brief."), ("user", "1+1")])) == family_of(problem_id("1+1"))`.
    """
    question = letters_and_digits("\n".join(user_turns(turns)))
    folded = json.dumps([[role, _folded(content)] for role, content in turns], ensure_ascii=False)
    return _digest(question)[:FAMILY_DIGITS] + _digest(folded)[: 16 - FAMILY_DIGITS]


def user_turns(turns: Sequence[Turn]) -> list[str]:
    """Contents of the user's turns, in order."""
    return [content for role, content in turns if role == "user"]


def _folded(text: str) -> str:
    return _INSIGNIFICANT_SPACE.sub("", _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def family_of(problem_id: str) -> str:
    """Group key of problems that differ in punctuation, signs, spaces and case only; splits keep a group together.

    Example: `family_of(problem_id("Find $x.$")) == family_of(problem_id("find x"))`.
    """
    return problem_id[:FAMILY_DIGITS]


def letters_and_digits(text: str) -> str:
    """Lower-case letters and digits of a text. A text without any, such as `(+)`, is returned unchanged.

    Sizing commands are ignored: `\\left| x \\right|` and `|x|` are the same problem.
    """
    letters = re.sub(r"[\W_]+", "", strip_sizing(unicodedata.normalize("NFKC", text)).casefold())
    return letters or text


def strip_sizing(text: str) -> str:
    """Remove the LaTeX sizing commands `\\left`, `\\right` and `\\displaystyle`."""
    return _SIZING_COMMANDS.sub("", text)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question without its answer: gold answers are accessible only through `data.labels.Labels`.

    text   the question; of a conversation, a transcript for readers and comparisons
    tag    selects the teacher, if a recipe has several
    turns  the conversation, which ends with the user's question; empty for a question alone
    row    the first row of the source that holds it

    Example: `Problem(id="9f8b…", text="17+45+82+03", source="sums:train")`.
    """

    id: str
    text: str
    source: str
    tag: str = ""
    turns: tuple[Turn, ...] = ()
    row: int | None = field(default=None, compare=False)

    @staticmethod
    def of(text: str, source: str, tag: str = "") -> Problem:
        return Problem(problem_id(text), text, source, tag)

    @staticmethod
    def of_turns(turns: Sequence[Turn], source: str, tag: str = "") -> Problem:
        """A conversation whose last turn is the user's; a single turn is the same problem as its text."""
        if len(turns) == 1:
            return Problem.of(turns[0][1], source, tag)
        transcript = "\n\n".join(f"{role}: {content}" for role, content in turns)
        return Problem(conversation_id(turns), transcript, source, tag, tuple(turns))

    @property
    def name(self) -> str:
        """How messages name it. Example: `problem 9f8b… of train.jsonl, row 3`."""
        return f"problem {self.id} of {self.source}" + ("" if self.row is None else f", row {self.row}")

    @property
    def contents(self) -> list[str]:
        """The text, or that of every turn."""
        return [content for _, content in self.turns] or [self.text]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion. Token ids are authoritative; text is derived from them.

    Example: prompt `17+45` (ids 5 6 …), completion ids `(31, 9, 5, 2)` whose last id is EOS, `finish="stop"`.
    A completion cut at the token limit has `finish="length"` and no EOS.

    prompt_ids      the whole prompt as the model reads it, chat template included
    completion_ids  the sampled ids, EOS included when it was sampled
    sampler_logp    natural-log probability of each sampled id under the sampler, at its temperature; same length
    sampler         fingerprint of the sampling weights
    teacher_ids     ids in which a teacher with another tokenizer sampled the completion; empty for all others
    candidates      (tokens, k) ids that the student chose at each completion token, for its teacher to score; None: it chose none
    """

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    sampler_logp: tuple[float, ...]
    finish: Literal["stop", "length"]
    sampler: str
    temperature: float = 1.0
    teacher_ids: tuple[int, ...] = ()
    candidates: IdsNK | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> RolloutKey:
        return self.problem_id, self.sample

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Rollout:
        """A rollout from its JSON fields, where tuples are lists."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of grading one completion.

    Example: `Verdict(correct=False, reason="no_answer", seconds=0.0)`; the reason comes from the task's grader
    (`equal`, `different`, `no_answer`, `truncated`, `timeout`, `memory`, `error`).
    """

    correct: bool
    reason: str
    seconds: float = 0.0
