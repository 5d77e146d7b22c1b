"""Labels: the only object with gold answers. Access to them is a capability with a budget, and every check is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from headwater.data.sources import LoadedProblems
from headwater.errors import UserError
from headwater.types import Problem, Verdict, family_of

Grade = Callable[[Sequence[tuple[str, str]]], list[Verdict]]
"""Grades (gold, completion) pairs in order; see `tasks.verifier`."""


@dataclass
class Labels:
    """Gold answers that completions can be checked against but that cannot be read.

    A stage gets the subset that it may use (`only`); stages without sparse reward get none. `budget` bounds the distinct
    problems ever checked through this object and all its subsets together.

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
        """The subset of these problems; its budget is at most their number, and its checks count against this budget too.

        Raises KeyError when one of them has no answer here.
        """
        gold = {name: self._gold[name] for name in problem_ids}
        return Labels(gold, self._grade, min(self.budget, len(gold)), _whole=self)

    def graded_by(self, other: Callable[[Grade], Grade]) -> Labels:
        """A copy whose grader is `other(grader)`."""
        return replace(self, _grade=other(self._grade))

    def fingerprint(self) -> str:
        """Hash of the problems and their answers, so that a corrected answer makes a node run again."""
        content = "\n".join(f"{name}\t{self._gold[name]}" for name in sorted(self._gold))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def check(self, answers: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Grade (problem id, completion text) pairs against the gold answers of their problems, in order.

        Raises KeyError for a problem without an answer here, UserError past the budget; then nothing is counted or graded.
        """
        wanted = {name for name, _ in answers}
        for name in wanted:
            if name not in self._gold:
                raise KeyError(f"problem {name} has no label here")
        self._spend(wanted, len(answers))
        return self._grade([(self._gold[name], text) for name, text in answers])

    def _spend(self, wanted: set[str], checks: int) -> None:
        if len(self.looked_at | wanted) > self.budget:
            raise UserError(f"labels.budget {self.budget}: exhausted; grading a further problem would exceed it")
        if self._whole is not None:
            self._whole._spend(wanted, checks)
        self.looked_at |= wanted
        self.checks += checks


def half_of(problem_id: str) -> int:
    """Half of the labelled pool (0 or 1) that a problem belongs to, by a hash of its content.

    Adding rows or reordering a file never moves a problem to the other half, and copies of a problem that differ in punctuation
    or case are in the same half: the held-out half has only problems that the first half does not.
    """
    return hashlib.sha256(f"half:{family_of(problem_id)}".encode()).digest()[0] & 1


@dataclass(frozen=True)
class Pools:
    """Ids of the labelled problems within the budget, in two halves."""

    first_half: tuple[str, ...]
    second_half: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.first_half + self.second_half


def select_labels(problem_ids: Sequence[str], budget: int | None, seed: int) -> Pools:
    """Select the labels within the budget: as many from each half, in an order that depends on content and seed.

    If one half of the pool is too small, the other fills up. Raises UserError for a budget larger than the pool.
    """
    budget = len(problem_ids) if budget is None else budget
    if budget > len(problem_ids):
        raise UserError(f"labels.budget {budget} is more than the {len(problem_ids)} labelled problems of data.labeled")
    order = sorted(problem_ids, key=lambda name: hashlib.sha256(f"buy:{seed}:{name}".encode()).digest())
    halves = [[name for name in order if half_of(name) == half] for half in (0, 1)]
    first = min(len(halves[0]), max(budget // 2 + budget % 2, budget - len(halves[1])))
    return Pools(tuple(halves[0][:first]), tuple(halves[1][: budget - first]))


def with_labels(loaded: LoadedProblems, grade: Grade) -> tuple[Sequence[Problem], Labels]:
    """A source's problems and labels for all of them."""
    return loaded.problems, Labels(loaded.gold, grade, len(loaded.gold))
