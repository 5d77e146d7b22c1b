"""Tasks exact, numeric, choice, regex and json: extraction, equality, bounded time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from headwater.config.recipe import Source
from headwater.data.sources import load
from headwater.data.validate import grade_file, validate
from headwater.tasks.choice import letters_of
from headwater.tasks.golds import cell_as_is
from headwater.tasks.json_fields import holds, last_object
from headwater.tasks.numeric import read_gold
from headwater.tasks.registry import TASKS, find_task
from headwater.tasks.verifier import Verifier

Case = tuple[str, str, bool, str]

EXACT: list[Case] = [
    ("Paris", "Paris", True, "equal"),
    ("New York", "I think \\boxed{New\n  York}", True, "equal"),
    ("Paris", "The answer is Paris.", True, "equal"),
    ("Paris", "<think>\\boxed{Rome}</think> #### Paris", True, "equal"),
    ("Paris", "paris", False, "different"),
    ("Paris", "It is Paris", False, "different"),
    ("a #### b", "a #### b", True, "equal"),
    ("the answer is 3", "the answer is 3", True, "equal"),
    ("caf\u00e9", "cafe\u0301", True, "equal"),
    ("x", "\\boxed{x", False, "truncated"),
    ("x", "  \n", False, "no_answer"),
    ("", "anything", False, "different"),
]
NUMERIC: list[Case] = [
    ("3.14", "3.14", True, "equal"),
    ("3.14", "\\boxed{3.140001}", True, "equal"),
    ("3.14", "\\boxed{3.1415}", False, "different"),
    ("3.14 ± 0.01", "about \\boxed{22/7}", True, "equal"),
    ("3.14 +/- 0.001", "\\boxed{22/7}", False, "different"),
    ("250 \\pm 2\\%", "The answer is 255 km.", True, "equal"),
    ("250 ± 2%", "The answer is 255.1", False, "different"),
    ('{"value": 9.81, "abs": 0.01, "rel": 0.01}', "#### 9.9", True, "equal"),
    ('{"value": "1e3", "abs": 0}', "\\boxed{1000}", True, "equal"),
    ('{"value": -2, "rel": 0.5}', "\\boxed{-2.9}", True, "equal"),
    ("1,080", "\\boxed{1080\\text{ m}}", True, "equal"),
    ("1/3", "\\boxed{0.3333333}", True, "equal"),
    ("9.8", "The answer is 9.8 m/s^2.", True, "equal"),
    ("9.8", "\\boxed{9.8\\ m}", True, "equal"),
    ("9.8", "\\boxed{9.8\\ x}", False, "different"),
    ("9.8", "\\boxed{9.8\\ k}", False, "different"),
    ("9.8", "\\boxed{9.8 million}", False, "different"),
    ("3", "\\boxed{3 or 4}", False, "different"),
    ("0", "\\boxed{0.0000001}", False, "different"),
    ("5", "there are 5 of them", False, "no_answer"),
    ("5", "\\boxed{five or so}", False, "different"),
    ("5", "\\boxed{5", False, "truncated"),
    ("five", "5", False, "error"),
    ('{"value": 1e999999999}', "1", False, "error"),
    ('{"value": NaN}', "1", False, "error"),
    ('{"value": 1, "tolerance": 2}', "1", False, "error"),
    ('{"value": 1, "abs": -1}', "1", False, "error"),
]
CHOICE: list[Case] = [
    ("B", "B", True, "equal"),
    ("(B)", "b", True, "equal"),
    ("B", "The answer is (B) Paris.", True, "equal"),
    ("B", "Answer: **B**", True, "equal"),
    ("B", "\\boxed{\\text{B}}", True, "equal"),
    ("B", "Long thought.\n\nB.", True, "equal"),
    ("B", "I would choose option B here, since A is wrong.", True, "equal"),
    ("C", "The answer is C because it rains.", True, "equal"),
    ("A", "The answer is A because it rains.", True, "equal"),
    ("A", "The answer is A good idea.", False, "no_answer"),
    ("B", "The answer is B or C.", False, "different"),
    ("B", "\\boxed{B, C}", False, "different"),
    ("A, C", "\\boxed{C and A}", True, "equal"),
    ("A, C", "\\boxed{A}", False, "different"),
    ("B", "The answer is not B.", False, "no_answer"),
    ("B", "<think>Answer: B</think>Answer: D", False, "different"),
    ("B", "Because of reasons.", False, "no_answer"),
    ("B", "\\boxed{B", False, "truncated"),
    ("none", "B", False, "error"),
]
REGEX: list[Case] = [
    ("(?i)paris|lutetia", "The answer is Paris.", True, "equal"),
    (r"\d{4}-\d\d", "\\boxed{2024-05}", True, "equal"),
    (r"\d{4}-\d\d", "\\boxed{on 2024-05}", False, "different"),
    ("(?s).*yes.*", "well\nyes\nindeed", True, "equal"),
    ('{"pattern": "a+", "example": "aa"}', "aaa", True, "equal"),
    (r"\{\d+\}", "{12}", True, "equal"),
    ("(unclosed", "anything", False, "error"),
    ("a", "", False, "no_answer"),
]
JSON: list[Case] = [
    ('{"city": "Paris"}', 'Here: {"city": "Paris", "sure": true}', True, "equal"),
    ('{"a": 1}', '```json\n{"a": 1.0}\n```', True, "equal"),
    ('{"a": 1}', '{"a": true}', False, "different"),
    ('{"a": 1}', '{"a": 1} or rather {"a": 2}', False, "different"),
    ('{"a": {"b": [1, "x  y"]}}', '{"a": {"b": [1, "x y"], "c": 0}}', True, "equal"),
    ('{"a": [1, 2]}', '{"a": [2, 1]}', False, "different"),
    ('{"a": [1]}', '{"a": [1, 2]}', False, "different"),
    ('{"a": null}', "{}", False, "different"),
    ('{"a": 1}', '```json\n{"a": 1}\n```\nI am {sure}.', True, "equal"),
    ('{"a": 1}', 'the set {1, 2} and {"a": 1}', True, "equal"),
    ('{"a": 1}', '{"a": 1', False, "truncated"),
    ('{"a": 1}', "none", False, "no_answer"),
    ("{}", "{}", False, "error"),
    ("[1]", "[1]", False, "error"),
    ('{"a": NaN}', '{"a": NaN}', False, "error"),
]
CASES = (("exact", EXACT), ("numeric", NUMERIC), ("choice", CHOICE), ("regex", REGEX), ("json", JSON))


@pytest.mark.parametrize(
    ("task", "case"),
    [(name, case) for name, cases in CASES for case in cases],
)
def test_each_answer_form_gets_its_verdict(task: str, case: Case) -> None:
    gold, completion, correct, reason = case
    assert TASKS[task].grade(gold, completion) == (correct, reason)


GOLDS = {
    "exact": ["Paris", "a #### b", "\\boxed{x}", "no. 5: the answer is maybe"],
    "numeric": ["3.14", "3.14 ± 0.01", "-1/3", '{"value": 2.5, "rel": 0.1}', "6\\times 10^{23}"],
    "choice": ["A", "(j)", "B, D", "C) Paris"],
    "regex": [
        "[a-c]{2}-(x|y)",
        r"(\w+) \1",
        "(?i)yes|no",
        r"[^a-z\d]+?\.",
        ".*",
        '{"pattern": "(?=a)a", "example": "a"}',
    ],
    "json": ['{"a": 1, "b": [true, null]}', '{"x": {"y": "`z`"}}'],
}


@pytest.mark.parametrize("task", sorted(GOLDS))
def test_each_gold_grades_correct_for_its_own_completion_only(task: str) -> None:
    golds = [gold for gold in GOLDS[task] if gold not in (".*",)]
    with Verifier(task, workers=1) as verifier:
        own = verifier([(gold, str(TASKS[task].as_completion(gold))) for gold in GOLDS[task]])
        others = verifier([(a, str(TASKS[task].as_completion(b))) for a in golds for b in golds if a != b])
    assert [verdict.reason for verdict in own] == ["equal"] * len(own)
    assert not any(verdict.correct for verdict in others) or task == "numeric"  # 3.14 is within 3.14 ± 0.01


def test_catastrophic_pattern_is_killed_without_delaying_others() -> None:
    started = time.monotonic()
    with Verifier("regex", workers=1, seconds=0.5) as verifier:
        verdicts = verifier([("(a+)+b", "a" * 40), ("a", "a"), ("(x+x+)+y", "x" * 60), ("b", "b")])
    assert [verdict.reason for verdict in verdicts] == ["timeout", "equal", "timeout", "equal"]
    assert time.monotonic() - started < 20


def test_hostile_texts_are_graded_in_time_in_process() -> None:
    hostile = [
        "{" * 50_000,
        '{"a":' * 10_000,
        "A " * 50_000,
        "9" * 100_000,
        "\\boxed{" * 20_000,
        "```\n" * 20_000,
        "(" * 50_000,
    ]
    for name in ("exact", "numeric", "choice", "json"):
        for text in hostile:
            started = time.process_time()
            correct, _ = TASKS[name].grade({"numeric": "5", "json": '{"a": 1}'}.get(name, "B"), text)
            assert not correct
            assert time.process_time() - started < 2.0, (name, text[:10])


def test_extract_returns_one_spelling_for_votes() -> None:
    for name, first, other in (
        ("numeric", "\\boxed{1/2}", "The answer is 0.50."),
        ("choice", "\\boxed{C and A}", "Answer: A, C"),
        ("json", '{"a": 1, "b": 2}', '{"b": 2, "a": 1}'),
        ("exact", "\\boxed{New  York}", "New York"),
        ("regex", "\\boxed{x}", "x"),
    ):
        extract = TASKS[name].extract
        assert extract is not None
        assert extract(first) == extract(other) is not None


def test_task_helpers_by_hand() -> None:
    assert letters_of("B) Paris") == "B" and letters_of("(C) and A") == "A,C" and letters_of("A good idea") is None
    assert last_object('so {"a": 1} or rather {"a": {"b": 2}}.') == {"a": {"b": 2}}
    assert holds({"a": 1.0, "b": 2}, {"a": 1}) and not holds({"a": True}, {"a": 1})
    gold = read_gold("250 ± 2%")
    assert gold is not None and (gold.value, gold.margin) == (250, 5)
    assert cell_as_is({"a": 1}) == '{"a": 1}' and cell_as_is(float("nan")) is None and cell_as_is(" ") is None
    assert find_task("regex").as_completion("(?!a)b") is None


def rows_of(path: Path, *rows: dict[str, Any]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


def test_validate_names_unusable_gold_answers(tmp_path: Path) -> None:
    """A pattern with #### or \\boxed is not cut as a mathematics answer would be; an object may stand there as it is."""
    patterns = rows_of(
        tmp_path / "r.jsonl",
        {"problem": "p", "answer": "####x"},
        {"problem": "q", "answer": "(open"},
        {"problem": "r", "answer": "(?!z)y"},
        {"problem": "s", "answer": "(?!z).*"},
    )
    report = validate(patterns, "regex", workers=1)
    # The last two look around, so no example can be made; the pattern that a mere "-" satisfies is named.
    assert [(gold, reason) for _, gold, reason in report.failed] == [("(open", "error"), ("(?!z).*", "passes_blank")]
    objects = rows_of(
        tmp_path / "j.jsonl", {"problem": "p", "answer": {"city": "Paris"}}, {"problem": "q", "answer": "{}"}
    )
    assert [gold for _, gold, _ in validate(objects, "json", workers=1).failed] == ["{}"]
    assert load(objects, "data", need_answers=True, gold=cell_as_is).gold != {}


def test_grade_command_accepts_gold_as_json_object(tmp_path: Path) -> None:
    rows_of(tmp_path / "g.jsonl", {"id": 1, "gold": {"a": 1}, "completion": '{"a": 1}'})
    assert [row["correct"] for row in grade_file(tmp_path / "g.jsonl", task="json", workers=1)] == [True]


DOCS = Path(__file__).parents[3] / "docs" / "tasks.md"


def test_documentation_examples_are_correct(tmp_path: Path) -> None:
    text = DOCS.read_text(encoding="utf-8")
    examples = [json.loads(line) for line in text.partition("```jsonl\n")[2].partition("\n```\n\n")[0].splitlines()]
    assert {example["task"] for example in examples} == TASKS.keys()
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(example), encoding="utf-8")
        assert [
            (row["correct"], row["reason"]) for row in grade_file(path, task=example["task"], workers=1, seconds=20)
        ] == [(True, "equal")], example
    assert all(f"| `{name}` |" in text for name in TASKS)
