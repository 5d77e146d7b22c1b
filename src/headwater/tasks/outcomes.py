"""How graded completions ended: right, cut at the token limit, without an answer, ungraded, or wrong.

When nothing is learned, the largest of these shares is the most likely cause, and each has its own remedy. Guards, probe and
report use the same words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["right", "cut", "no_answer", "ungraded", "wrong"]

NO_ANSWER = ("no_answer", "truncated")
"""Reasons of a grader that found no answer; `truncated` is a box, block or object that is not closed."""
UNGRADED = ("timeout", "memory", "error", "unsupported")
"""Reasons of a grader that came to no result."""

DESCRIPTIONS: Mapping[Outcome, str] = {
    "cut": "were cut at max_tokens = {max_tokens}",
    "no_answer": "held no answer that the grader finds",
    "ungraded": "ended in an error or a limit of the grader",
    "wrong": "were wrong",
    "right": "were right",
}
REMEDIES: Mapping[Outcome, str] = {
    "cut": "raise {stage}.sampling.max_tokens or, if the answers never end, lower {stage}.sampling.temperature or check stop ids and "
    "chat template",
    "no_answer": "ask for the form of the answer in prompt.template or prompt.system (docs/tasks.md), or use another task or model",
    "ungraded": "see `reason` in the rollout files: raise compute.grader_seconds, or check the answers with `headwater validate`",
    "wrong": "use easier problems, a stronger model, a lower {stage}.sampling.temperature or a larger {stage}.group_size",
    "right": "use harder problems: the model solves these already",
}


def outcome(correct: bool, reason: str, finish: str) -> Outcome:
    """The outcome of one completion from its verdict and its `finish`.

    A right completion counts as right even if it was cut after its answer. Any other cut one counts as cut: what the grader
    took for its answer may be an intermediate result.

    Example: `outcome(False, "different", "length")` is `cut`; `outcome(False, "no_answer", "stop")` is `no_answer`.
    """
    if correct:
        return "right"
    if finish == "length":
        return "cut"
    return "no_answer" if reason in NO_ANSWER else "ungraded" if reason in UNGRADED else "wrong"


@dataclass(frozen=True)
class Outcomes:
    """Number of completions of each outcome.

    Example: `Outcomes({"cut": 46, "wrong": 2}).because(48)` is `96 % of the completions were cut at max_tokens = 48, 4 % were
    wrong`.
    """

    counts: Mapping[Outcome, int]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Outcomes:
        """Count rows of rollout files ({"correct", "reason", "finish"}); rows that were not graded are left out."""
        return cls(
            Counter(
                outcome(bool(row["correct"]), str(row.get("reason")), str(row.get("finish")))
                for row in rows
                if row.get("correct") is not None
            )
        )

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def shares(self) -> dict[str, float]:
        """Share of each outcome; empty without completions."""
        return {name: self.counts.get(name, 0) / self.total for name in DESCRIPTIONS} if self.total else {}

    @property
    def largest(self) -> Outcome | None:
        """The most frequent outcome; of equal ones the first of DESCRIPTIONS. None without completions."""
        if not self.total:
            return None
        return max(DESCRIPTIONS, key=lambda name: self.counts.get(name, 0))

    def because(self, max_tokens: int | str) -> str:
        """The shares as a clause, largest first, without those that round to 0 %."""
        parts = [
            f"{100.0 * self.counts[name] / self.total:.0f} % {{}}{text.format(max_tokens=max_tokens)}"
            for name, text in sorted(DESCRIPTIONS.items(), key=lambda item: -self.counts.get(item[0], 0))
            if 200 * self.counts.get(name, 0) > self.total
        ]
        return ", ".join(part.format("" if index else "of the completions ") for index, part in enumerate(parts))

    def remedy(self, stage: str) -> str:
        """What to do about the most frequent outcome; `stage` is the stage's field, such as `stages.teacher_rl`."""
        return "" if self.largest is None else REMEDIES[self.largest].format(stage=stage)
