"""Sources: every shape of file is read, and whatever is wrong with one is said in a sentence that names the place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwater.config.recipe import Columns, Generate, Source
from headwater.data.sources import LoadedProblems, load, without_leaks
from headwater.errors import UserError
from headwater.storage import hub
from headwater.tasks.golds import gold_answer, marked_gold
from headwater.tasks.verifier import Verifier
from headwater.types import problem_id

DATA = Path(__file__).parents[4] / "shared" / "data"


def write(path: Path, *rows: Any) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


def read(source: Source, need_answers: bool = True) -> LoadedProblems:
    return load(source, "data.labeled", need_answers)


def shared(name: str) -> Source:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here: reading the real data was NOT tested")
    return Source(path=str(path))


@pytest.mark.parametrize(
    ("cell", "gold"),
    [
        ("Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72", "72"),
        ("#### 1,080", "1,080"),
        ("So $x = \\boxed{\\frac{1}{2}}$, not \\boxed{3}.", "3"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        (27.0, "27"),
        (0.5, "0.5"),
        (12, "12"),
        (["34"], "34"),
        (float("nan"), None),
        (None, None),
        ("  ", None),
        ("proof", None),  # NuminaMath-1.5
        ("notfound", None),
        ("N/A", None),
        ("#DIV/0!", None),  # Excel
        ("TBD", None),
        ("?", None),
        (0.1 * 3, "0.3"),
        (0.7 + 0.1, "0.8"),
        (1e22, "1e+22"),
        (5e-324, "5e-324"),
        ("<think>maybe \\boxed{5}</think>\nThe answer is 6.", "6"),
        ("<think>#### 5</think>6", "6"),
        ("3+4=7\n#### Total: 7", "7"),
        ("A: -42", "-42"),
        ("Ratio: \\frac{1}{2}", "\\frac{1}{2}"),
        ("Monday: closed", "Monday: closed"),
        ("3: 4", "3: 4"),
        ("NaN", None),
        ("<NA>", None),
        ("None", "None"),
        ("proof by induction", "proof by induction"),
        ("#### ", None),
        ("#### Step 1\nAdd.\n#### Final answer\n42", "42"),
        ("#### Step 1\nAdd both.\n#### Conclusion\nThat makes 42 in all.", None),
        ("Add both.\nThe answer is 42.", "42"),
        ("5+7=12\n#### 12\nThe answer is: 12", "12"),
        ("Add 2 and 3.\nThat makes 5 apples.", None),
        ("so \\boxed{42", None),
        ("先把两个数加起来。\n答案是42。", "42"),
        ("x = 1\ny = 2", "x = 1\ny = 2"),
        ("We add.\n#### Answer: 42", "42"),
        ("We add.\n#### The final answer is $\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("#### 答案:42", "42"),
        ("#### 12, since the answer is in cm", "12, since the answer is in cm"),
        ("#### Etape 1\nOn ajoute trois.\n#### Réponse\n42", "42"),
        ("#### Krok 1\nDodajemy trzy.\n#### Odpowiedź\n42", "42"),
        ("#### Addition\nWe add three.\n#### Final answer\n42", "42"),
    ],
)
def test_gold_answer_is_read_from_each_usual_format(cell: Any, gold: str | None) -> None:
    assert gold_answer(cell) == gold


def test_user_grader_gets_long_texts_unchanged(tmp_path: Path) -> None:
    rubric = "# Rubric\nThe essay must name three causes.\nThe answer is long. " + "word " * 50
    cells = {
        rubric: rubric.strip(),
        "so\n#### 42": "42",
        "\\boxed{7}": "7",
        "#### Part 1\nall of it": "#### Part 1\nall of it",
    }
    assert [marked_gold(cell) for cell in cells] == list(cells.values())
    assert [marked_gold(cell) for cell in (27.0, True, ["x"], None, " ", "####")] == [
        "27",
        "True",
        "x",
        None,
        None,
        None,
    ]
    source = write(tmp_path / "a.jsonl", {"problem": "Grade this.", "answer": rubric})
    assert list(load(source, "data", True, gold=marked_gold).gold.values()) == [rubric.strip()]


def test_usual_columns_are_recognised_and_answer_precedes_solution(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl",
        {"question": "1+1?", "answer": "2", "solution": "\\boxed{3}"},
        {"question": "1+2?", "answer": 3, "solution": ""},
    )
    loaded = read(source)
    assert [problem.text for problem in loaded.problems] == ["1+1?", "1+2?"]
    assert loaded.gold == {problem_id("1+1?"): "2", problem_id("1+2?"): "3"}


def test_columns_can_be_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"q": "1+1?", "a": "2", "problem": "no"})
    loaded = read(source.model_copy(update={"columns": Columns(problem="q", answer="a")}))
    assert loaded.gold == {problem_id("1+1?"): "2"}


def test_json_file_of_indented_object_is_refused_with_remedy(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [{"problem": "1+1", "answer": "2"}]}, indent=2), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"rows\.json: begins with an object over several lines; write a list of objects"
    ):
        read(Source(path=str(path)))


def test_json_parquet_and_saved_folder_give_equal_problems(tmp_path: Path) -> None:
    rows = [{"problem": f"{n}+1?", "answer": str(n + 1)} for n in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    wanted = read(write(tmp_path / "a.jsonl", *rows)).gold
    assert len(wanted) == 5
    assert read(Source(path=str(tmp_path / "a.json"))).gold == wanted
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "folder"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "splits"))
    assert read(Source(path=str(tmp_path / "a.parquet"))).gold == wanted
    assert read(Source(path=str(tmp_path / "folder"))).gold == wanted
    assert read(Source(path=str(tmp_path / "splits"), split="test")).gold == wanted
    with pytest.raises(UserError, match="no split 'train', only test"):
        read(Source(path=str(tmp_path / "splits")))


def test_duplicates_merge_contradictions_drop_and_rows_are_reported(tmp_path: Path) -> None:
    loaded = read(
        write(
            tmp_path / "a.jsonl",
            {"problem": "Find $2 x$.", "answer": "1"},
            {"problem": "Find  $2x$.", "answer": "1"},
            {"problem": "Find y.", "answer": "1"},
            {"problem": "Find y.", "answer": "2"},
            {"problem": "Add 1 2.", "answer": "3"},
            {"problem": "Add 12.", "answer": "12"},
        )
    )
    assert [problem.text for problem in loaded.problems] == ["Find $2 x$.", "Add 1 2.", "Add 12."]
    assert loaded.duplicates == 2
    assert loaded.contradictions == (problem_id("Find y."),)
    assert problem_id("Find y.") not in loaded.gold
    assert loaded.rows[problem_id("Find $2 x$.")] == (1, 2)


def test_answers_equal_by_value_are_no_contradiction(tmp_path: Path) -> None:
    answers = {
        "a": ["1/2", "0.5"],
        "b": ["1,080", "1080", "1080.0"],
        "c": ["2k+2", "2(k+1)"],
        "d": ["1/2", "0.5", "0.51"],
        "e": ["3", "4"],
    }
    rows = [{"problem": f"Find {name}.", "answer": answer} for name, some in answers.items() for answer in some]
    source = write(tmp_path / "a.jsonl", *rows)
    with Verifier("maths", workers=1) as grader:
        loaded = load(source, "data.labeled", True, grader=grader)
    assert list(loaded.gold.values()) == ["1/2", "1,080", "2k+2"]  # the first of each
    assert loaded.contradictions == (problem_id("Find d."), problem_id("Find e."))
    assert len(read(source).contradictions) == 5  # by their texts alone


def test_bridge_prompts_need_no_answers(tmp_path: Path) -> None:
    loaded = read(write(tmp_path / "a.jsonl", {"prompt": "1+1?"}), need_answers=False)
    assert loaded.gold == {} and loaded.without_answer == (problem_id("1+1?"),)


def test_limit_counts_rows_read(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *({"problem": f"{n}?", "answer": "1"} for n in range(9)))
    assert len(read(source.model_copy(update={"limit": 4})).problems) == 4


def test_hash_ranges_divide_file_by_content(tmp_path: Path) -> None:
    """A row's side is that of sha256("part:" + the first six digits of its id): computed here from the definition."""
    rows = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(200)]
    rows += [{"problem": "what is 7 + 7", "answer": "14"}]  # a copy in other punctuation is on the side of its twin
    path, shuffled = tmp_path / "all.jsonl", tmp_path / "shuffled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shuffled.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    low = {p.text for p in read(Source(path=str(path), hash_range=(0.0, 0.2))).problems}
    high = {p.text for p in read(Source(path=str(path), hash_range=(0.2, 1.0))).problems}
    every = {str(row["problem"]) for row in rows}
    expected = {
        text
        for text in every
        if int(hashlib.sha256(f"part:{problem_id(text)[:6]}".encode()).hexdigest()[:12], 16) < 0.2 * 16**12
    }
    assert low == expected and high == every - expected and 20 < len(low) < 60
    assert ("What is 7 + 7?" in low) == ("what is 7 + 7" in low)
    assert {p.text for p in read(Source(path=str(shuffled), hash_range=(0.0, 0.2))).problems} == low
    assert len(read(Source(path=str(path), hash_range=(0.0, 0.2), limit=5)).problems) == 5


def test_hash_range_without_rows_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n')
    with pytest.raises(UserError, match=r"hash_range \[0.0, 1e-06\] keeps none of its 1 rows; widen it"):
        read(Source(path=str(path), hash_range=(0.0, 1e-6)))
    with pytest.raises(ValueError, match="the first bound must be less than the second"):
        Source(path=str(path), hash_range=(0.5, 0.5))


def test_generated_sums_come_from_their_pool() -> None:
    loaded = read(Source(generate=Generate(pool="eval", count=20, dials={"min_terms": 2, "max_terms": 3})))
    assert len(loaded.problems) == len(loaded.gold) == 20
    assert all(
        sum(map(int, problem.text.split("+"))) % 100 == int(loaded.gold[problem.id]) for problem in loaded.problems
    )
    assert {problem.text.count("+") + 1 for problem in loaded.problems} == {2, 3}
    assert {problem.source for problem in loaded.problems} == {"sums:eval"}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"dials": {"min_terms": 5, "max_terms": 2}}, "data.labeled.generate: sums: 2 <= min_terms <= max_terms"),
        ({"dials": {"numbers": 3}}, "data.labeled.generate.dials: sums has no dial 'numbers'; its dials are modulus, min_terms"),
        ({"task": "countdown", "dials": {"numbers": 9}}, "data.labeled.generate: countdown: numbers must lie between 2 and 6"),
        ({"task": "maths"}, "data.labeled.generate.task: 'maths' has no generator; the tasks that have one are sums, countdown"),
    ],
)  # fmt: skip
def test_ungenerable_task_settings_are_refused_by_field(made: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        read(Source(generate=Generate(pool="eval", count=1, **made)))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"problem": "a", "answer": "1"}\n{"problem": \n', "row 2: is not JSON"),
        (b'{"problem": "a", "answer": "1"}\n\n[1]\n', "row 3: is not a JSON object but list"),
        (b'{"text": "a", "answer": "1"}', r"no column problem\|question\|prompt .* columns are text, answer"),
        (b'{"problem": "a", "key": "1"}', r"no column answer\|.* for the answer; its columns are problem, key"),
        (b'{"problem": "a", "answer": "1"}\n{"question": "b", "answer": "1"}', "row 2: has no column 'problem'"),
        (b'{"problem": 5, "answer": "1"}', "row 1: 'problem' is not text but int"),
        (b'{"problem": " ", "answer": "1"}', "row 1: 'problem' is blank"),
        (b'{"problem": "\\ud800", "answer": "1"}', "row 1: 'problem' holds half a surrogate"),
        (b'{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": null}', "row 2: the problem has no answer"),
        (b'{"problem": "a", "answer": ""}\n{"problem": "b", "answer": null}', r"row 1: .* \(2 of 2 rows have none\)"),
        (
            b'{"problem": "a", "answer": ' + b'{"x": ' * 900 + b"1" + b"}" * 900 + b"}",
            "row 1: 'answer' is nested too deeply",
        ),
        (b'{"problem": "a", "answer": {"x": 1}}', "row 1: 'answer' is not an answer but dict"),
        (b'{"problem": "a", "answer": "1"}\n{"problem": "\xff", "answer": "1"}', "row 2: is not UTF-8"),
    ],
)
def test_malformed_data_file_is_refused_in_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read(Source(path=str(path)))
    assert str(caught.value).startswith(f"data.labeled: {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet"])
def test_missing_data_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: no such file"):
        read(Source(path=str(tmp_path / name)))


def test_broken_parquet_and_foreign_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    (tmp_path / "folder").mkdir()
    for name, words in (("a.parquet", "cannot be read as Parquet"), ("folder", "not a folder saved by datasets")):
        with pytest.raises(UserError, match=words):
            read(Source(path=str(tmp_path / name)))


def test_missing_file_suggests_file_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"problem": "a", "answer": "1"})
    with pytest.raises(UserError, match=rf"no such file; did you mean {tmp_path / 'train.jsonl'}\?$"):
        read(Source(path=str(tmp_path / "trian.jsonl")))


def test_hub_error_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\n the hub")

    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(hub, "refuse_absent", lambda field, name, kind: None)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match="some/name: is no file here and cannot be loaded from the hub") as caught:
        read(Source(path="some/name"))
    assert "\n" not in str(caught.value)


def test_leaked_problems_are_removed_despite_punctuation(tmp_path: Path) -> None:
    rows = [{"problem": "Find $|m|$!", "answer": "1"}, {"problem": "b", "answer": "2"}]
    train = read(write(tmp_path / "a.jsonl", *rows))
    test = read(write(tmp_path / "b.jsonl", {"problem": "find $\\left| m \\right|$ ?", "answer": "1"}))
    kept = without_leaks(train, {"held_out": test, "other": LoadedProblems([], {})})
    assert [(leak.eval, leak.problem_id) for leak in kept.leaks] == [("held_out", problem_id("Find $|m|$!"))]
    assert [problem.text for problem in kept.problems] == ["b"] and kept.gold == {problem_id("b"): "2"}
    assert len(train.problems) == 2


def test_dapo_duplicates_contradictions_and_leaks_are_counted() -> None:
    train = read(shared("dapo_math_17k/train.jsonl"))
    evals = {name: read(shared(f"{name}/test.jsonl")) for name in ("math500", "amc23", "aime24", "aime25")}
    assert train.duplicates == 996
    assert len(train.contradictions) == 15
    kept = without_leaks(train, evals)
    exact = [leak for leak in kept.leaks if leak.why == "exact"]
    rows = {name: sum(len(train.rows[leak.problem_id]) for leak in exact if leak.eval == name) for name in evals}
    assert rows == {"math500": 9, "amc23": 11, "aime24": 0, "aime25": 0}
    assert len(kept.problems) == len(train.problems) - len({leak.problem_id for leak in kept.leaks})


@pytest.mark.parametrize(
    ("name", "problems", "example"),
    [
        ("gsm8k/test.jsonl", 1319, "18"),
        ("math500/test.jsonl", 500, "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("math/test.jsonl", 5000, None),
        ("aime24/test.jsonl", 30, "73"),
        ("aime25/test.jsonl", 30, "70"),
        ("amc23/test.jsonl", 40, "27"),
    ],
)
def test_usual_datasets_are_read_unchanged(name: str, problems: int, example: str | None) -> None:
    loaded = read(shared(name))
    assert len(loaded.problems) == len(loaded.gold) == problems
    assert example is None or loaded.gold[loaded.problems[0].id] == example


def test_math_train_lacks_four_answers() -> None:
    source = shared("math/train.jsonl")
    assert len(read(source, need_answers=False).without_answer) == 4
    with pytest.raises(UserError, match=r"row 887: the problem has no answer in 'answer' \(4 of 7474 rows have none\)"):
        read(source)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace")))
def test_arbitrary_file_gives_problems_or_one_sentence(tmp_path: Path, content: bytes) -> None:
    for path in (tmp_path / "a.jsonl", tmp_path / "a.json"):
        path.write_bytes(b'{"problem": "a", "answer": "1"}\n' + content)
        try:
            message = "" if read(Source(path=str(path))).problems else "nothing"
        except UserError as error:
            message = str(error)
        assert "\n" not in message and message != "nothing"
