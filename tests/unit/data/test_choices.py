"""Multiple choice: choices of every usual shape stand in the problem, and answers become their labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headwater.config.recipe import Columns, Source
from headwater.data.sources import LoadedProblems, load
from headwater.errors import UserError

CITIES = ["Rome", "Paris", "Oslo", "Bern"]
QUESTION = "What is the capital of France?"
SHOWN = f"{QUESTION}\n\nA. Rome\nB. Paris\nC. Oslo\nD. Bern"


def read(tmp_path: Path, *rows: Any, **columns: str) -> LoadedProblems:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": QUESTION, **row}) + "\n" for row in rows), encoding="utf-8")
    return load(Source(path=str(path), columns=Columns(**columns)), "data.labeled", True)


def texts_and_golds(loaded: LoadedProblems) -> list[tuple[str, str | None]]:
    return [(problem.text, loaded.gold.get(problem.id)) for problem in loaded.problems]


@pytest.mark.parametrize(
    "row",
    [
        {"options": CITIES, "answer": "B", "answer_index": 1},
        {"choices": {"text": CITIES, "label": ["A", "B", "C", "D"]}, "answerKey": "(B)"},
        {"options": dict(zip("ABCD", CITIES, strict=True)), "answer": "b"},
        {"options": [f"{label}) {city}" for label, city in zip("ABCD", CITIES, strict=True)], "answer": "B."},
        {"choices": [{"label": label, "text": city} for label, city in zip("ABCD", CITIES, strict=True)], "answer": "B"},
        {"choices": json.dumps(CITIES), "answer": "B) Paris"},
        {**dict(zip("ABCD", CITIES, strict=True)), "answer": "B"},
        {**{f"option_{label}": city for label, city in zip("abcd", CITIES, strict=True)}, "answer": "B"},
        {**{f"op{label}": city for label, city in zip("abcd", CITIES, strict=True)}, "answer": "B"},
    ],
)  # fmt: skip
def test_choices_are_added_to_problem_if_answer_is_label(tmp_path: Path, row: Any) -> None:
    loaded = read(tmp_path, row)
    assert texts_and_golds(loaded) == [(SHOWN, "B")] and loaded.unused == ()


@pytest.mark.parametrize("answer", ["B, D", "b;d", ["B", "D"]])
def test_several_labels_are_kept(tmp_path: Path, answer: Any) -> None:
    rows = ({"question": "Which city?", "options": CITIES, "answer": "A"}, {"options": CITIES, "answer": answer})
    assert texts_and_golds(read(tmp_path, *rows))[1] == (SHOWN, "B, D")


def test_choices_keep_their_own_labels(tmp_path: Path) -> None:
    row = {"choices": {"text": CITIES, "label": ["1", "2", "3", "4"]}, "answerKey": "2"}
    assert texts_and_golds(read(tmp_path, row)) == [(f"{QUESTION}\n\n1. Rome\n2. Paris\n3. Oslo\n4. Bern", "2")]


def test_file_decides_whether_positions_count_from_zero(tmp_path: Path) -> None:
    rows = [{"question": f"Q{n}?", "choices": CITIES, "answer": n % 4} for n in range(6)]
    assert list(read(tmp_path, *rows).gold.values()) == ["A", "B", "C", "D", "A", "B"]
    rows = [{"question": f"Q{n}?", "choices": CITIES, "answer": str(1 + n % 4)} for n in range(6)]
    assert list(read(tmp_path, *rows).gold.values()) == ["A", "B", "C", "D", "A", "B"]
    numbers = [{"question": f"Q{n}?", "choices": ["0", "1", "2", "7"], "answer": n} for n in range(4)]
    assert list(read(tmp_path, *numbers).gold.values()) == ["A", "B", "C", "D"]  # 3 is a position, so all are


@pytest.mark.parametrize(
    ("choices", "answer"),
    [(CITIES, 1), (["2", "4", "6", "8"], 1), (["old", "new", "red", "is"], "3"), (["1", "2", "3"], 1)],
)
def test_open_position_is_refused_by_row(tmp_path: Path, choices: Any, answer: Any) -> None:
    with pytest.raises(UserError, match=rf"row 1: the answer {answer!r} is one of 'choices'.*from 0 or from 1"):
        read(tmp_path, {"choices": choices, "answer": answer})


def test_row_naming_its_choice_otherwise_is_refused(tmp_path: Path) -> None:
    rows = ({"question": "Which city?", "choices": CITIES, "answer": "Oslo"}, {"choices": CITIES, "answer": "B"})
    with pytest.raises(UserError, match=r"row 2: the answer 'B' is one of 'choices', which the problem does not show"):
        read(tmp_path, *rows)


def test_answers_by_value_leave_problem_as_it_is(tmp_path: Path) -> None:
    for options, answer in ((CITIES, "Paris"), (["3", "4", "0"], 4), (["A) 1", "B) 7"], "1"), (CITIES, "Madrid")):
        loaded = read(tmp_path, {"options": options, "answer": answer})
        assert texts_and_golds(loaded) == [(QUESTION, str(answer))]
        assert [unused.column for unused in loaded.unused] == ["options"]


def test_shown_choices_are_not_added_again(tmp_path: Path) -> None:
    for text in (SHOWN, "Which? (A) $2$ (B) $4$ (C) $\\left(6\\right)$"):
        options = CITIES if text == SHOWN else ["A. $2$", "B. $4$", "C. $(6)$"]
        loaded = read(tmp_path, {"question": text, "options": options, "answer": "B"})
        assert texts_and_golds(loaded) == [(text, "B")] and loaded.unused == ()


def test_choice_shown_by_chance_gets_its_label(tmp_path: Path) -> None:
    rows = [{"choices": CITIES, "answer": "B"}, {"question": "Is 2 or 4 larger?", "choices": ["2", "4"], "answer": "B"}]
    assert texts_and_golds(read(tmp_path, *rows)) == [(SHOWN, "B"), ("Is 2 or 4 larger?\n\nA. 2\nB. 4", "B")]


def test_template_places_choices_and_turns_texts_into_labels(tmp_path: Path) -> None:
    rows = [{"article": "Europe.", "question": f"Q{n}?", "options": CITIES, "answer": CITIES[n]} for n in range(2)]
    loaded = read(tmp_path, *rows, problem="{article}\n\n{question}\n{options}")
    lines = "A. Rome\nB. Paris\nC. Oslo\nD. Bern"
    assert texts_and_golds(loaded) == [(f"Europe.\n\nQ0?\n{lines}", "A"), (f"Europe.\n\nQ1?\n{lines}", "B")]
    lettered = [{**row, "answer": "C"} for row in rows]
    assert texts_and_golds(read(tmp_path, *lettered, problem="{article}\n\n{question}"))[0] == (
        f"Europe.\n\nQ0?\n\n{lines}",
        "C",
    )
