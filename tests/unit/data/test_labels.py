"""Labels as a capability: counted, bounded by a budget, divided by content, never printed."""

from __future__ import annotations

import copy

import pytest

from headwater.data.labels import Labels, Pools, half_of, select_labels
from headwater.errors import UserError
from headwater.types import Verdict, problem_id

GOLD = {"a": "secret-1", "b": "secret-2", "c": "secret-3"}


class Grader:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, pairs: list[tuple[str, str]]) -> list[Verdict]:
        self.seen += pairs
        return [Verdict(gold == text, "equal" if gold == text else "different") for gold, text in pairs]


@pytest.fixture
def grader() -> Grader:
    return Grader()


def test_labels_check_grades_completions_against_their_own_gold_in_order(grader: Grader) -> None:
    labels = Labels(GOLD, grader, 3)
    verdicts = labels.check([("b", "secret-2"), ("a", "secret-2"), ("b", "x")])
    assert [verdict.correct for verdict in verdicts] == [True, False, False]
    assert grader.seen == [("secret-2", "secret-2"), ("secret-1", "secret-2"), ("secret-2", "x")]


def test_labels_count_every_check_and_each_problem_once(grader: Grader) -> None:
    labels = Labels(GOLD, grader, 3)
    labels.check([("a", "x")] * 8)
    labels.check([("a", "x"), ("b", "y")])
    assert labels.looked_at == {"a", "b"}
    assert labels.checks == 10 == len(grader.seen)


def test_labels_refuse_checks_beyond_budget(grader: Grader) -> None:
    labels = Labels(GOLD, grader, 2)
    labels.check([("a", "x")])
    with pytest.raises(UserError, match=r"^labels\.budget 2: exhausted; grading a further problem would exceed it$"):
        labels.check([("a", "x"), ("b", "y"), ("c", "z")])
    assert (labels.looked_at, labels.checks, len(grader.seen)) == ({"a"}, 1, 1)
    labels.check([("b", "y")])  # what the budget still allows
    labels.check([("a", "x"), ("b", "y")])  # and looking again costs nothing new
    assert labels.looked_at == {"a", "b"}


def test_labels_refuse_unlabelled_problem_before_counting(grader: Grader) -> None:
    labels = Labels(GOLD, grader, 3)
    with pytest.raises(KeyError, match="problem z has no label here"):
        labels.check([("a", "x"), ("z", "y")])
    assert (labels.looked_at, labels.checks, grader.seen) == (set(), 0, [])


def test_labels_subset_contains_only_its_own_problems(grader: Grader) -> None:
    part = Labels(GOLD, grader, 3).only(["a", "c"])
    assert len(part) == 2 and "a" in part and "b" not in part
    part.check([("a", "x"), ("c", "x")])
    with pytest.raises(KeyError, match="problem b has no label here"):
        part.check([("b", "x")])
    with pytest.raises(KeyError):
        part.only(["b"])
    # No way to a larger budget: neither through a part nor through a part of a part.
    assert Labels(GOLD, grader, 1).only(["a", "c"]).budget == 1
    assert part.only(["a"]).budget == 1


def test_labels_do_not_show_gold_answers_in_repr_or_errors(grader: Grader) -> None:
    labels = Labels(GOLD, grader, 1)
    labels.check([("a", "x")])
    shown = [repr(labels), str(labels), f"{labels}", repr(labels.only(["a"])), repr(copy.copy(labels)), repr([labels])]
    for failing in ([("b", "x")], [("z", "x")]):
        with pytest.raises((UserError, KeyError)) as refused:
            labels.check(failing)
        shown.append(repr(refused.value))
    assert not any("secret" in text for text in shown)
    public = [name for name in vars(labels) if not name.startswith("_")]
    assert not any("secret" in repr(getattr(labels, name)) for name in public)


POOL = [problem_id(f"problem {index}") for index in range(1000)]


def test_split_halves_are_disjoint_by_content_and_nearly_equal() -> None:
    pools = select_labels(POOL, None, 0)
    assert set(pools.first_half) | set(pools.second_half) == set(POOL)
    assert not set(pools.first_half) & set(pools.second_half)
    assert {half_of(name) for name in pools.first_half} == {0}
    assert {half_of(name) for name in pools.second_half} == {1}
    assert pools.all == pools.first_half + pools.second_half
    # A fair coin over 1000 problems: standard deviation 16.
    assert abs(len(pools.first_half) - 500) < 64


def test_split_ignores_white_space() -> None:
    assert problem_id("1 + 1") == problem_id(" 1  +\n1\t") != problem_id("1 + 2")


def test_label_selection_is_stable_under_reordering_and_added_rows() -> None:
    bought = select_labels(POOL[:600], 100, 0)
    assert select_labels(POOL[:600][::-1], 100, 0) == bought
    more = select_labels(POOL, 100, 0)
    for half in ("first_half", "second_half"):
        before, after = getattr(bought, half), getattr(more, half)
        old = [name for name in after if name in set(POOL[:600])]
        assert old == list(before[: len(old)])  # the old ones that stay are the first ones, in their order
        assert 0 < len(old) < 50  # newcomers did displace some


@pytest.mark.parametrize(("budget", "first", "second"), [(2, 1, 1), (7, 4, 3), (100, 50, 50), (1, 1, 0)])
def test_budget_buys_equal_halves_and_odd_label_for_first(budget: int, first: int, second: int) -> None:
    pools = select_labels(POOL, budget, 0)
    assert (len(pools.first_half), len(pools.second_half)) == (first, second)


def test_budget_is_filled_from_other_half_if_first_is_too_small() -> None:
    few = [name for name in POOL if half_of(name) == 0][:3]
    many = [name for name in POOL if half_of(name) == 1][:20]
    pools = select_labels(few + many, 16, 0)
    assert (len(pools.first_half), len(pools.second_half)) == (3, 13)
    pools = select_labels(many + few, 23, 0)
    assert (len(pools.first_half), len(pools.second_half)) == (3, 20)


def test_larger_budget_keeps_labels_of_smaller() -> None:
    small, large = select_labels(POOL, 50, 0), select_labels(POOL, 200, 0)
    assert large.first_half[:25] == small.first_half and large.second_half[:25] == small.second_half


def test_label_seed_selects_other_labels_from_same_halves() -> None:
    labels, other = select_labels(POOL, 50, 0), select_labels(POOL, 50, 1)
    assert len(set(labels.all) & set(other.all)) < 15  # 2.5 expected by chance
    assert {half_of(name) for name in other.first_half} == {0}


def test_budget_above_pool_is_refused() -> None:
    assert select_labels(["a"], 1, 0) in (Pools(("a",), ()), Pools((), ("a",)))
    with pytest.raises(
        UserError, match=r"^labels\.budget 1001 is more than the 1000 labelled problems of data\.labeled$"
    ):
        select_labels(POOL, 1001, 0)


def test_label_subsets_share_budget(grader: Grader) -> None:
    whole = Labels(GOLD, grader, 1)
    first, second = whole.only(["a"]), whole.only(["c"])
    first.check([("a", "x")])
    with pytest.raises(UserError, match=r"labels\.budget 1"):
        second.check([("c", "x")])
    assert (whole.looked_at, whole.checks, second.looked_at, second.checks) == ({"a"}, 1, set(), 0)
