"""Chained modular sums: generator and grader of the pocket models' task.

A problem is `17+45+82+03`; all numbers have as many digits as the largest residue. Its answer, mod 100, is `47`.
A worked solution (`17+45=62+82=44+03=47`) shows the running sum after each term; a short one is `=47`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from headwater.tasks.pools import draws, pool_of, randint

LONGEST_ANSWER = 32  # characters; enough for any modulus, and bounds what the grader copies


@dataclass(frozen=True, slots=True)
class SumsDials:
    """Difficulty parameters: the modulus and the range of the number of terms (inclusive).

    Example: SumsDials(modulus=100, min_terms=4, max_terms=6)
    """

    modulus: int = 100
    min_terms: int = 4
    max_terms: int = 6

    def __post_init__(self) -> None:
        if not 2 <= self.modulus <= 10**9:
            raise ValueError(f"sums: modulus must lie between 2 and 1000000000, not {self.modulus}")
        if not 2 <= self.min_terms <= self.max_terms <= 64:
            raise ValueError(
                f"sums: 2 <= min_terms <= max_terms <= 64 must hold, not {self.min_terms} and {self.max_terms}"
            )

    @property
    def width(self) -> int:
        """Digits per number: 2 for modulus 100."""
        return len(str(self.modulus - 1))


DIALS = SumsDials()  # what the pocket models are trained on


def generate(n: int, pool: str, seed: int, dials: SumsDials = DIALS) -> list[tuple[str, str]]:
    """Generate n distinct (problem, answer) pairs from one pool. The first k pairs do not depend on n.

    The number of terms is uniform over its range until problems of a length run out.
    Raises ValueError for an unknown pool, or one with fewer than n problems at this difficulty.
    Example: generate(1, "eval", 0) -> [("17+45+82+03", "47")]
    """
    draw = draws("sums", n, pool, seed)
    _check_pool_size(n, pool, dials)
    pairs: dict[str, str] = {}
    while len(pairs) < n:
        count = randint(draw, dials.min_terms, dials.max_terms)
        terms = [int(draw() * dials.modulus) for _ in range(count)]
        problem = "+".join(str(term).zfill(dials.width) for term in terms)
        if problem not in pairs and pool_of("sums", problem) == pool:
            pairs[problem] = str(sum(terms) % dials.modulus).zfill(dials.width)
    return list(pairs.items())


def _check_pool_size(n: int, pool: str, dials: SumsDials) -> None:
    """Raise ValueError when the pool has fewer than n problems at this difficulty.

    The smallest pool gets an eighth of all problems, so 32 n problems in total are enough without counting.
    """
    total = sum(dials.modulus**count for count in range(dials.min_terms, dials.max_terms + 1))
    if total > max(32 * n, 20_000):
        return
    numbers = [str(number).zfill(dials.width) for number in range(dials.modulus)]
    counts = range(dials.min_terms, dials.max_terms + 1)
    problems = ("+".join(terms) for count in counts for terms in product(numbers, repeat=count))
    available = sum(pool_of("sums", problem) == pool for problem in problems)
    if available < n:
        raise ValueError(
            f"sums: pool {pool!r} has {available} problems with modulus {dials.modulus} and {dials.min_terms} to "
            f"{dials.max_terms} terms, but {n} were requested"
        )


def extract(completion: str) -> str | None:
    """Text after the last `=`, the answer of a chained sum; None if it is empty or too long."""
    _, sign, answer = completion.rpartition("=")
    answer = answer.strip()
    return answer if sign and 0 < len(answer) <= LONGEST_ANSWER else None


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """Compare the text after the last `=` with the gold answer; (correct, `equal` | `different` | `no_answer`).

    Linear time; no input can run code or raise.
    Example: grade("47", "17+45=62+82=44+03=47") -> (True, "equal"); grade("47", "47") -> (False, "no_answer")
    """
    answer = extract(completion)
    if answer is None or not (answer.isascii() and answer.isdigit()):
        return False, "no_answer"
    return (True, "equal") if answer == gold.strip() else (False, "different")
