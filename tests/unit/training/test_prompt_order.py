"""Prompt order: each problem once per epoch, also where an epoch ends within a step."""

from __future__ import annotations

from collections import Counter

import pytest

from headwater import seeds
from headwater.training.prompt_order import PromptOrder

DRAW = (0, "opd")


def steps(names: list[str], count: int, many: int) -> list[list[str]]:
    order = PromptOrder(names, count, *DRAW)
    return [order.step(step) for step in range(many)]


def as_before(names: list[str], count: int, step: int) -> list[str]:
    """How a step was chosen when an epoch that ended within one could bring a problem twice and leave another out."""
    chosen: list[str] = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(names))
        order = seeds.shuffled(names, *DRAW, "epoch", epoch)
        chosen.append(next(name for name in order[index:] + order[:index] if name not in chosen))
    return chosen


@pytest.mark.parametrize(
    ("many", "count"), [(5, 2), (5, 3), (5, 4), (5, 5), (7, 3), (12, 5), (16, 4), (31, 8), (64, 48), (3, 1)]
)
def test_prompt_order_visits_each_problem_once_per_epoch(many: int, count: int) -> None:
    names = [f"p{number}" for number in range(many)]
    visits = steps(names, count, 6 * many)
    assert all(len(set(step)) == count for step in visits)
    flat = [name for step in visits for name in step]
    for start in range(0, len(flat) - many + 1, many):
        assert Counter(flat[start : start + many]) == Counter(names)


def test_earlier_prompt_order_repeated_problems_within_step() -> None:
    names = [f"p{number}" for number in range(7)]
    flat = [name for step in range(14) for name in as_before(names, 3, step)]
    assert any(len(set(flat[start : start + 7])) < 7 for start in range(0, 42, 7))


@pytest.mark.parametrize(("many", "count"), [(16, 4), (8, 8), (9, 3)])
def test_prompt_order_is_unchanged_where_epochs_end_with_step(many: int, count: int) -> None:
    names = [f"p{number}" for number in range(many)]
    assert steps(names, count, 40) == [as_before(names, count, step) for step in range(40)]


def test_prompt_order_of_last_step_of_epoch_is_unchanged() -> None:
    names = [f"p{number}" for number in range(7)]
    visits = steps(names, 3, 7)
    assert visits[2] == as_before(names, 3, 2)  # places 6, 7, 8: the first epoch ends after place 6


@pytest.mark.parametrize("first", [0, 1, 5, 37, 4999])
def test_prompt_order_does_not_depend_on_epoch_read_first(first: int) -> None:
    names = [f"p{number}" for number in range(11)]
    fresh, used = PromptOrder(names, 4, *DRAW), PromptOrder(names, 4, *DRAW)
    for epoch in range(first + 1):
        used.epoch(epoch)
    assert fresh.epoch(first) == used.epoch(first)
    earlier = max(0, first - 1)
    assert fresh.epoch(earlier) == PromptOrder(names, 4, *DRAW).epoch(earlier)  # and back
