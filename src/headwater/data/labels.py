"""Labels: the only holder of gold answers. The paper's scarce resource is a capability, and every look is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from headwater.errors import UserError
from headwater.types import Verdict, family_of

Grade = Callable[[Sequence[tuple[str, str]]], list[Verdict]]
"""Grades (gold, completion) pairs in order; see `verifier`."""


@dataclass
class Labels:
    """Gold answers that can be checked against, never read.

    A stage is handed the part that it may look at (`only`); stages without sparse reward are handed none. `budget`
    bounds the distinct problems ever looked at through this object and all parts of it together.

    Example: `labels.check([("9f8b…", "…=47")])` gives `[Verdict(correct=True, reason="equal")]`.
    """

    _gold: Mapping[str, str] = field(repr=False)
    _grade: Grade = field(repr=False)
    budget: int
    looked_at: set[str] = field(default_factory=set)
    checks: int = 0
    _whole: Labels | None = field(default=None, repr=False)

    def __contains__(self, problem_id: str) -> bool:
        return problem_id in self._gold

    def __len__(self) -> int:
        return len(self._gold)

    def only(self, problem_ids: Sequence[str]) -> Labels:
        """A holder of these problems' answers alone, whose budget is their number at most and whose looks count here too.

        Raises KeyError when one of them has no answer here.
        """
        held = {name: self._gold[name] for name in problem_ids}
        return Labels(held, self._grade, min(self.budget, len(held)), _whole=self)

    def graded_by(self, other: Callable[[Grade], Grade]) -> Labels:
        """The same holder, whose completions are graded by what `other` makes of its grader."""
        return replace(self, _grade=other(self._grade))

    def fingerprint(self) -> str:
        """Names the problems and their answers by content, so that a corrected answer makes a node run again."""
        held = "\n".join(f"{name}\t{self._gold[name]}" for name in sorted(self._gold))
        return hashlib.sha256(held.encode()).hexdigest()[:16]

    def check(self, answers: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Hold completions against the gold answers of their problems: (problem id, completion text) pairs, in order.

        Raises KeyError for a problem that this holder has no answer to, UserError past the budget; then nothing is
        counted and nothing graded.
        """
        wanted = {name for name, _ in answers}
        for name in wanted:
            if name not in self._gold:
                raise KeyError(f"problem {name} has no label here")
        self._spend(wanted, len(answers))
        return self._grade([(self._gold[name], text) for name, text in answers])

    def _spend(self, wanted: set[str], checks: int) -> None:
        if len(self.looked_at | wanted) > self.budget:
            raise UserError(f"labels.budget {self.budget}: a look at another problem's answer was refused")
        if self._whole is not None:
            self._whole._spend(wanted, checks)
        self.looked_at |= wanted
        self.checks += checks


def half_of(problem_id: str) -> int:
    """0 or 1: the half of the labelled pool that a problem belongs to, decided by its content alone.

    Adding rows or reordering a file never moves a problem to the other half, and spellings of one problem that differ in
    punctuation or case are on the same half: held-out labels are of problems that the first half has not seen.
    """
    return hashlib.sha256(f"half:{family_of(problem_id)}".encode()).digest()[0] & 1


@dataclass(frozen=True)
class Pools:
    """The labelled problems that the budget buys, and their two halves; ids only."""

    first_half: tuple[str, ...]
    second_half: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.first_half + self.second_half


def buy(problem_ids: Sequence[str], budget: int | None, seed: int) -> Pools:
    """Choose which labels the budget buys: half from each content half, in an order that depends on content and seed.

    When one half of the pool is too small, the other fills up. Raises UserError for a budget larger than the pool.
    """
    budget = len(problem_ids) if budget is None else budget
    if budget > len(problem_ids):
        raise UserError(f"labels.budget {budget} is more than the {len(problem_ids)} labelled problems of data.labeled")
    order = sorted(problem_ids, key=lambda name: hashlib.sha256(f"buy:{seed}:{name}".encode()).digest())
    halves = [[name for name in order if half_of(name) == half] for half in (0, 1)]
    first = min(len(halves[0]), max(budget // 2 + budget % 2, budget - len(halves[1])))
    return Pools(tuple(halves[0][:first]), tuple(halves[1][: budget - first]))
