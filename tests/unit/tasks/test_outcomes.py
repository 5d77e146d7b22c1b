"""Outcomes of graded completions: categories, shares and remedies by hand."""

from __future__ import annotations

import pytest

from headwater.tasks.outcomes import DESCRIPTIONS, REMEDIES, Outcomes, outcome
from headwater.tasks.registry import TASKS


@pytest.mark.parametrize(
    ("correct", "reason", "finish", "expected"),
    [
        (True, "equal", "stop", "right"),
        (True, "equal", "length", "right"),  # the answer came before the cut
        (False, "no_answer", "length", "cut"),
        (False, "different", "length", "cut"),  # an intermediate result may have been taken for the answer
        (False, "no_answer", "stop", "no_answer"),
        (False, "truncated", "stop", "no_answer"),  # ended by itself, with a box that never closes
        (False, "timeout", "stop", "ungraded"),
        (False, "memory", "stop", "ungraded"),
        (False, "error", "stop", "ungraded"),
        (False, "different", "stop", "wrong"),
        (False, "the units are missing", "stop", "wrong"),  # a reason of a user's own grader
    ],
)
def test_outcome_follows_from_verdict_and_finish(correct: bool, reason: str, finish: str, expected: str) -> None:
    assert outcome(correct, reason, finish) == expected


@pytest.mark.parametrize(
    ("task", "completion", "expected"),
    [
        ("maths", "I do not know.", "no_answer"),
        ("maths", "The result is \\boxed{12", "no_answer"),
        ("maths", "\\boxed{13}", "wrong"),
        ("maths", "\\boxed{12}", "right"),
        ("numeric", "none", "no_answer"),
        ("choice", "hm", "no_answer"),
        ("json", '{"a": 1', "no_answer"),
        ("sums", "12", "no_answer"),
    ],
)
def test_outcome_of_reasons_of_each_grader(task: str, completion: str, expected: str) -> None:
    golds = {"choice": "B", "json": '{"a": 1}'}
    assert outcome(*TASKS[task].grade(golds.get(task, "12"), completion), "stop") == expected


def test_outcomes_name_largest_share_first_and_its_remedy() -> None:
    graded = [
        *[{"correct": False, "reason": "no_answer", "finish": "length"}] * 240,
        *[{"correct": False, "reason": "no_answer", "finish": "stop"}] * 7,
        *[{"correct": False, "reason": "different", "finish": "stop"}] * 2,
        {"correct": True, "reason": "equal", "finish": "stop"},  # 0.4 % is not worth a clause
    ]
    outcomes = Outcomes.of([*graded, {"completion": "never graded", "finish": "length"}])
    assert outcomes.total == 250
    assert outcomes.shares == {"cut": 0.96, "no_answer": 0.028, "ungraded": 0.0, "wrong": 0.008, "right": 0.004}
    assert outcomes.because(48) == (
        "96 % of the completions were cut at max_tokens = 48, 3 % held no answer that the grader finds, 1 % were wrong"
    )
    assert outcomes.remedy("stages.opd").startswith(
        "raise stages.opd.sampling.max_tokens or, if the answers never end, lower "
    )


def test_each_outcome_has_its_own_description_and_remedy() -> None:
    assert DESCRIPTIONS.keys() == REMEDIES.keys()
    remedies = {name: Outcomes({**dict.fromkeys(DESCRIPTIONS, 1), name: 3}).remedy("S") for name in DESCRIPTIONS}
    assert len(set(remedies.values())) == len(DESCRIPTIONS)
    assert "harder" in remedies["right"] and "prompt.template" in remedies["no_answer"]
    assert "easier" in remedies["wrong"] and "grader_seconds" in remedies["ungraded"]


def test_outcomes_without_completions_say_nothing() -> None:
    nothing = Outcomes.of([])
    assert (nothing.total, nothing.shares, nothing.largest, nothing.because(8), nothing.remedy("s")) == (
        0,
        {},
        None,
        "",
        "",
    )
