"""The nouns: what is asked (Problem), what was sampled (Rollout), what the grader said (Verdict)."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

_SPACES = re.compile(r"\s+")
# Copies of one problem differ in their spaces ("$2x$" and "$2 x$"), but 1 2 is not 12.
_IDLE_SPACE = re.compile(r"(?<!\d) | (?!\d)")


_SIZES = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])")
FAMILY = 6  # hex digits of an id that near spellings share


def problem_id(text: str) -> str:
    """The name of a problem is its content: 16 hex digits of its text. Splits by id are splits by content.

    White space does not count, save between digits: rows that differ in nothing else are the same problem, wherever they
    stand. The first digits come from the letters and digits alone (`family_of`).

    Example: `problem_id("1 + 1") == problem_id(" 1+\\n1 ")`, but `problem_id("1 2") != problem_id("12")`.
    """
    folded = _IDLE_SPACE.sub("", _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip())
    return _digest(letters_and_digits(text))[:FAMILY] + _digest(folded)[: 16 - FAMILY]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def family_of(problem_id: str) -> str:
    """What problems share that differ in punctuation, signs, spaces and case only: different or not, they stay together.

    Example: `family_of(problem_id("Find $x.$")) == family_of(problem_id("find x"))`.
    """
    return problem_id[:FAMILY]


def letters_and_digits(text: str) -> str:
    """Letters and digits alone; a text without any, such as `(+)`, stays as it is and is like itself only.

    Sizing commands are no content: `\\left| x \\right|` and `|x|` are the same problem.
    """
    letters = re.sub(r"[\W_]+", "", strip_sizing(unicodedata.normalize("NFKC", text)).casefold())
    return letters or text


def strip_sizing(text: str) -> str:
    return _SIZES.sub("", text)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question. It carries no answer: gold answers live behind `labels.Labels` alone.

    tag  whose teacher it belongs to, where a recipe has several

    Example: `Problem(id="9f8b…", text="17+45+82+03", source="sums:train")`.
    """

    id: str
    text: str
    source: str
    tag: str = ""

    @staticmethod
    def of(text: str, source: str, tag: str = "") -> Problem:
        return Problem(problem_id(text), text, source, tag)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion. Token ids are the truth; text is derived from them.

    Example: prompt `17+45` (ids 5 6 …), completion ids `(31, 9, 5, 2)` whose last id is EOS, `finish="stop"`.
    A completion cut at the token limit has `finish="length"` and no EOS.

    prompt_ids      the whole prompt as the model saw it, chat template included
    completion_ids  the sampled ids, EOS included when it was sampled
    sampler_logp    natural-log probability of each sampled id under the sampler, at its temperature; same length
    sampler         fingerprint of the weights that sampled
    """

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    sampler_logp: tuple[float, ...]
    finish: Literal["stop", "length"]
    sampler: str
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the grader said of one completion.

    Example: `Verdict(correct=False, reason="no_answer", seconds=0.0)`; reasons are those of the task's grader
    (`equal`, `different`, `no_answer`, `truncated`, `timeout`, `memory`, `error`).
    """

    correct: bool
    reason: str
    seconds: float = 0.0
