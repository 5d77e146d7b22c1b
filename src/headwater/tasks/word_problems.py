"""English word problems over arithmetic DAGs: generator and grader of the desk models' task.

A problem states quantities in terms of each other and asks for one of them. Difficulty is the number of operations to the
answer (as in GSM-Infinite and arXiv 2512.07783); distractors are quantities that the answer does not depend on. A worked
solution has one sentence per operation, a short one none. Both end in "The answer is 29."
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from headwater.tasks.pools import Draw, check_request, choice, draws, pool_of, randint, sample
from headwater.tasks.word_problems_text import NAMES, SCENES, Scene, write_problem
from headwater.tasks.word_problems_world import Quantity, World, generate_world, shuffle_steps

ANSWER_PREFIXES = ("The answer is", "the answer is")
MAX_RENAMES = 100  # sets of names to try until a drafted problem falls into the requested pool
LONGEST_ANSWER = 40  # characters after "The answer is" that the grader reads
# An integer with an optional unit and full stop; "12 or 13" and "12 - 1" are no answer.
_NUMBER = re.compile(r"\s*(-?[0-9]{1,9})(?: [a-z]{1,20})?\s*\.?\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class WordsDials:
    """Difficulty parameters: range of operations to the answer (inclusive), maximum distractors, largest number.

    Example: `WordsDials(min_ops=7, max_ops=10)`
    """

    min_ops: int = 2
    max_ops: int = 6
    distractors: int = 2
    largest: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.min_ops <= self.max_ops <= 16:
            raise ValueError(f"words: 1 <= min_ops <= max_ops <= 16 must hold, not {self.min_ops} and {self.max_ops}")
        if not 0 <= self.distractors <= 8:
            raise ValueError(f"words: distractors must lie between 0 and 8, not {self.distractors}")
        if not 40 <= self.largest <= 10_000:
            raise ValueError(f"words: largest must lie between 40 and 10000, not {self.largest}")


DIALS = WordsDials()  # what the desk models are trained on


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A problem, the DAG behind it, its vocabulary and its names.

    world  its quantities are owned by the placeholders "{0}", "{1}" … of names

    Example: `next(problems("eval", 0))`
    """

    text: str
    gold: str
    world: World
    scene: Scene
    names: tuple[str, ...]


def problems(pool: str, seed: int | str, dials: WordsDials = DIALS) -> Iterator[WordProblem]:
    """Infinite iterator of problems from one pool; duplicates are rare but possible.

    The numbers of operations and of distractors are uniform over their ranges.
    Raises ValueError for an unknown pool.
    """
    draw = draws("words", 0, pool, seed)
    while True:
        template, world, scene = draft_problem(draw, dials)
        people = 1 + max(int(step.quantity.owner[1:-1]) for step in world.steps)
        for _ in range(MAX_RENAMES):  # new names make a new problem, far faster than a new DAG
            names = sample(draw, NAMES, people)
            text = template.format(*names)
            if pool_of("words", text) == pool:
                yield WordProblem(text, str(world.question.value), world, scene, tuple(names))
                break


def draft_problem(draw: Draw, dials: WordsDials) -> tuple[str, World, Scene]:
    """Text, DAG and vocabulary of a problem, with placeholders "{0}", "{1}" … for names."""
    ops = randint(draw, dials.min_ops, dials.max_ops)
    distractors = randint(draw, 0, dials.distractors)
    scene = choice(draw, SCENES)
    world = None
    while world is None:
        quantities = draw_quantities(draw, scene, 2 * ops + 4 + distractors)
        world = generate_world(draw, quantities, ops, distractors, dials.largest)
    world = shuffle_steps(draw, world)
    return write_problem(world, scene, draw), world, scene


def draw_quantities(draw: Draw, scene: Scene, count: int) -> list[Quantity]:
    """Distinct quantities of one or two things; an owner of both things gets them consecutively."""
    things = sample(draw, scene.things, 2 if len(scene.things) > 1 and draw() < 0.5 else 1)
    quantities: list[Quantity] = []
    person = 0
    while len(quantities) < count:
        first = choice(draw, things)
        quantities.append(Quantity(f"{{{person}}}", first))
        if len(things) == 2 and draw() < 0.5:
            quantities.append(Quantity(f"{{{person}}}", things[1 - things.index(first)]))
        person += 1
    return quantities


def generate(n: int, pool: str, seed: int, dials: WordsDials = DIALS) -> list[tuple[str, str]]:
    """Generate n distinct (problem, answer) pairs from one pool. The first k pairs do not depend on n.

    Raises ValueError for an unknown pool.
    """
    check_request("words", n, pool)
    pairs: dict[str, str] = {}
    source = problems(pool, seed, dials)
    while len(pairs) < n:
        problem = next(source)
        pairs.setdefault(problem.text, problem.gold)
    return list(pairs.items())


def extract(completion: str) -> str | None:
    """Integer after the last "The answer is" (or "the answer is"), as text; None if there is none.

    Example: `extract("Mia had 3*4=12 apples. The answer is 12.")` is `"12"`.
    """
    start = max(completion.rfind(prefix) for prefix in ANSWER_PREFIXES)
    statement = completion[start + len(ANSWER_PREFIXES[0]) :] if start >= 0 else ""
    match = _NUMBER.fullmatch(statement) if len(statement) <= LONGEST_ANSWER else None
    return str(int(match[1])) if match else None


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """Compare the number after the last "The answer is" with the gold; (correct, `equal` | `different` | `no_answer`).

    Linear time; no input can run code or raise.
    Example: grade("12", "Mia had 3*4=12 apples. The answer is 12.") -> (True, "equal"); grade("12", "12") -> (False, "no_answer")
    """
    answer = extract(completion)
    if answer is None:
        return False, "no_answer"
    return (True, "equal") if answer == gold.strip() else (False, "different")
