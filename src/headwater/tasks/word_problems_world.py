"""The arithmetic behind a word problem: a DAG of small whole numbers, grown at random around one question.

Each quantity is told once, by one step: a number, or a sum, difference, product or quotient of two numbers, each of which is
told there or is an earlier step's value. The question is a last step. What it does not stand on is a distractor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")
Draw = Callable[[], float]  # uniform in [0, 1)

LEAST = 2
"""No number is smaller, so that every thing stands in the plural."""
FACTORS = (2, 3, 4, 5)
SIGNS = {
    "given": "", "groups": "*", "more": "+", "fewer": "-", "times": "*", "part": "/", "rest": "-", "sum": "+", "balance": "-",
    "plain": "", "total": "+", "gap": "-", "price": "*", "share": "/",
}  # fmt: skip
"""Relation -> its operation. The first nine tell a quantity; the last five ask. `rest` is a told total less a quantity,
`balance` one quantity less another."""
LEAVES = ("given", "given", "groups")
ON_ONE = ("more", "more", "fewer", "fewer", "times", "times", "part", "rest")
ON_TWO = ("sum", "sum", "balance")
QUESTIONS = ("plain", "plain", "plain", "total", "total", "gap", "price", "share")


@dataclass(frozen=True, slots=True)
class Quantity:
    """Example: `Quantity("Mia", "apples")`, the number of apples that Mia picked."""

    owner: str
    thing: str


@dataclass(frozen=True, slots=True)
class Step:
    """One number and how it follows: `left sign right`, or `left` alone where there is nothing to do.

    parents  for each of left and right the index of the earlier step whose value it is; None for a number of the text

    Example: Tom picked 5 more apples than Mia, whose 12 are step 0:
    `Step("more", Quantity("Tom", "apples"), 12, 5, (0, None))`, whose value is 17.
    """

    relation: str
    quantity: Quantity
    left: int
    right: int = 0
    parents: tuple[int | None, int | None] = (None, None)

    @property
    def sign(self) -> str:
        return SIGNS[self.relation]

    @property
    def value(self) -> int:
        return int(result(self.sign, self.left, self.right))

    @property
    def expression(self) -> str:
        """Example: `"12+5"`."""
        return f"{self.left}{self.sign}{self.right}" if self.sign else str(self.left)

    @property
    def known(self) -> tuple[int, ...]:
        """The steps that it stands on."""
        return tuple(parent for parent in self.parents if parent is not None)


@dataclass(frozen=True, slots=True)
class World:
    """Steps in an order in which each stands on earlier ones only, and the question, which stands on some of them."""

    steps: tuple[Step, ...]
    question: Step

    @property
    def needed(self) -> tuple[int, ...]:
        """The steps that the answer stands on, in order; the others are distractors."""
        return tuple(sorted(slopes(self.steps, self.question)))

    @property
    def operations(self) -> int:
        """How many additions, subtractions, multiplications and divisions lead to the answer."""
        return sum(step.sign != "" for step in (*(self.steps[index] for index in self.needed), self.question))


def result(sign: str, left: float, right: float) -> float:
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    return left / right if sign == "/" else left


def slopes(steps: Sequence[Step], last: Step) -> dict[int, float]:
    """The derivative of the last step's value by that of each step that it stands on, by index; the chain rule backwards.

    Example: Tom's 17 are Mia's 12 and 5 more; twice Tom's is asked for: `{1: 2.0, 0: 2.0}`.
    """
    found: dict[int, float] = {}

    def hand_down(step: Step, slope: float) -> None:
        left, right = {
            "": (1.0, 0.0),
            "+": (1.0, 1.0),
            "-": (1.0, -1.0),
            "*": (step.right, step.left),
            "/": (1 / (step.right or 1), -step.left / (step.right or 1) ** 2),
        }[step.sign]
        for parent, share in zip(step.parents, (left, right), strict=True):
            if parent is not None:
                found[parent] = found.get(parent, 0.0) + slope * share

    hand_down(last, 1.0)
    for index in range(len(steps) - 1, -1, -1):
        if index in found:
            hand_down(steps[index], found[index])
    return found


def pick(draw: Draw, options: Sequence[T]) -> T:
    return options[int(draw() * len(options))]


def some(draw: Draw, options: Sequence[T], many: int) -> list[T]:
    """`many` different ones, in random order."""
    left = list(options)
    return [left.pop(int(draw() * len(left))) for _ in range(many)]


def between(draw: Draw, low: int, high: int) -> int:
    """A whole number, both ends included."""
    return low + int(draw() * (high - low + 1))


def grow(draw: Draw, quantities: Sequence[Quantity], ops: int, distractors: int, largest: int) -> World | None:
    """A world whose question takes `ops` operations, with `distractors` steps beside it; None where the draws led nowhere.

    quantities  what may be told, in this order; the world uses the first of them
    largest     no value is larger, the answer included
    """
    asked = pick(draw, QUESTIONS)
    left_over = list(reversed(quantities))
    steps: list[Step] = []
    work: list[frozenset[int]] = []  # for each step the operations that lead to it, its own included
    question = None
    while question is None:
        if len(left_over) == distractors:
            return None
        step = another(draw, steps, left_over[-1], largest)
        if step is None:
            continue
        left_over.pop()
        steps.append(step)
        own = {len(steps) - 1} if step.sign else set()
        work.append(frozenset(own.union(*(work[parent] for parent in step.known))))
        question = ask(draw, asked, steps, work, ops - (SIGNS[asked] != ""), largest)
    kept = sorted(slopes(steps, question))
    world = renumbered([steps[index] for index in kept], question, {old: new for new, old in enumerate(kept)})
    steps = list(world.steps)
    while len(steps) < len(world.steps) + distractors:
        step = another(draw, steps, left_over[-1], largest)
        if step is not None:
            left_over.pop()
            steps.append(step)
    return World(tuple(steps), world.question)


def another(draw: Draw, steps: Sequence[Step], quantity: Quantity, largest: int) -> Step | None:
    """A step that tells one more quantity, mostly from the one told last; None where its value would not do."""
    many = len(steps)
    last = many - 1 if draw() < 0.7 else int(draw() * many)
    chance = draw()
    if many == 0 or chance < 0.2:
        relation = pick(draw, LEAVES)
        left, right = between(draw, LEAST, 40), 0
        if relation == "groups":
            left, right = between(draw, 2, 6), between(draw, 2, 12)
        step = Step(relation, quantity, left, right)
    elif many == 1 or chance < 0.75:
        relation, value = pick(draw, ON_ONE), steps[last].value
        if relation == "rest":
            step = Step(relation, quantity, value + between(draw, LEAST, 40), value, (None, last))
        else:
            number = pick(draw, FACTORS) if SIGNS[relation] in "*/" else between(draw, LEAST, 20)
            step = Step(relation, quantity, value, number, (last, None))
    else:
        other = int(draw() * (many - 1))
        other += other >= last
        relation = pick(draw, ON_TWO)
        step = Step(relation, quantity, steps[last].value, steps[other].value, (last, other))
    return step if fits(step, largest) and every_number_counts(steps, step) else None


def ask(
    draw: Draw, asked: str, steps: Sequence[Step], work: Sequence[frozenset[int]], ops: int, largest: int
) -> Step | None:
    """A question about the last step, where `ops` operations lead to what it is about; None where there is none."""
    last = len(steps) - 1
    value, quantity = steps[last].value, steps[last].quantity
    if asked in ("total", "gap"):
        others = [index for index in range(last) if len(work[index] | work[last]) == ops]
        if not others:
            return None
        first, second = last, pick(draw, others)
        if asked == "gap" and steps[second].value > value:
            first, second = second, first
        pair = steps[first], steps[second]
        question = Step(asked, pair[0].quantity, pair[0].value, pair[1].value, (first, second))
    elif len(work[last]) != ops:
        return None
    else:
        number = 0 if asked == "plain" else pick(draw, FACTORS)
        question = Step(asked, quantity, value, number, (last, None))
    return question if fits(question, largest) and every_number_counts(steps, question) else None


def fits(step: Step, largest: int) -> bool:
    """Whether its value is whole and it and its numbers are neither too small nor too large."""
    value = result(step.sign, step.left, step.right)
    return value == int(value) and LEAST <= value <= largest and step.left <= largest


def every_number_counts(steps: Sequence[Step], last: Step) -> bool:
    """Whether the value of `last` would change with each number of the text that it stands on.

    Tom has 5 more than Mia and Ada 3 more than Mia: how many more Tom has than Ada does not depend on Mia's. Such shortcuts
    would make a problem easier than its number of operations says. One step's value alone has none if that step has none.
    """
    return len(last.known) < 2 or all(abs(slope) > 1e-9 for slope in slopes(steps, last).values())


def renumbered(steps: Iterable[Step], question: Step, place: dict[int, int]) -> World:
    """The world with its steps at other places: `place` maps old indices to new ones, `steps` stand in the new order."""

    def moved(step: Step) -> Step:
        left, right = (None if parent is None else place[parent] for parent in step.parents)
        return replace(step, parents=(left, right))

    return World(tuple(moved(step) for step in steps), moved(question))


def reordered(draw: Draw, world: World) -> World:
    """The same world told in another order, in which each step still stands on earlier ones only."""
    order: list[int] = []
    waiting = list(range(len(world.steps)))
    while waiting:
        order.append(pick(draw, [index for index in waiting if set(world.steps[index].known) <= set(order)]))
        waiting.remove(order[-1])
    return renumbered(
        [world.steps[index] for index in order], world.question, {old: new for new, old in enumerate(order)}
    )
