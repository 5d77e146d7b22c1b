"""Rows that are conversations: every usual shape gives the same problem, and its identity is the whole conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headwater.config.recipe import Columns, Source
from headwater.data.contamination import find_leaks
from headwater.data.labels import half_of
from headwater.data.sources import LoadedProblems, load
from headwater.errors import UserError
from headwater.types import Problem, family_of, problem_id

TURNS = (("system", "Answer modulo 7."), ("user", "Let x be 5."), ("assistant", "Fine."), ("user", "What is x plus 4?"))
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
LONG = (
    "A train leaves the station at noon and travels north at sixty miles per hour for exactly two hours. How far is it?"
)


def read(tmp_path: Path, *rows: Any, need_answers: bool = True, **columns: str) -> LoadedProblems:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load(Source(path=str(path), columns=Columns(**columns)), "data.labeled", need_answers)


def refusal(tmp_path: Path, *rows: Any, **columns: str) -> str:
    with pytest.raises(UserError) as refused:
        read(tmp_path, *rows, **columns)
    assert refused.value.exit_code == 2
    return str(refused.value)


def turns_of(*turns: str) -> list[dict[str, str]]:
    """Turns of user and assistant in alternation."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(turns)]


PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in MESSAGES]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": NAMES[role], "value": content} for role, content in TURNS]
COLUMNS_OF_TURNS = {"role": [role for role, _ in TURNS], "content": [content for _, content in TURNS]}
PADDED = [{**turn, "name": None, "tool_calls": None, "weight": 1} for turn in MESSAGES]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": MESSAGES, "answer": "2"},
        {"prompt": PARTS, "answer": "2"},
        {"prompt": PADDED, "answer": 2, "images": [], "tools": None},
        {"messages": MESSAGES, "ground_truth": "2", "dataset": "RLVR"},
        {"conversations": SHAREGPT[1:], "system": "Answer modulo 7.", "answer": "2"},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "9 modulo 7, so \\boxed{2}."}]},
        {"conversations": SHAREGPT, "answer": "2"},
        {"conversations": [*SHAREGPT, {"from": "gpt", "value": "9 - 7 = 2\n#### 2"}]},
        {"conversation": json.dumps(MESSAGES), "Answer": "2"},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "<think>9? \\boxed{9}</think>It is #### 2"}]},
        {"prompt": COLUMNS_OF_TURNS, "answer": "2"},
        {"prompt": MESSAGES, "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"index": 0}},
        {"prompt": MESSAGES, "reward_model": {"style": "rule", "ground_truth": '["2"]'}},
        {"prompt": [{**MESSAGES[0], "role": "developer"}, *MESSAGES[1:]], "solution": "so \\boxed{2}"},
        [*SHAREGPT, {"from": "assistant", "ground_truth": {"value": "2"}}],
    ],
)
def test_conversation_is_read_from_every_usual_format(tmp_path: Path, row: Any) -> None:
    loaded = read(tmp_path, row)
    (problem,) = loaded.problems
    assert problem.turns == TURNS
    assert loaded.gold == {problem.id: "2"}
    assert (
        problem.text == "system: Answer modulo 7.\n\nuser: Let x be 5.\n\nassistant: Fine.\n\nuser: What is x plus 4?"
    )


@pytest.mark.parametrize(
    ("row", "columns", "gold"),
    [
        ({"Problem": "1+1?", "Solution": "\\boxed{2}", "Answer": 2, "ID": "2024-I-1"}, {}, "2"),
        ({"data_source": "math", "prompt": turns_of("1+1?"), "reward_model": {"ground_truth": "2"}}, {}, "2"),
        ({"q": {"text": "1+1?"}, "a": [{"v": "x"}, {"v": "2"}]}, {"problem": "q.text", "answer": "a.1.v"}, "2"),
        ({"prompt": turns_of("1+1?"), "reward_model": json.dumps({"ground_truth": "2"})}, {}, "2"),
        ({"question": "1+1?", "info": json.dumps({"truth": "2"})}, {"answer": "info.truth"}, "2"),
        ({"a.b": "2", "a": {"b": "3"}, "query": "1+1?"}, {"answer": "a.b"}, "2"),
        ({"question": "1+1?", "final_answer": "2", "extra_info": {"answer": "no"}}, {}, "2"),
    ],
)
def test_conversation_columns_may_be_nested_or_capitalised(
    tmp_path: Path, row: Any, columns: dict[str, str], gold: str
) -> None:
    loaded = read(tmp_path, row, **columns)
    assert [problem.text for problem in loaded.problems] == ["1+1?"]
    assert loaded.gold == {problem_id("1+1?"): gold}


BRIEF = ("system", "Be brief.")
EARLIER = (("user", "1+1?"), ("assistant", "2"))


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"system_prompt": "Be brief.", "question": "1+2?"}, (BRIEF, ("user", "1+2?"))),
        ({"system": "Be brief.", "instruction": "Add.", "input": "1, 2"}, (BRIEF, ("user", "Add.\n\n1, 2"))),
        ({"history": [["1+1?", "2"]], "system": "Be brief.", "prompt": "1+2?"}, (BRIEF, *EARLIER, ("user", "1+2?"))),
        ({"previous_messages": turns_of("1+1?", "2"), "prompt": "1+2?"}, (*EARLIER, ("user", "1+2?"))),
        (
            {"system_message": "Be brief.", "chat_history": [["1+1?", "2"]], "prompt": "1+2?"},
            (BRIEF, *EARLIER, ("user", "1+2?")),
        ),
        ({"history": turns_of("1+1?", "2"), "prompt": turns_of("1+2?")}, (*EARLIER, ("user", "1+2?"))),
        ({"history": json.dumps([["1+1?", "2"]]), "prompt": "1+2?", "system": " "}, (*EARLIER, ("user", "1+2?"))),
        ({"prompt": {"system": "Be brief.", "messages": turns_of("1+2?")}}, (BRIEF, ("user", "1+2?"))),
        ({"history": turns_of("3+3?", "6"), "prompt": turns_of("1+1?", "2", "1+2?")}, (*EARLIER, ("user", "1+2?"))),
    ],
)
def test_system_and_history_columns_become_turns(tmp_path: Path, row: Any, turns: Any) -> None:
    (problem,) = read(tmp_path, {**row, "answer": "3"}).problems
    assert problem.turns == turns


def test_history_without_turns_is_named(tmp_path: Path) -> None:
    loaded = read(tmp_path, {"prompt": "1+2?", "history": "They met in 1900.", "answer": "3"})
    assert [unused.column for unused in loaded.unused] == ["history"] and loaded.problems[0].turns == ()
    sentence = refusal(tmp_path, {"prompt": "1+2?", "history": turns_of("1+1?"), "answer": "3"})
    assert "row 1: 'history' does not end with a turn of the assistant" in sentence


@pytest.mark.parametrize("content", [None, "", " \n", []])
def test_system_turn_without_text_is_left_out(tmp_path: Path, content: Any) -> None:
    (problem,) = read(
        tmp_path, {"prompt": [{"role": "system", "content": content}, *turns_of("1+2?")], "answer": "3"}
    ).problems
    assert problem.turns == () and problem.id == problem_id("1+2?")


def test_tools_within_prompt_object_are_refused(tmp_path: Path) -> None:
    row = {"prompt": {"messages": turns_of("1+2?"), "tools": [{"name": "add"}]}, "answer": "3"}
    assert "row 1: 'tools' is not empty" in refusal(tmp_path, row)


def test_single_user_turn_equals_text_problem(tmp_path: Path) -> None:
    loaded = read(tmp_path, {"prompt": turns_of("1+1?"), "answer": "2"}, {"prompt": "1 + 1?", "answer": "2"})
    assert loaded.problems == [Problem(problem_id("1+1?"), "1+1?", loaded.problems[0].source)]
    assert loaded.duplicates == 1 and loaded.problems[0].turns == ()
    assert problem_id("1+1?") == "4fc82bcfe29f43bc"


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"role": [], "content": []},
            "row 1: the conversation in 'prompt' does not end with a turn of the user (it has no other turn)",
        ),
        ({"role": ["user", "assistant"], "content": ["1+1?"]}, "row 1: 'prompt' is not text but dict"),
        ({"role": ["user"], "content": ["1+1?"], "name": ["a", "b"]}, "row 1: 'prompt' is not text but dict"),
    ],
)
def test_turn_columns_empty_or_of_unequal_length_are_refused(
    tmp_path: Path, columns: dict[str, list[str]], sentence: str
) -> None:
    assert sentence in refusal(tmp_path, {"prompt": columns, "answer": "2"})


def test_null_turn_column_is_ignored(tmp_path: Path) -> None:
    columns = {"name": None, "role": ["user"], "content": ["1+1?"]}
    assert [problem.text for problem in read(tmp_path, {"prompt": columns, "answer": "2"}).problems] == ["1+1?"]


def test_reference_in_parts_is_refused_by_row(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": [{"type": "image_url"}]}
    sentence = refusal(tmp_path, {"messages": [*turns_of("1+1?"), answer]})
    assert "row 1: the last turn of 'messages' holds a part of type 'image_url'" in sentence


def test_different_conversations_are_different_problems(tmp_path: Path) -> None:
    variants = [
        MESSAGES,
        [{"role": "system", "content": "Answer modulo 9."}, *MESSAGES[1:]],
        [*MESSAGES[:1], {"role": "user", "content": "Let x be 6."}, *MESSAGES[2:]],
        [*MESSAGES[:2], {"role": "assistant", "content": "Really?"}, *MESSAGES[3:]],
        [{"role": "user", "content": "Answer modulo 7."}, *MESSAGES[1:]],
        MESSAGES[1:],
        MESSAGES[3:],
        turns_of("What is x", "Fine.", "plus 4?"),
    ]
    loaded = read(tmp_path, *({"prompt": turns, "answer": str(n)} for n, turns in enumerate(variants)))
    assert len({problem.id for problem in loaded.problems}) == len(variants)
    assert loaded.contradictions == () and loaded.duplicates == 0
    assert [loaded.gold[problem.id] for problem in loaded.problems] == [str(n) for n in range(len(variants))]


def test_repeated_conversations_merge_and_contradicting_ones_are_dropped(tmp_path: Path) -> None:
    spaced = [{**turn, "content": f" {turn['content']}\n"} for turn in MESSAGES]
    loaded = read(tmp_path, {"prompt": MESSAGES, "answer": "2"}, {"prompt": spaced, "answer": "2"})
    assert loaded.duplicates == 1 and len(loaded.problems) == 1 and loaded.problems[0].row == 1
    loaded = read(tmp_path, {"prompt": MESSAGES, "answer": "2"}, {"prompt": spaced, "answer": "3"})
    assert loaded.problems == [] and len(loaded.contradictions) == 1


def test_conversations_differing_in_system_turn_share_half() -> None:
    plain = Problem.of("Find $x.$", "rows")
    problem = Problem.of_turns((("system", "Be brief."), ("user", "find x")), "rows")
    assert (
        problem.id != plain.id
        and family_of(problem.id) == family_of(plain.id)
        and half_of(problem.id) == half_of(plain.id)
    )


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user", "content": [{"type": "image_url"}]}], "turn 1 of 'prompt' holds a part of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image"}]}], "a part of type 'image'"),
        ([*turns_of("1+1?"), {"role": "tool", "content": "2"}], "turn 2 of 'prompt' has the role 'tool'"),
        ([*turns_of("a"), {"role": "assistant", "tool_calls": [{"id": 1}]}, *turns_of("b")], "turn 2 of 'prompt' holds tool_calls"),
        ([*turns_of("a"), {"role": "assistant", "content": None}, *turns_of("b")], "turn 2 of 'prompt' (assistant) has no content"),
        (turns_of("1+1?", "2"), "'prompt' ends with a turn of the assistant"),
        ([{"role": "system", "content": "Be brief."}], "does not end with a turn of the user (its last turn is system)"),
        ([{"role": "user", "content": None}], "turn 1 of 'prompt' (user) has no content; give it a text, or remove the row"),
        (turns_of(" "), "turn 1 of 'prompt' is blank"),
        (turns_of("\ud800"), "turn 1 of 'prompt' holds half a surrogate pair"),
        ([{"role": "user", "content": 7}], "turn 1 of 'prompt' holds no text but int"),
    ],
)  # fmt: skip
def test_unsupported_conversation_content_is_refused_by_row(tmp_path: Path, turns: Any, message: str) -> None:
    sentence = refusal(tmp_path, {"prompt": MESSAGES, "answer": "2"}, {"prompt": turns, "answer": "2"})
    assert message in sentence and "row 2" in sentence and "\n" not in sentence


def test_conversation_with_image_or_tool_columns_is_refused(tmp_path: Path) -> None:
    for name in ("images", "tools"):
        sentence = refusal(tmp_path, {"prompt": MESSAGES, "answer": "2", name: [{"bytes": "…"}]})
        assert f"row 1: {name!r} is not empty" in sentence


@pytest.mark.parametrize("print_turns", [str, repr, json.dumps])
def test_conversation_in_python_repr_is_read(tmp_path: Path, print_turns: Any) -> None:
    turns = [{"content": 'It\'s a "sum".\nAdd.', "role": "system"}, {"role": "user", "content": "1+2?", "name": None}]
    loaded = read(tmp_path, {"prompt": print_turns(turns), "answer": "3"})
    assert [problem.turns for problem in loaded.problems] == [(("system", 'It\'s a "sum".\nAdd.'), ("user", "1+2?"))]


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': '1+2?'}\n {'role': 'assistant', 'content': '3'}]",  # numpy
        "array([{'content': '1+2?', 'role': 'user'}], dtype=object)",
        "[{'role': 'user', 'content': Message('1+2?')}]",
    ],
)
def test_text_resembling_conversation_is_refused(tmp_path: Path, text: str) -> None:
    assert "row 1: 'prompt' looks like a list of messages" in refusal(tmp_path, {"prompt": text, "answer": "3"})


def test_problem_about_json_stays_text(tmp_path: Path) -> None:
    for text in (
        "[{'role': 'user'}] is a list. How long is it?",
        '[{"value": 3}, {"value": 4}]',
        "[1, 2]: what is the sum?",
    ):
        assert [problem.text for problem in read(tmp_path, {"problem": text, "answer": "1"}).problems] == [text]


def test_image_column_of_problem_is_refused(tmp_path: Path) -> None:
    row = {"problem": "<image>Find x.", "images": [{"bytes": "…"}], "answer": "3"}
    assert "row 1: 'images' is not empty" in refusal(tmp_path, row)
    assert len(read(tmp_path, {**row, "images": []}).gold) == 1


def test_missing_reference_answer_is_named(tmp_path: Path) -> None:
    rows = ({"messages": turns_of("1+1?", "\\boxed{2}")}, {"messages": turns_of("1+2?")})
    assert 'row 2: the problem has no answer in "the assistant\'s last turn"' in refusal(tmp_path, *rows)
    loaded = read(tmp_path, *rows, need_answers=False)
    assert loaded.gold == {problem_id("1+1?"): "2"} and loaded.without_answer == (problem_id("1+2?"),)


def conversation(*turns: str) -> Problem:
    return Problem.of_turns([(turn["role"], turn["content"]) for turn in turns_of(*turns)], "rows")


def leaks(train: list[Problem], evaluation: list[Problem]) -> list[int]:
    """Positions of the training problems that leak."""
    leaked_ids = {leak.problem_id for leak in find_leaks(train, {"held": evaluation})}
    return [place for place, problem in enumerate(train) if problem.id in leaked_ids]


def test_leaks_compare_user_turns_of_conversation() -> None:
    problem = Problem.of_turns((("system", "Be brief."), ("user", "What is 17 + 45?")), "rows")
    plain = Problem.of("what is 17+45", "rows")
    assert leaks([problem], [plain]) == [0] and leaks([plain], [problem]) == [0]
    checked = [
        conversation("What is 17 + 45?", "61.", "Check that."),
        conversation("What is 3 + 4?", "7.", "Check that."),
    ]
    assert leaks(checked, [plain]) == [0] and leaks([plain], checked) == [0]
    follow_ups = [conversation(f"Let x be {n}.", "Fine.", "What is x plus 4?") for n in (5, 6)]
    assert leaks(follow_ups[:1], follow_ups[1:]) == [] and leaks(follow_ups, follow_ups[:1]) == [0]


def test_shared_few_shot_turns_are_no_leak_and_same_question_is() -> None:
    shots = [LONG, "120 miles.", LONG.replace("noon", "one").replace("sixty", "forty"), "80 miles."]
    train = [conversation(*shots, f"How much is {n} plus {n} for the farmer?") for n in range(4)]
    evaluation = [conversation(*shots, "How much is 3 plus 3 for the farmer?"), conversation(*shots, "Another one?")]
    assert leaks(train, evaluation) == [3]
    assert leaks(train, [Problem.of("How much is 2 plus 2 for the farmer?", "rows")]) == [2]
    reworded = LONG.replace("station at noon", "depot at noon")
    assert leaks([conversation("Hello.", "Hi.", reworded), train[0], train[1]], [Problem.of(LONG, "rows")]) == [0]
