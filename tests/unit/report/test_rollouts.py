"""The page's sample of rollouts: verdicts, and which rollouts are chosen."""

from __future__ import annotations

import pytest

from headwater.report.rollouts import PER_SOURCE, choose, verdict_text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"correct": True, "reason": "", "finish": "stop"}, "right"),
        ({"correct": True, "reason": "", "finish": "length"}, "right"),
        ({"correct": False, "reason": "different", "finish": "stop"}, "wrong"),
        ({"correct": False, "reason": "no_answer", "finish": "stop"}, "no answer"),
        ({"correct": False, "reason": "no_answer", "finish": "length"}, "cut at max_tokens"),
        ({"correct": False, "reason": "timeout", "finish": "stop"}, "grader gave no result"),
        ({"finish": "length"}, "not graded"),
    ],
)
def test_verdict_of_rollout_names_how_it_ended(row: dict[str, object], text: str) -> None:
    assert verdict_text(row) == text


def test_sample_of_step_alternates_verdicts() -> None:
    wrong = [{"problem_id": f"p{i}", "correct": False, "reason": "different", "finish": "stop"} for i in range(50)]
    others = [
        {"problem_id": "right", "correct": True, "finish": "stop"},
        {"problem_id": "cut", "correct": False, "finish": "length"},
    ]
    chosen = choose([*wrong, *others])
    assert len(chosen) == PER_SOURCE and {"right", "cut"} <= {row["problem_id"] for row in chosen}
