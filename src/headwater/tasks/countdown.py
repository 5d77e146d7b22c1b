"""Countdown with + and −: generator and grader of the second pocket task.

In the problem `50,46,24=28` each number gets a sign such that the sum is 28. Any correct expression is accepted, in any
order. A worked solution (`50+46+24=96+24=120;50+46-24=96-24=72;50-46+24=04+24=28`) lists attempts until one reaches the
target; a short one is `50-46+24`. The answer is the last attempt up to its first `=`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

from headwater.tasks import pools

LONGEST_ANSWER = 128  # characters of a completion that the grader reads
MAX_NUMBERS = 12  # in a gold answer; all combinations of signs are tried to solve it
_PROBLEM = re.compile(rf"([0-9]{{1,6}}(?:,[0-9]{{1,6}}){{0,{MAX_NUMBERS - 1}}})=(-?[0-9]{{1,8}})", re.ASCII)
_ANSWER = re.compile(r"[+-]?[0-9]{1,6}(?:[+-][0-9]{1,6})*", re.ASCII)
_TERM = re.compile(r"[+-]?[0-9]+", re.ASCII)
MAX_IDLE_DRAWS = 20_000  # draws without a new problem after which a pool counts as exhausted


@dataclass(frozen=True, slots=True)
class CountdownDials:
    """Difficulty parameters: count and maximum of the numbers; n numbers allow 2^(n−1) attempts.

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
        """Minimum digits per number: 2 for 99."""
        return len(str(self.largest))


DIALS = CountdownDials()  # what the pocket models are trained on


def pool_of(problem: str) -> str:
    """Pool of a problem, from a hash of its numbers without the target: no two pools share a set of numbers."""
    return pools.pool_of("countdown", problem.rpartition("=")[0])


def parse_problem(problem: str) -> tuple[list[int], int] | None:
    """Parse numbers and target of a problem (gold answers have the same format); None if it is malformed.

    Example: `parse_problem("50,46,24=28")` is `([50, 46, 24], 28)`.
    """
    match = _PROBLEM.fullmatch(problem.strip())
    return ([int(number) for number in match[1].split(",")], int(match[2])) if match else None


def format_terms(terms: list[int], width: int) -> str:
    """Write signed terms, zero-padded. Example: `format_terms([50, -6], 2)` is `"50-06"`."""
    signed = [f"{'-' if term < 0 else '+'}{abs(term):0{width}d}" for term in terms]
    return "".join(signed).removeprefix("+")


def generate(n: int, pool: str, seed: int, dials: CountdownDials = DIALS) -> list[tuple[str, str]]:
    """Generate n distinct (problem, gold) pairs from one pool; gold is the problem. The first k do not depend on n.

    Numbers are in descending order. Signs are uniform among those that give a non-negative target.
    Raises ValueError for an unknown pool, or when the pool runs out of problems at this difficulty.
    Example: generate(1, "eval", 0) -> [("50,46,24=28", "50,46,24=28")]
    """
    draw = pools.draws("countdown", n, pool, seed)
    problems: dict[str, None] = {}
    idle = 0  # draws since the last new problem
    while len(problems) < n:
        numbers = sorted((pools.randint(draw, 1, dials.largest) for _ in range(dials.numbers)), reverse=True)
        target = numbers[0] + sum(number if draw() < 0.5 else -number for number in numbers[1:])
        problem = ",".join(f"{number:0{dials.width}d}" for number in numbers) + f"={target:0{dials.width}d}"
        idle += 1
        if target >= 0 and problem not in problems and pool_of(problem) == pool:
            problems[problem] = None
            idle = 0
        if idle > MAX_IDLE_DRAWS:
            raise ValueError(f"countdown: pool {pool!r} has about {len(problems)} problems at {dials}, not {n}")
    return [(problem, problem) for problem in problems]


def parse_terms(completion: str) -> list[int] | None:
    """Signed numbers of the last attempt; None if it is not a sum of numbers.

    Example: `parse_terms("50+46+24=96+24=120;50-46+24=04+24=28")` is `[50, -46, 24]`.
    """
    start = completion.rfind(";") + 1
    answer = completion[start : start + LONGEST_ANSWER + 1].partition("=")[0]
    if len(answer) > LONGEST_ANSWER or not _ANSWER.fullmatch(answer.strip()):
        return None
    return [int(term) for term in _TERM.findall(answer)]


def extract(completion: str) -> str | None:
    """Canonical answer for majority votes: `24+50-46` and `50-46+24` are the same."""
    terms = parse_terms(completion)
    return None if terms is None else format_terms(sorted(terms, reverse=True), 1)


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """Check that the last attempt uses each number once and reaches the target; (correct, reason).

    Reasons: `equal`, `different`, `no_answer`, or `error` for a malformed gold. At most 128 characters are matched and
    summed, so no input can run code, raise or take long.
    Example: grade("50,46,24=28", "24-46+50") -> (True, "equal"); grade("50,46,24=28", "28") -> (False, "different")
    """
    problem = parse_problem(gold)
    if problem is None:
        return False, "error"
    terms = parse_terms(completion)
    if terms is None:
        return False, "no_answer"
    numbers, target = problem
    correct = sorted(map(abs, terms)) == sorted(numbers) and sum(terms) == target
    return correct, "equal" if correct else "different"


def as_completion(gold: str) -> str:
    """A solution of a gold answer, for `validate`; "" (graded as wrong) if there is none."""
    problem = parse_problem(gold)
    if problem is None:
        return ""
    numbers, target = problem
    for signs in product((1, -1), repeat=len(numbers)):
        terms = [sign * number for sign, number in zip(signs, numbers, strict=True)]
        if sum(terms) == target:
            return format_terms(terms, 1)
    return ""
