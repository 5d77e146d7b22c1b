"""Sums under many skills: generator of the task on which fresh labels can cover what earlier ones did not.

A problem is `23:17+45+82`: skill 23, then terms. Each skill has a method, a number that its sum starts from; the method does not
follow from the skill's number, so learning one skill teaches nothing about another. The answer, mod 100, is method + terms: with
method 81 it is `25`. A solution names a method and shows the running sum (`81;81+17=98+45=43+82=25`); it is graded as in `sums`.
"""

from __future__ import annotations

import random
from bisect import bisect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from headwater.tasks.pools import draws, pool_of, randint

SKILLS = 96
"""Skills that exist; `SkillsDials.skills` uses the first of them."""
CANDIDATES = 4
"""Methods that a base model knows for a skill: the right one and three others."""


@dataclass(frozen=True, slots=True)
class SkillsDials:
    """Number of skills, how unequal their frequencies are, and the range of the number of terms (inclusive).

    tail  frequency of the i-th skill ∝ 1 / i^tail: 0 is uniform, 1 a long tail

    Example: SkillsDials(skills=48, tail=1.0)
    """

    skills: int = 48
    tail: float = 0.0
    min_terms: int = 2
    max_terms: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.skills <= SKILLS:
            raise ValueError(f"skills: skills must lie between 1 and {SKILLS}, not {self.skills}")
        if not 0.0 <= self.tail <= 4.0:
            raise ValueError(f"skills: tail must lie between 0 and 4, not {self.tail:g}")
        if not 2 <= self.min_terms <= self.max_terms <= 8:
            raise ValueError(
                f"skills: 2 <= min_terms <= max_terms <= 8 must hold, not {self.min_terms} and {self.max_terms}"
            )


DIALS = SkillsDials()


@cache
def candidates(skill: int) -> tuple[int, ...]:
    """Candidate methods of a skill, the right one first.

    Example: `candidates(23)` is `(81, 0, 83, 50)`.
    """
    draw = random.Random(f"skills:methods:{skill}").random
    methods: list[int] = []
    while len(methods) < CANDIDATES:
        method = int(draw() * 100)
        if method not in methods:
            methods.append(method)
    return tuple(methods)


def skill_of(problem: str) -> int:
    """Number of a problem's skill. Example: `skill_of("23:17+45+82")` is 23."""
    return int(problem.partition(":")[0])


def solution(problem: str, method: int) -> str:
    """Worked solution by a method: `solution("23:17+45", 81)` is `81;81+17=98+45=43`."""
    total, steps = method, ""
    for term in problem.partition(":")[2].split("+"):
        total = (total + int(term)) % 100
        steps += f"+{term}={total:02d}"
    return f"{method:02d};{method:02d}{steps}"


def generate(n: int, pool: str, seed: int, dials: SkillsDials = DIALS) -> list[tuple[str, str]]:
    """Generate n distinct (problem, answer) pairs from one pool. The first k pairs do not depend on n.

    Raises ValueError for an unknown pool, or one with fewer than n problems at this difficulty.
    """
    draw = draws("skills", n, pool, seed)
    total = dials.skills * sum(100**count for count in range(dials.min_terms, dials.max_terms + 1))
    if total < 32 * n:
        raise ValueError(
            f"skills: {n} problems are too many for {dials.skills} skills of {dials.min_terms} to {dials.max_terms} terms"
        )
    bounds = list(accumulate(1 / place**dials.tail for place in range(1, dials.skills + 1)))
    pairs: dict[str, str] = {}
    while len(pairs) < n:
        skill = min(dials.skills - 1, bisect(bounds, draw() * bounds[-1]))
        count = randint(draw, dials.min_terms, dials.max_terms)
        terms = [int(draw() * 100) for _ in range(count)]
        problem = f"{skill:02d}:" + "+".join(f"{term:02d}" for term in terms)
        if problem not in pairs and pool_of("skills", problem) == pool:
            pairs[problem] = solution(problem, candidates(skill)[0])[-2:]
    return list(pairs.items())
