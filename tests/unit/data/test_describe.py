"""What a file of problems holds: columns, the grader that fits its answers, and worked solutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from headwater.config.recipe import Source
from headwater.data.describe import describe, task_of
from headwater.data.sources import load
from headwater.errors import UserError
from headwater.tasks.registry import TASKS


@pytest.mark.parametrize(
    ("cells", "task"),
    [
        (["He has 3 + 4 = 7.\n#### 7", "#### 1,080"], "maths"),
        (["So $x = \\frac{1}{2}$, thus \\boxed{\\frac12}", "\\boxed{\\pi}"], "maths"),
        ([27, 3.5, "12"], "maths"),
        (["B", "(C)", "A, D", "d"], "choice"),
        (["Paris", "the river Seine", "Charles de Gaulle"], "exact"),
        ([{"city": "Paris"}, {"city": "Rome", "rank": 1}], "json"),
        ([{"value": 3.14, "abs": 0.01}], "numeric"),
        ([{"tests": "assert f(1) == 2", "entry_point": "f"}], "python"),
        (["assert f(1) == 2", "def check(candidate):\n    assert candidate(2) == 4"], "python"),
        ([None, "", "B", "A"], "choice"),
    ],
)
def test_task_follows_answers(cells: list[Any], task: str) -> None:
    assert task_of(cells)[0] == task


def test_task_reason_counts_answers() -> None:
    assert task_of(["1", "2", "two"]) == ("maths", "2 of 3 answers hold a number or an expression")


def written(tmp_path: Path, *rows: dict[str, Any]) -> Source:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def test_worked_solutions_are_answers_of_many_words(tmp_path: Path) -> None:
    solution = "Natalia sold 24 clips in May and 72 altogether.\n#### 72"
    description = describe(written(tmp_path, {"question": "How many?", "answer": solution}), "--data")
    assert description.solutions == (solution,)


def test_worked_solutions_are_found_beside_answers(tmp_path: Path) -> None:
    solution = "We add seven and five, which gives twelve in all."
    description = describe(written(tmp_path, {"problem": "7+5", "answer": "12", "solution": solution}), "--data")
    assert (description.solutions, description.reason) == ((solution,), "1 of 1 answers hold a number or an expression")


def test_rows_with_choices_are_graded_as_choices(tmp_path: Path) -> None:
    """The answers are positions, which alone would look like numbers; what `load` makes of them are letters."""
    rows = [
        {"question": f"Who was number {n}?", "choices": ["Ann", "Bob", "Eve", "Dan"], "answer": n % 4} for n in range(8)
    ]
    source = written(tmp_path, *rows)
    description, loaded = describe(source, "--data"), load(source, "--data", True, TASKS["choice"].gold)
    assert (description.task, description.reason[:25]) == ("choice", "8 of 8 rows list choices,")
    assert [loaded.gold[problem.id] for problem in loaded.problems] == ["A", "B", "C", "D"] * 2


def test_short_answers_are_no_worked_solutions(tmp_path: Path) -> None:
    description = describe(written(tmp_path, {"problem": "7+5", "answer": "12"}), "--data")
    assert (description.solutions, description.task) == ((), "maths")


def test_describe_reads_same_answer_columns_as_load(tmp_path: Path) -> None:
    """`label` is read where no usual column is there; beside a conversation with its answer it is a judgement of it."""
    letters = [{"question": f"Which is right in {number}?", "label": "ABCD"[number % 4]} for number in range(8)]
    assert describe(written(tmp_path, *letters), "--data").task == "choice"
    talk = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    assert (
        describe(written(tmp_path, {"messages": talk, "label": "A"}), "--data").reason
        == "no answers were found to choose by"
    )


def test_answer_without_plain_value_is_left_to_loading(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["1+1", "1+2"], "answer": [b"\xff\xfe", b"3"]}), path)
    source = Source(path=str(path))
    assert describe(source, "--data").task == "maths"
    with pytest.raises(UserError, match="row 1: 'answer' holds bytes that are not UTF-8 text"):
        load(source, "--data", True)


def test_empty_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match=r"^--data: none is empty$"):
        describe(Source(path=str(tmp_path / "none.jsonl")), "--data: none")
