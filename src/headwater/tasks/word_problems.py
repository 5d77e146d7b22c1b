"""Word problems in plain English over arithmetic DAGs: the task of the desk models. No torch here; everything is text.

A problem tells some people's quantities one from another and asks for one that takes a number of operations to find (the
difficulty dial, as in GSM-Infinite's graphs and arXiv 2512.07783); further quantities may stand there that the answer does
not need. A solution is worked (a sentence for each operation) or short. Both end in "The answer is 29."
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from headwater.tasks.sums import POOLS
from headwater.tasks.word_problems_text import NAMES, SCENES, Scene, answer, solution, story
from headwater.tasks.word_problems_world import Draw, Quantity, Step, World, grow, pick, reordered, some

STATED = ("The answer is", "the answer is")
RENAMINGS = 100
LONGEST_ANSWER = 40  # characters after "The answer is"; it bounds what the grader reads
# A whole number, a unit at most, a full stop at most; "12 or 13" and "12 - 1" state no answer.
_NUMBER = re.compile(r"\s*(-?[0-9]{1,9})(?: [a-z]{1,20})?\s*\.?\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class WordsDials:
    """Difficulty: operations to the answer (both ends included), distractors at most, the largest number.

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
    """A problem with both of its solutions, and the DAG that it tells.

    Example: `next(problems("eval", 0))`
    """

    text: str
    worked: str
    short: str
    gold: str
    world: World


def pool_of(text: str) -> str:
    """The one pool that a problem text belongs to, whatever seed or dials made it."""
    byte = hashlib.sha256(b"headwater-words:" + text.encode()).digest()[0]
    return next(name for name, (low, high) in POOLS.items() if low <= byte < high)


def problems(pool: str, seed: int | str, dials: WordsDials = DIALS) -> Iterator[WordProblem]:
    """Endlessly many problems of one pool; one may come twice, if hardly ever.

    The number of operations is uniform between the dials, and so is the number of distractors.
    Raises ValueError for an unknown pool.
    """
    if pool not in POOLS:
        raise ValueError(f"words: no pool {pool!r}; the pools are {', '.join(POOLS)}")
    # Only random() promises the same numbers in every Python version, so all draws come from it.
    draw = random.Random(f"words:{pool}:{seed}").random
    while True:
        draft = make(draw, dials)
        people = 1 + max(int(step.quantity.owner[1:-1]) for step in draft.world.steps)
        for _ in range(RENAMINGS):  # other people are another problem, and found far faster than another world
            names = some(draw, NAMES, people)
            if pool_of(draft.text.format(*names)) == pool:
                yield named(draft, names)
                break


def make(draw: Draw, dials: WordsDials) -> WordProblem:
    """A problem whose people are still called "{0}", "{1}" and so on."""
    ops = dials.min_ops + int(draw() * (dials.max_ops - dials.min_ops + 1))
    distractors = int(draw() * (dials.distractors + 1))
    scene = pick(draw, SCENES)
    world = None
    while world is None:
        world = grow(draw, cast(draw, scene, 2 * ops + 4 + distractors), ops, distractors, dials.largest)
    world = reordered(draw, world)
    value = world.question.value
    return WordProblem(story(world, scene, draw), solution(world, scene), answer(value), str(value), world)


def cast(draw: Draw, scene: Scene, many: int) -> list[Quantity]:
    """Different quantities, one thing or two in all; who has both has them one after the other."""
    things = some(draw, scene.things, 2 if len(scene.things) > 1 and draw() < 0.5 else 1)
    found: list[Quantity] = []
    person = 0
    while len(found) < many:
        first = pick(draw, things)
        found.append(Quantity(f"{{{person}}}", first))
        if len(things) == 2 and draw() < 0.5:
            found.append(Quantity(f"{{{person}}}", things[1 - things.index(first)]))
        person += 1
    return found


def named(draft: WordProblem, names: Sequence[str]) -> WordProblem:
    def of(step: Step) -> Step:
        return replace(step, quantity=Quantity(step.quantity.owner.format(*names), step.quantity.thing))

    world = World(tuple(map(of, draft.world.steps)), of(draft.world.question))
    return replace(draft, text=draft.text.format(*names), worked=draft.worked.format(*names), world=world)


def generate(n: int, pool: str, seed: int, dials: WordsDials = DIALS) -> list[tuple[str, str]]:
    """n different (problem, answer) pairs of one pool; the first k do not depend on n.

    Raises ValueError for an unknown pool.
    """
    if n < 0:
        raise ValueError(f"words: cannot generate {n} problems")
    pairs: dict[str, str] = {}
    source = problems(pool, seed, dials)
    while len(pairs) < n:
        made = next(source)
        pairs.setdefault(made.text, made.gold)
    return list(pairs.items())


def solutions(
    n: int, pool: str, seed: int | str, worked_share: float, dials: WordsDials = DIALS
) -> list[tuple[str, str]]:
    """n (problem, completion) pairs to learn from, each worked with probability `worked_share` and short otherwise."""
    draw = random.Random(f"words:{pool}:{seed}:forms").random
    made = islice(problems(pool, seed, dials), n)
    return [(one.text, one.worked if draw() < worked_share else one.short) for one in made]


def is_worked(completion: str) -> bool:
    """Whether a completion writes steps before its answer; for reading samples, never for grading."""
    return not completion.lstrip().startswith(STATED)


def extract(completion: str) -> str | None:
    """The whole number after the last "The answer is" (or "the answer is"), as text; None where there is none.

    Example: `extract("Mia had 3*4=12 apples. The answer is 12.")` is `"12"`.
    """
    at = max(completion.rfind(form) for form in STATED)
    stated = completion[at + len(STATED[0]) :] if at >= 0 else ""
    found = _NUMBER.fullmatch(stated) if len(stated) <= LONGEST_ANSWER else None
    return str(int(found[1])) if found else None


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """(correct, reason): reason is `equal`, `different` or `no_answer`. The answer is what follows the last "The answer is".

    In time linear in the completion; no input can run code or raise.
    Example: grade("12", "Mia had 3*4=12 apples. The answer is 12.") -> (True, "equal"); grade("12", "12") -> (False, "no_answer")
    """
    stated = extract(completion)
    if stated is None:
        return False, "no_answer"
    return (True, "equal") if stated == gold.strip() else (False, "different")
