"""Texts for the teacher alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwater.config.recipe import Columns, Source
from headwater.data.contexts import context_of, states_answer
from headwater.data.sources import load
from headwater.errors import UserError
from headwater.types import problem_id


@pytest.mark.parametrize(
    ("context", "gold", "states"),
    [
        ("17 + 45 = 62", "62", True),
        ("the answer is 62.", "62", True),
        ("1623", "62", False),
        ("x62", "62", False),
        ("It is the Red  panda", "red panda", True),
        ("anything", "", False),
        ("anything", None, False),
        ("\\frac{3}{4} of it", "\\frac{3}{4}", True),
    ],
)
def test_states_answer_finds_gold_as_word(context: str, gold: str | None, states: bool) -> None:
    assert states_answer(context, gold) is states


def test_contexts_are_loaded_by_problem_and_kept_out_of_it(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    made = [
        {"problem": "1+1", "answer": "2", "solution": "1+1=2", "hint": "add"},
        {"problem": "1+2", "answer": "3", "solution": None, "hint": ""},
    ]
    path.write_text("\n".join(map(json.dumps, made)))
    loaded = load(Source(path=str(path), columns=Columns(context="solution", answer="answer")), "data.labeled", True)
    assert loaded.contexts == {problem_id("1+1"): "1+1=2"}
    assert loaded.answer_in_context == {problem_id("1+1")}
    assert all("=" not in problem.text for problem in loaded.problems)
    both = load(
        Source(path=str(path), columns=Columns(context="{hint}: {solution}", answer="answer")), "data.labeled", True
    )
    assert both.contexts[problem_id("1+1")] == "add: 1+1=2"


def test_context_of_refuses_other_cells() -> None:
    with pytest.raises(UserError, match=r"columns\.context\) is not text but dict"):
        context_of({"a": {}}, "a", "row 1")
    assert context_of({"a": 3}, "a", "row 1") == "3"
