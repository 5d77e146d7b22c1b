"""Contamination: copies and near copies of evaluation problems are excluded, shared phrases are not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from headwater.config.recipe import Source
from headwater.data.contamination import Leak, find_leaks, words_of
from headwater.data.sources import LoadedProblems, leak_row, load, without_leaks
from headwater.types import Problem, family_of, letters_and_digits, problem_id

DATA = Path(__file__).parents[4] / "shared" / "data"
LONG = (
    "Jackson's paintbrush makes a narrow strip with a width of $6.5$ millimeters. Jackson has enough paint to make a strip "
    "$25$ meters long. How many square centimeters of paper could Jackson cover with paint?"
)
NAMES = ("cats", "dogs", "hens", "cows", "pigs", "mice", "owls", "bats", "foxes", "goats", "ducks")
PHRASE = "where m and n are relatively prime positive integers, find the value of m + n"


def problems(*texts: str) -> list[Problem]:
    return [Problem.of(text, "here") for text in texts]


def leaks(train: list[Problem], *evaluation: str) -> list[Leak]:
    return find_leaks(train, {"held": problems(*evaluation)})


def shared(name: str) -> LoadedProblems:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here: contamination of the real data was NOT tested")
    return load(Source(path=str(path)), "data", need_answers=True)


def test_words_splits_numbers_and_letter_runs() -> None:
    assert words_of("Find $\\left|2x\\right|$!") == ["find", "2", "x"]
    assert words_of("求x的值") == ["求", "x", "的", "值"]


def test_leaks_finds_exact_copy_despite_punctuation() -> None:
    train = problems("Find $|m|$!", "Find n", "(+)")
    assert leaks(train, "find $\\left| m \\right|$ ?", "(-)") == [
        Leak(train[0].id, "held", "exact", problem_id("find $\\left| m \\right|$ ?"), 1.0)
    ]


def test_leaks_finds_ngram_copy_with_its_share() -> None:
    train = problems(
        LONG + " The original answer is in the form $a \\times b$. Please give the value of $a + b$.", "Find x"
    )
    (leak,) = leaks(train, "Other.", LONG)
    assert (leak.problem_id, leak.why, leak.like) == (train[0].id, "ngram", problem_id(LONG))
    assert leak.share == 1.0  # every word of the shorter text, the evaluation's, stands in the other in runs of 13


def test_leaks_require_half_of_shorter_text() -> None:
    words = LONG.split()
    most, few = " ".join(words[:16]), " ".join(words[:13])
    tail = " and then something else entirely happens to quite a few other painters in town"
    assert [leak.why for leak in leaks(problems(most + tail), LONG)] == ["ngram"]
    assert leaks(problems(few + tail + tail), LONG) == []


def test_leaks_compare_short_texts_whole() -> None:
    assert leaks(problems("What is 2 + 2? Explain why this is so."), "What is 2 + 2?") == []
    assert [leak.why for leak in leaks(problems("what is 2+2"), "What is 2 + 2?")] == ["exact"]
    twelve = "How many of the 12 red apples are left after Ann eats"
    assert leaks(problems(f"{twelve} one?"), twelve) == []
    assert [leak.why for leak in leaks(problems(f"{twelve} 5 now?"), f"{twelve} 5?")] == ["ngram"]


def test_leaks_ignore_common_phrase_but_not_frequent_copy() -> None:
    result = [
        f"Six {name} stand around a table and five of them leave; the odds are m over n, {PHRASE}." for name in NAMES
    ]
    evaluation = f"The area of the largest circle that fits in the figure is m over n, {PHRASE}."
    assert len(NAMES) == 11 and leaks(problems(*result), evaluation) == []
    assert len(leaks(problems(*result[:10]), evaluation)) == 10
    copies = [f"{LONG} {extra}" for extra in "abcdefghijkl"]
    assert {leak.why for leak in leaks(problems(*copies), LONG)} == {"ngram"}
    assert len(leaks(problems(*copies), LONG)) == 12


def test_leaks_name_each_evaluation_and_are_removed_from_all_pools() -> None:
    train = LoadedProblems(
        problems(LONG, "b"), {problem_id(LONG): "1", problem_id("b"): "2"}, rows={problem_id(LONG): (3, 7)}
    )
    evals = {
        "one": LoadedProblems(problems(LONG.upper()), {}),
        "two": LoadedProblems(problems(LONG), {}),
        "three": LoadedProblems([], {}),
    }
    kept = without_leaks(train, evals)
    assert [problem.text for problem in kept.problems] == ["b"] and kept.gold == {problem_id("b"): "2"}
    copies = [(leak.problem_id, leak.eval, leak.why) for leak in kept.leaks]
    assert copies == [(problem_id(LONG), "one", "exact"), (problem_id(LONG), "two", "exact")]
    assert leak_row("data.labeled", kept.leaks[0], kept)["rows"] == [3, 7]


def test_families_join_two_spellings_of_one_problem() -> None:
    assert problem_id("Find $2x$.") == problem_id("Find\n $2 x$ .") and problem_id("1 2") != problem_id("12")
    assert problem_id("1  2") == problem_id("1 2")  # two spaces between digits are still a space
    assert problem_id("cafe\u0301") == problem_id("caf\u00e9")
    near = problem_id("Find $|m|$!"), problem_id("find |m|?")
    assert near[0] != near[1] and family_of(near[0]) == family_of(near[1])
    assert letters_and_digits("$\\left|X\\right|$") == "x" and letters_and_digits("(+)") == "(+)"


def test_leaks_in_dapo_take_seconds() -> None:
    """README: 9 rows of MATH-500 and 11 of AMC23 by exact text, none of AIME. N-grams find as many again, reworded."""
    train = shared("dapo_math_17k/train.jsonl")
    evals = {name: shared(f"{name}/test.jsonl") for name in ("math500", "amc23", "aime24", "aime25", "math")}
    started = time.perf_counter()
    kept = without_leaks(train, evals)
    assert time.perf_counter() - started < 20  # 17k × 5.6k rows; about 2 s on one core of a shared machine
    rows = {
        (name, why): sum(
            len(train.rows[leak.problem_id]) for leak in kept.leaks if (leak.eval, leak.why) == (name, why)
        )
        for name in evals
        for why in ("exact", "ngram")
    }
    assert {name: rows[name, "exact"] for name in ("math500", "amc23", "aime24", "aime25")} == {
        "math500": 9, "amc23": 11, "aime24": 0, "aime25": 0,
    }  # fmt: skip
    assert rows["math", "exact"] >= 1036  # of the README's 1037 rows, one is of a contradictory problem
    assert rows["math500", "ngram"] >= 20 and rows["amc23", "ngram"] >= 20
    texts = {problem.id: problem.text for problem in train.problems}
    reworded = [texts[leak.problem_id] for leak in kept.leaks if (leak.eval, leak.why) == ("amc23", "ngram")]
    assert any("Jackson's paintbrush" in text for text in reworded)
