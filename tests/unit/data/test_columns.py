"""Columns: several that make one problem, those of well-known data sets, and those that a problem may need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headwater.config.recipe import Columns, Source
from headwater.data.sources import LoadedProblems, load
from headwater.data.validate import validate
from headwater.errors import UserError


def write(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path: Path, *rows: Any, need_answers: bool = True, **columns: str) -> LoadedProblems:
    return load(Source(path=write(tmp_path, *rows), columns=Columns(**columns)), "data.labeled", need_answers)


def texts_and_golds(loaded: LoadedProblems) -> list[tuple[str, str | None]]:
    return [(problem.text, loaded.gold.get(problem.id)) for problem in loaded.problems]


@pytest.mark.parametrize(
    ("row", "text", "gold"),
    [
        ({"ID": "1", "Body": "A pack costs 76.", "Question": "Two packs?", "Answer": 152.0}, "A pack costs 76. Two packs?", "152"),
        ({"instruction": "Sum them.", "input": "1, 2", "output": "3"}, "Sum them.\n\n1, 2", "3"),
        ({"instruction": "1+2?", "input": "", "output": "3"}, "1+2?", "3"),
        ({"instruction": "1+2?", "output": "3"}, "1+2?", "3"),
        ({"prompt": {"messages": [{"role": "user", "content": "1+2?"}]}, "gold": "3"}, "1+2?", "3"),
        ({"input": {"messages": [{"role": "user", "content": "1+2?"}]}, "target": 3}, "1+2?", "3"),
        ({"input": "1+2?", "target": "3"}, "1+2?", "3"),
        ({"query": "1+2?", "response": "Add.\nThe answer is: 3", "original_question": "1+1?"}, "1+2?", "3"),
        ({"problem_statement": "1+2?", "final_answer": "3"}, "1+2?", "3"),
        ({"question_title": "Sum", "question_content": "1+2?", "label": 3}, "1+2?", "3"),
        ({"Question": "1+2?", "Correct Answer": "3", "Incorrect Answer 1": "4"}, "1+2?", "3"),
        ({"prompt": "1+2?", "completion": [{"role": "assistant", "content": "so \\boxed{3}"}]}, "1+2?", "3"),
        ({"prompt": "1+2?", "completion": "3", "label": True}, "1+2?", "3"),  # KTO: the label is a judgement
    ],
)  # fmt: skip
def test_columns_of_usual_datasets_need_no_names(tmp_path: Path, row: Any, text: str, gold: str) -> None:
    loaded = read(tmp_path, row)
    assert texts_and_golds(loaded) == [(text, gold)]
    assert loaded.unused == ()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"problem_statement": "1+1?", "instruction": "Add.", "answer": "2"},
            "'problem_statement' and 'instruction' could both be the problem",
        ),
        (
            {"problem": "1+1?", "label": 2, "output": "3"},
            "'label' and 'output' could both be the answer; name the column in columns.answer",
        ),
    ],
)
def test_two_possible_columns_are_both_named(tmp_path: Path, row: Any, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, row)
    assert sentence in str(refused.value)


def test_responses_of_unlabeled_prompts_are_no_answers(tmp_path: Path) -> None:
    rows = ({"prompt": "1+1?", "response": "2"}, {"prompt": "1+1?", "response": "3"})
    path = write(tmp_path, *rows)
    loaded = load(Source(path=path), "data.unlabeled", False, further_answers=())
    assert texts_and_golds(loaded) == [("1+1?", None)] and loaded.contradictions == ()
    assert len(load(Source(path=path), "data.labeled", False).contradictions) == 1


# Templates of columns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "template", "text"),
    [
        ({"context": "Built 1842.", "question": "When?"}, "{context}\n\n{question}", "Built 1842.\n\nWhen?"),
        ({"context": None, "question": "When?"}, "{context}\n\n{question}", "When?"),
        ({"q": {"stem": "When?"}, "n": 2.5}, "{q.stem} Use {n}.", "When? Use 2.5."),
        ({"nums": [44, 19, 35]}, "Make 98 of {nums}.", "Make 98 of [44, 19, 35]."),
        ({"{a}": "When?", "a": "no"}, "{a}", "When?"),  # a column of this very name
    ],
)
def test_template_joins_columns(tmp_path: Path, row: Any, template: str, text: str) -> None:
    assert texts_and_golds(read(tmp_path, {**row, "answer": "1"}, problem=template)) == [(text, "1")]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"c": "a"}, "row 2: has no column 'q'; its columns are c, answer"),
        ({"c": "", "q": " "}, "row 2: 'c' and 'q' are blank"),
        ({"c": {"title": ["a"]}, "q": "When?"}, "row 2: 'c' is not text but dict"),
        ({"c": "\ud800", "q": "When?"}, "half a surrogate pair"),
    ],
)
def test_template_refuses_other_cells_by_row(tmp_path: Path, row: Any, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, {"c": "a", "q": "b", "answer": "1"}, {**row, "answer": "1"}, problem="{c} {q}")
    assert sentence in str(refused.value)


def test_template_with_unknown_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no column 'contxt'; its columns are context, question, answer"):
        read(tmp_path, {"context": "a", "question": "b", "answer": "1"}, problem="{contxt} {question}")


# Columns that are not read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "named", "template"),
    [
        ({"context": "Built 1842.", "question": "When?"}, "context", '"{context}\\n\\n{question}"'),
        ({"passage": "Built 1842.", "Question": "When?"}, "passage", '"{passage}\\n\\n{Question}"'),
        ({"article": ["Built", "1842."], "problem": "When?"}, "article", '"{article}\\n\\n{problem}"'),
        ({"question": "When?", "input": "Built 1842."}, "input", '"{question}\\n\\n{input}"'),
        ({"question": "Who?", "options": ["Ann", "Bob"], "answer": "Ann"}, "options", '"{question}\\n\\n{options}"'),
    ],
)
def test_unread_context_is_named_with_remedy(tmp_path: Path, row: Any, named: str, template: str) -> None:
    loaded = read(tmp_path, {"answer": "1842", **row}, {"answer": "7", **row, named: None}, {"answer": "8", **row})
    (unused,) = loaded.unused
    assert f"column {named!r} holds text in 2 of 3 rows and is not read" in unused.evidence
    assert f"set data.labeled.columns.problem to {template} to read both" in unused.remedy(
        "data.labeled.columns.problem"
    )


def test_template_silences_unread_columns(tmp_path: Path) -> None:
    row = {"context": "Built 1842.", "question": "When?", "answer": "1842"}
    assert [unused.column for unused in read(tmp_path, row, problem="question").unused] == ["context"]
    assert read(tmp_path, row, problem="{question}").unused == ()


def test_other_problem_column_is_named_if_different(tmp_path: Path) -> None:
    row = {"problem": "1+1?", "answer": "2"}
    for same in ("1 + 1 ?", "Solve this: 1+1? Use a box.", [{"role": "user", "content": "x"}], "", None):
        assert read(tmp_path, {**row, "prompt": same}).unused == ()
    (unused,) = read(tmp_path, {**row, "prompt": "2+2?"}).unused
    assert unused.remedy("--problem") == "name the right one in --problem: problem or prompt"
    assert read(tmp_path, {**row, "prompt": "2+2?"}, problem="problem").unused == ()


def test_validate_reports_unread_context(tmp_path: Path) -> None:
    path = write(tmp_path, {"context": "Built 1842.", "question": "When?", "answer": "1842"})
    (sentence,) = validate(Source(path=path), workers=1).warnings
    assert sentence.startswith(f"{path}: column 'context' holds text in 1 of 1 rows") and "--problem" in sentence
