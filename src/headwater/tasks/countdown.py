"""Countdown with + and −: the second pocket task, whose solution can be searched for in writing or in the head.

A problem is `50,46,24=28`: give the numbers signs so that they make 28. Any right expression is an answer, whatever its
order. A solution is worked (`50+46+24=96+24=120;50+46-24=96-24=72;50-46+24=04+24=28`, one attempt after another until
one hits) or short (`50-46+24`). The last attempt, up to its first `=`, is the answer. No torch here; everything is text.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from itertools import product

from headwater.tasks.sums import POOLS

LONGEST_ANSWER = 128  # characters; it bounds what the grader reads of a completion
MOST_NUMBERS = 12  # of a gold answer: all choices of signs are tried to find its solution
_PROBLEM = re.compile(rf"([0-9]{{1,6}}(?:,[0-9]{{1,6}}){{0,{MOST_NUMBERS - 1}}})=(-?[0-9]{{1,8}})", re.ASCII)
_ANSWER = re.compile(r"[+-]?[0-9]{1,6}(?:[+-][0-9]{1,6})*", re.ASCII)
_TERM = re.compile(r"[+-]?[0-9]+", re.ASCII)
PATIENCE = 20_000  # draws without a new problem after which a pool counts as empty


@dataclass(frozen=True, slots=True)
class CountdownDials:
    """Difficulty: how many numbers, and the largest of them; with n numbers there are 2^(n−1) attempts to make.

    Example: CountdownDials(numbers=3, largest=99)
    """

    numbers: int = 3
    largest: int = 99

    def __post_init__(self) -> None:
        if not 2 <= self.numbers <= 6:
            raise ValueError(f"countdown: numbers must lie between 2 and 6, not {self.numbers}")
        if not 9 <= self.largest <= 9999:
            raise ValueError(f"countdown: largest must lie between 9 and 9999, not {self.largest}")

    @property
    def width(self) -> int:
        """Digits of every number, at least: 2 for 99."""
        return len(str(self.largest))


DIALS = CountdownDials()  # what the pocket models are trained on


def pool_of(problem: str) -> str:
    """The one pool that a problem belongs to, whatever its target: pools share no set of numbers."""
    numbers = problem.rpartition("=")[0]
    byte = hashlib.sha256(b"headwater-countdown:" + numbers.encode()).digest()[0]
    return next(name for name, (low, high) in POOLS.items() if low <= byte < high)


def read(problem: str) -> tuple[list[int], int] | None:
    """Numbers and target of a problem, which is also how its gold answer is written; None where it is neither.

    Example: `read("50,46,24=28")` is `([50, 46, 24], 28)`.
    """
    found = _PROBLEM.fullmatch(problem.strip())
    return ([int(number) for number in found[1].split(",")], int(found[2])) if found else None


def attempts(problem: str, dials: CountdownDials = DIALS) -> list[str]:
    """What a worked solution writes: sign after sign from all + to all −, each attempt with its steps, until one hits.

    Example: `attempts("50,46,24=72")` is `["50+46+24=96+24=120", "50+46-24=96-24=72"]`.
    """
    numbers, target = _checked(problem)
    made: list[str] = []
    for signs in product((1, -1), repeat=len(numbers) - 1):
        terms = [numbers[0], *(sign * number for sign, number in zip(signs, numbers[1:], strict=True))]
        left = [[sum(terms[:done]), *terms[done:]] for done in range(1, len(terms) + 1)]
        made.append("=".join(written(one, dials.width) for one in left))
        if sum(terms) == target:
            return made
    raise ValueError(f"countdown: {problem} has no solution that begins with +{numbers[0]}")


def written(terms: list[int], width: int) -> str:
    """Example: `written([50, -6], 2)` is `"50-06"`."""
    signed = [f"{'-' if term < 0 else '+'}{abs(term):0{width}d}" for term in terms]
    return "".join(signed).removeprefix("+")


def worked(problem: str, dials: CountdownDials = DIALS) -> str:
    """Every attempt until one hits: `50,46,24=72` -> `50+46+24=96+24=120;50+46-24=96-24=72`."""
    return ";".join(attempts(problem, dials))


def short(problem: str, dials: CountdownDials = DIALS) -> str:
    """The attempt that hits and no other: `50,46,24=72` -> `50+46-24`."""
    return attempts(problem, dials)[-1].partition("=")[0]


def is_worked(completion: str) -> bool:
    """Whether a completion shows attempts or steps; for reading samples, never for grading."""
    return "=" in completion or ";" in completion


def about(dials: CountdownDials = DIALS) -> str:
    """The task in words, for a model card."""
    return f"Countdown with + and − on {dials.numbers} numbers up to {dials.largest}"


def generate(n: int, pool: str, seed: int, dials: CountdownDials = DIALS) -> list[tuple[str, str]]:
    """n different (problem, gold) pairs of one pool, the gold being the problem; the first k do not depend on n.

    Numbers stand in falling order; the target is never negative, and all choices of signs that allow it are alike.
    Raises ValueError for an unknown pool, or when the pool runs out of problems at these dials.
    Example: generate(1, "eval", 0) -> [("50,46,24=28", "50,46,24=28")]
    """
    if pool not in POOLS:
        raise ValueError(f"countdown: no pool {pool!r}; the pools are {', '.join(POOLS)}")
    if n < 0:
        raise ValueError(f"countdown: cannot generate {n} problems")
    # Only random() promises the same numbers in every Python version, so all draws come from it.
    draw = random.Random(f"countdown:{pool}:{seed}").random
    found: dict[str, None] = {}
    idle = 0  # draws since the last new problem
    while len(found) < n:
        numbers = sorted((1 + int(draw() * dials.largest) for _ in range(dials.numbers)), reverse=True)
        target = numbers[0] + sum(number if draw() < 0.5 else -number for number in numbers[1:])
        problem = ",".join(f"{number:0{dials.width}d}" for number in numbers) + f"={target:0{dials.width}d}"
        idle += 1
        if target >= 0 and problem not in found and pool_of(problem) == pool:
            found[problem] = None
            idle = 0
        if idle > PATIENCE:
            raise ValueError(f"countdown: pool {pool!r} holds about {len(found)} problems at {dials}, not {n}")
    return [(problem, problem) for problem in found]


def terms_of(completion: str) -> list[int] | None:
    """The signed numbers of the last attempt; None where that is no sum of numbers.

    Example: `terms_of("50+46+24=96+24=120;50-46+24=04+24=28")` is `[50, -46, 24]`.
    """
    at = completion.rfind(";") + 1
    answer = completion[at : at + LONGEST_ANSWER + 1].partition("=")[0]
    if len(answer) > LONGEST_ANSWER or not _ANSWER.fullmatch(answer.strip()):
        return None
    return [int(term) for term in _TERM.findall(answer)]


def extract(completion: str) -> str | None:
    """The answer in one spelling, for votes: `24+50-46` and `50-46+24` are one."""
    terms = terms_of(completion)
    return None if terms is None else written(sorted(terms, reverse=True), 1)


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """(correct, reason): whether the last attempt takes each number once and makes the target.

    `equal`, `different`, `no_answer`, or `error` for a gold that is no problem. A pattern and a sum of at most 128
    characters, so that no input can run code, raise or take long.
    Example: grade("50,46,24=28", "24-46+50") -> (True, "equal"); grade("50,46,24=28", "28") -> (False, "different")
    """
    wanted = read(gold)
    if wanted is None:
        return False, "error"
    terms = terms_of(completion)
    if terms is None:
        return False, "no_answer"
    numbers, target = wanted
    right = sorted(map(abs, terms)) == sorted(numbers) and sum(terms) == target
    return (True, "equal") if right else (False, "different")


def as_completion(gold: str) -> str:
    """An expression that solves a gold answer, for `validate`; "", which grades wrong, where there is none."""
    wanted = read(gold)
    if wanted is None:
        return ""
    numbers, target = wanted
    for signs in product((1, -1), repeat=len(numbers)):
        terms = [sign * number for sign, number in zip(signs, numbers, strict=True)]
        if sum(terms) == target:
            return written(terms, 1)
    return ""


def _checked(problem: str) -> tuple[list[int], int]:
    found = read(problem)
    if found is None:
        raise ValueError(f"countdown: {problem!r:.80} is no problem such as 50,46,24=28")
    return found
