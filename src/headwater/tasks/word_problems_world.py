"""Random arithmetic DAGs of small integers, the structure behind a word problem.

One step defines each quantity: a number, or a sum, difference, product or quotient of two operands, each either a literal
or an earlier step's value. The question is the last step. Steps that it does not depend on are distractors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headwater.tasks.pools import Draw, choice, randint

LEAST = 2
"""Smallest value, so that nouns are always plural."""
FACTORS = (2, 3, 4, 5)
SIGNS = {
    "given": "", "groups": "*", "more": "+", "fewer": "-", "times": "*", "part": "/", "rest": "-", "sum": "+", "balance": "-",
    "plain": "", "total": "+", "gap": "-", "price": "*", "share": "/",
}  # fmt: skip
"""Relation -> operator. The first nine define a quantity, the last five ask for one. `rest` is a stated total minus a
quantity, `balance` one quantity minus another. Repeated entries in the tables below are weights."""
OPERATORS: dict[str, Callable[[float, float], float]] = {
    "": lambda left, right: left, "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip
LEAVES = ("given", "given", "groups")
ON_ONE = ("more", "more", "fewer", "fewer", "times", "times", "part", "rest")
ON_TWO = ("sum", "sum", "balance")
QUESTIONS = ("plain", "plain", "plain", "total", "total", "gap", "price", "share")


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a step defines, e.g. `Quantity("Mia", "apples")`: the number of apples that Mia picked."""

    owner: str
    thing: str


@dataclass(frozen=True, slots=True)
class Step:
    """One node of the DAG: `left sign right`, or `left` alone for a given number.

    parents  for each operand the index of the step whose value it is; None for a literal

    Example: Tom picked 5 more apples than Mia, who picked 12 (step 0):
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
        return int(OPERATORS[self.sign](self.left, self.right))

    @property
    def expression(self) -> str:
        """Example: `"12+5"`."""
        return f"{self.left}{self.sign}{self.right}" if self.sign else str(self.left)

    @property
    def dependencies(self) -> tuple[int, ...]:
        """Indices of the steps that this step uses."""
        return tuple(parent for parent in self.parents if parent is not None)


@dataclass(frozen=True, slots=True)
class World:
    """Steps in topological order, and the question, which depends on some of them."""

    steps: tuple[Step, ...]
    question: Step

    @property
    def needed(self) -> tuple[int, ...]:
        """Indices of the steps that the answer depends on, ascending; the others are distractors."""
        return tuple(sorted(gradients(self.steps, self.question)))


def gradients(steps: Sequence[Step], last: Step) -> dict[int, float]:
    """Derivative of the last step's value with respect to each step that it depends on, by reverse accumulation.

    Example: Mia has 12 (step 0), Tom 5 more (step 1), the question is twice Tom's number: `{1: 2.0, 0: 2.0}`.
    """
    grads: dict[int, float] = {}

    def backward(step: Step, grad: float) -> None:
        left, right = {
            "": (1.0, 0.0),
            "+": (1.0, 1.0),
            "-": (1.0, -1.0),
            "*": (step.right, step.left),
            "/": (1 / (step.right or 1), -step.left / (step.right or 1) ** 2),
        }[step.sign]
        for parent, partial in zip(step.parents, (left, right), strict=True):
            if parent is not None:
                grads[parent] = grads.get(parent, 0.0) + grad * partial

    backward(last, 1.0)
    for index in range(len(steps) - 1, -1, -1):
        if index in grads:
            backward(steps[index], grads[index])
    return grads


def generate_world(
    draw: Draw, quantities: Sequence[Quantity], ops: int, distractors: int, largest: int
) -> World | None:
    """Generate a DAG whose answer takes `ops` operations, plus `distractors` unused steps; None if the draws fail.

    quantities  what steps may define, in this order
    largest     upper bound of every value, the answer included
    """
    relation = choice(draw, QUESTIONS)
    unused = list(reversed(quantities))
    steps: list[Step] = []
    operations: list[frozenset[int]] = []  # per step: indices of the operations that it depends on, its own included
    question = None
    while question is None:
        if len(unused) == distractors:
            return None
        step = draw_step(draw, steps, unused[-1], largest)
        if step is None:
            continue
        unused.pop()
        steps.append(step)
        own = {len(steps) - 1} if step.sign else set()
        operations.append(frozenset(own.union(*(operations[parent] for parent in step.dependencies))))
        question = draw_question(draw, relation, steps, operations, ops - (SIGNS[relation] != ""), largest)
    world = select_steps(steps, question, sorted(gradients(steps, question)))
    steps = list(world.steps)
    while len(steps) < len(world.steps) + distractors:
        step = draw_step(draw, steps, unused[-1], largest)
        if step is not None:
            unused.pop()
            steps.append(step)
    return World(tuple(steps), world.question)


def draw_step(draw: Draw, steps: Sequence[Step], quantity: Quantity, largest: int) -> Step | None:
    """Draw a step that defines one more quantity, mostly from the latest one; None if its value is not allowed."""
    count = len(steps)
    last = count - 1 if draw() < 0.7 else int(draw() * count)
    chance = draw()
    if count == 0 or chance < 0.2:
        relation = choice(draw, LEAVES)
        left, right = randint(draw, LEAST, 40), 0
        if relation == "groups":
            left, right = randint(draw, 2, 6), randint(draw, 2, 12)
        step = Step(relation, quantity, left, right)
    elif count == 1 or chance < 0.75:
        relation, value = choice(draw, ON_ONE), steps[last].value
        if relation == "rest":
            step = Step(relation, quantity, value + randint(draw, LEAST, 40), value, (None, last))
        else:
            number = choice(draw, FACTORS) if SIGNS[relation] in "*/" else randint(draw, LEAST, 20)
            step = Step(relation, quantity, value, number, (last, None))
    else:
        other = int(draw() * (count - 1))
        other += other >= last
        relation = choice(draw, ON_TWO)
        step = Step(relation, quantity, steps[last].value, steps[other].value, (last, other))
    return step if in_range(step, largest) and has_no_shortcut(steps, step) else None


def draw_question(
    draw: Draw, relation: str, steps: Sequence[Step], operations: Sequence[frozenset[int]], ops: int, largest: int
) -> Step | None:
    """Draw a question about the last step whose operands take exactly `ops` operations; None if there is none."""
    last = len(steps) - 1
    value, quantity = steps[last].value, steps[last].quantity
    if relation in ("total", "gap"):
        others = [index for index in range(last) if len(operations[index] | operations[last]) == ops]
        if not others:
            return None
        first, second = last, choice(draw, others)
        if relation == "gap" and steps[second].value > value:
            first, second = second, first
        question = Step(relation, steps[first].quantity, steps[first].value, steps[second].value, (first, second))
    elif len(operations[last]) != ops:
        return None
    else:
        number = 0 if relation == "plain" else choice(draw, FACTORS)
        question = Step(relation, quantity, value, number, (last, None))
    return question if in_range(question, largest) and has_no_shortcut(steps, question) else None


def in_range(step: Step, largest: int) -> bool:
    """Whether the value is an integer and it and the left operand are within bounds."""
    value = OPERATORS[step.sign](step.left, step.right)
    return value == int(value) and LEAST <= value <= largest and step.left <= largest


def has_no_shortcut(steps: Sequence[Step], last: Step) -> bool:
    """Whether the value of `last` changes with every number that it depends on: no gradient is zero.

    If Tom has 5 more than Mia and Ada 3 more than Mia, Tom's number minus Ada's does not depend on Mia's. Such a problem
    is easier than its number of operations says. With a single dependency there is no shortcut if that step has none.
    """
    return len(last.dependencies) < 2 or all(abs(grad) > 1e-9 for grad in gradients(steps, last).values())


def select_steps(steps: Sequence[Step], question: Step, order: Sequence[int]) -> World:
    """World of the steps at the indices `order`, in that order, with their references renumbered."""
    new_index = {old: new for new, old in enumerate(order)}

    def renumber(step: Step) -> Step:
        left, right = (None if parent is None else new_index[parent] for parent in step.parents)
        return replace(step, parents=(left, right))

    return World(tuple(renumber(steps[index]) for index in order), renumber(question))


def shuffle_steps(draw: Draw, world: World) -> World:
    """The same DAG in a random topological order."""
    order: list[int] = []
    waiting = list(range(len(world.steps)))
    while waiting:
        ready = [index for index in waiting if set(world.steps[index].dependencies) <= set(order)]
        order.append(choice(draw, ready))
        waiting.remove(order[-1])
    return select_steps(world.steps, world.question, order)
