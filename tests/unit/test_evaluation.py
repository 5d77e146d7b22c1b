"""Evaluation of several models: strict reading, result files, and the paired comparison of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headwater import evaluation, evaluation_files
from headwater.errors import UserError
from headwater.evaluation import EvaluationSettings, evaluate_models, summarize
from headwater.runs.progress import progress_display
from headwater.tasks.sums import generate
from headwater.tasks.verifier import Verifier


def row_of(problem: str, text: str, correct: bool) -> dict[str, Any]:
    return {"problem_id": problem, "text": text, "correct": correct, "reason": "", "finish": "stop", "extracted": None}


def test_strict_reading_counts_only_answers_in_form_of_prompt() -> None:
    rows = [
        row_of("a", "#### 4", True),
        row_of("a", "The answer is 4.", True),
        row_of("b", "#### 7", False),
        row_of("b", "#### 8\nSo the answer is 8.", True),
    ]
    with Verifier("maths") as grade:
        evaluation._add_strict_verdicts(rows, "hashes", {"a": "4", "b": "8"}, grade)
    assert [row["strict"] for row in rows] == [True, False, False, True]
    measures = summarize(rows, votes=False).measures
    assert (measures["avg@2"].mean, measures["strict avg@2"].mean) == (0.75, 0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    for name, first, count in (("one.jsonl", 0, 6), ("two.jsonl", 6, 4)):
        pairs = generate(10, "eval", 0)[first : first + count]
        lines = [json.dumps({"problem": problem, "answer": answer}) for problem, answer in pairs]
        (folder / name).write_text("\n".join(lines))
    return [str(folder / "one.jsonl"), str(folder / "two.jsonl")]


GREEDY = EvaluationSettings(task="sums", temperature=0.0, max_tokens=40, batch=3)


def test_several_models_and_data_sets_equal_single_evaluations(data: list[str], tmp_path: Path) -> None:
    models, display = ["pocket:qwen3-student", "pocket:llama-student"], progress_display(quiet=True)
    together = evaluate_models(models, data, GREEDY, display)
    assert [(each.model, each.data, each.problems) for each in together] == [
        (model, path, count) for model in models for path, count in zip(data, (6, 4), strict=True)
    ]
    (alone,) = evaluate_models(models[1:], data[1:], GREEDY, display)
    assert alone.rows == together[3].rows
    other_seed = EvaluationSettings(**{**vars(GREEDY), "seed": 1, "batch": 256})
    assert evaluate_models(models[:1], data[:1], other_seed, display)[0].rows == together[0].rows  # greedy: no draws
    evaluation_files.write(tmp_path / "all.json", together)
    table = evaluation_files.text(together).splitlines()
    assert len(table) == 5 and table[0].split()[:3] == ["model", "data", "problems"]
    itself = evaluation_files.compare(tmp_path / "all.json", tmp_path / "all.json")
    assert [(row.first_model, row.problems, row.difference, row.p) for row in itself] == [
        (model, count, 0.0, 1.0) for count in (6, 4) for model in models
    ]


def result_file(path: Path, model: str, correct: list[float], strict: list[float] | None = None) -> Path:
    by_problem = {f"p{index}": {"correct": share} for index, share in enumerate(correct)}
    for index, share in enumerate(strict or []):
        by_problem[f"p{index}"]["strict"] = share
    path.write_text(json.dumps({"model": model, "data": f"/{model}/test.jsonl", "by_problem": by_problem}))
    return path


def test_comparison_pairs_problems_of_both_readings(tmp_path: Path) -> None:
    """Of the three problems in both, the second model solves two that the first does not: +2/3; of 2² sign patterns half."""
    first = result_file(tmp_path / "a.json", "a", [0.0, 0.0, 1.0], [0.0, 0.0, 0.0])
    second = result_file(tmp_path / "b.json", "b", [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    lenient, strict = evaluation_files.compare(first, second)
    assert (lenient.reading, lenient.problems, lenient.first, lenient.second) == (
        "lenient",
        3,
        pytest.approx(1 / 3),
        1.0,
    )
    assert (lenient.difference, lenient.p) == (pytest.approx(2 / 3), 0.5)
    assert lenient.low < lenient.difference < lenient.high
    assert (strict.reading, strict.difference, strict.p) == ("strict", 1.0, 0.25)
    reverse, _ = evaluation_files.compare(second, first)
    assert (reverse.difference, reverse.low, reverse.high) == (-lenient.difference, -lenient.high, -lenient.low)
    assert "+66.7 points" in evaluation_files.comparison_text([lenient])


def test_comparison_refuses_other_files_and_disjoint_problems(tmp_path: Path) -> None:
    good, other = result_file(tmp_path / "a.json", "a", [1.0]), tmp_path / "b.json"
    for text in (
        "{",
        "[]",
        "{}",
        '{"evaluations": 3}',
        good.read_text().replace("1.0", "7"),
        good.read_text().replace("1.0", "NaN"),
    ):
        other.write_text(text)
        with pytest.raises(UserError, match=r"b\.json is not a result of `headwater eval --save`"):
            evaluation_files.compare(good, other)
    other.write_text(good.read_text().replace("p0", "p1"))
    with pytest.raises(UserError, match="no problem is in both"):
        evaluation_files.compare(good, other)
    other.write_text(json.dumps({"evaluations": [json.loads(good.read_text())] * 2}))
    with pytest.raises(UserError, match=r"holds 1 models on test.jsonl and .* 2"):
        evaluation_files.compare(good, other)


def test_unknown_form_is_refused(data: list[str]) -> None:
    with pytest.raises(UserError, match="form 'hash' is unknown; did you mean hashes"):
        evaluate_models(["pocket:qwen3-student"], data, EvaluationSettings(form="hash"), progress_display(quiet=True))
