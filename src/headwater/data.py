"""The nouns: what is asked (Problem), what was sampled (Rollout), what the grader said (Verdict)."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

_SPACES = re.compile(r"\s+")


def problem_id(text: str) -> str:
    """The name of a problem is its content: 16 hex digits of the text with its white space folded.

    Two rows with the same text are the same problem, wherever they stand; splits by id are splits by content.

    Example: `problem_id("1 + 1") == problem_id(" 1  +\\n1 ")`.
    """
    folded = _SPACES.sub(" ", text).strip()
    return hashlib.sha256(folded.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Problem:
    """A question. It carries no answer: gold answers live behind `labels.Labels` alone.

    Example: `Problem(id="9f8b…", text="17+45+82+03", source="sums:train")`.
    """

    id: str
    text: str
    source: str

    @staticmethod
    def of(text: str, source: str) -> Problem:
        return Problem(problem_id(text), text, source)


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
