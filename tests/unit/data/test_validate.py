"""Commands `grade` and `validate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwater.config.recipe import Source
from headwater.data.validate import grade_file, validate
from headwater.errors import UserError

DATA = Path(__file__).parents[4] / "shared" / "data"


def test_rows_keep_order_and_ids(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "gold": "1/2", "completion": "\\boxed{0.5}"},
        {"id": 7, "gold": "2k+2", "completion": "\\boxed{2(k+1)}"},
        {"gold": 3, "completion": "The answer is 4."},
        {"id": "d", "gold": "3", "completion": "\\boxed{3"},
        {"id": "e", "gold": "3", "completion": "three\u2028?"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    graded = list(grade_file(path))
    assert [(row["id"], row["correct"], row["reason"]) for row in graded] == [
        ("a", True, "equal"), (7, True, "equal"), (3, False, "different"), ("d", False, "truncated"),
        ("e", False, "no_answer"),
    ]  # fmt: skip
    assert all(set(row) == {"id", "correct", "reason", "seconds"} and 0 <= row["seconds"] < 3 for row in graded)


def test_rows_before_broken_row_are_yielded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"id": 1, "gold": "47", "completion": "=47"})
    path.write_text((good + "\n") * 600 + "{broken\n")
    graded = grade_file(path, task="sums")
    seen = []
    with pytest.raises(UserError, match="row 601: is not JSON"):
        seen.extend(row["correct"] for row in graded)
    assert seen == [True] * 600


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ('{"id": 1, "completion": "x"}', "row 1: has no 'gold'; its fields are id, completion"),
        ('{"gold": "1", "completion": null}', "row 1: 'completion' is not text but NoneType"),
        ('{"gold": ["1"], "completion": "x"}', "row 1: 'gold' is not text but list"),
        ("", "is empty"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, row: str, sentence: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row)
    with pytest.raises(UserError, match=sentence):
        list(grade_file(path))


def test_validate_lists_gold_refused_by_grader(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text('{"problem": "17+30", "answer": "47"}\n{"problem": "17+31", "answer": "forty-eight"}\n')
    result = validate(Source(path=str(path)), task="sums")
    assert result.total == 2 and not result.ok
    assert [(gold, reason) for _, gold, reason in result.failed] == [("forty-eight", "no_answer")]


@pytest.mark.parametrize("answers", [[None, ""], ["Add both.\nThat makes two of them."], ["3", "4"]])
def test_source_without_gold_answers_is_invalid(answers: list[str | None], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"problem": "1+2?", "answer": answer}) + "\n" for answer in answers))
    result = validate(Source(path=str(path)))
    assert (result.total, result.failed, result.ok) == (0, [], False)


@pytest.mark.parametrize(
    ("name", "total", "empty"),
    [
        ("gsm8k/train", 7473, 0), ("gsm8k/test", 1319, 0), ("math/train", 7469, 4), ("math/test", 5000, 0),
        ("math500/test", 500, 0), ("aime24/test", 30, 0), ("aime25/test", 30, 0), ("amc23/test", 40, 0),
        ("dapo_math_17k/train", 16906, 0),
    ],
)  # fmt: skip
def test_every_gold_answer_of_usual_datasets_grades_correct(name: str, total: int, empty: int) -> None:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here: its gold answers were NOT validated")
    result = validate(Source(path=str(path)))
    assert result.failed == []
    assert (result.total, len(result.without_answer)) == (total, empty)


def test_every_changed_gold_answer_grades_wrong(tmp_path: Path) -> None:
    path = DATA / "math500" / "test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here: changed gold answers were NOT graded")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        gold = json.loads(line)["answer"]
        place = next((place for place, char in enumerate(gold) if char.isdigit()), None)
        if place is not None:  # the first digit, one more
            changed = f"{gold[:place]}{(int(gold[place]) + 1) % 10}{gold[place + 1 :]}"
            rows.append({"gold": gold, "completion": f"\\boxed{{{changed}}}"})
    target = tmp_path / "changed.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    graded = list(grade_file(target))
    assert len(graded) > 400
    assert [row for row, verdict in zip(rows, graded, strict=True) if verdict["correct"]] == []
