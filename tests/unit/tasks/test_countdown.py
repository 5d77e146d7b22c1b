"""Countdown task: generator, disjoint pools, grader, hostile text."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.config.builtin import builtin_text
from headwater.tasks.countdown import (
    DIALS,
    CountdownDials,
    as_completion,
    extract,
    generate,
    grade,
    parse_problem,
    parse_terms,
    pool_of,
)
from headwater.tasks.pools import POOLS
from headwater.tasks.registry import TASKS
from runs import call
from tools.pretrain.solutions import countdown_is_worked as is_worked
from tools.pretrain.solutions import countdown_short as short
from tools.pretrain.solutions import countdown_worked as worked

FOUR = CountdownDials(numbers=4, largest=120)


def test_countdown_solutions_have_documented_text() -> None:
    # 50+46+24=120 and 50+46-24=72 miss; 50-46+24=28 hits
    assert worked("50,46,24=28") == "50+46+24=96+24=120;50+46-24=96-24=72;50-46+24=04+24=28"
    assert short("50,46,24=28") == "50-46+24"
    assert short("95,80,09=06") == "95-80-09"
    assert is_worked(worked("50,46,24=120")) and not is_worked("50+46+24")
    # with four numbers a step may fall below 0: 9-8-7 is -6
    assert worked("9,8,7,6=0", CountdownDials(numbers=4, largest=9)).split(";")[-1] == "9-8-7+6=1-7+6=-6+6=0"
    with pytest.raises(ValueError, match="no solution that begins with"):
        worked("50,46,24=1")
    with pytest.raises(ValueError, match="is no problem such as"):
        short("50+46")


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dials", [DIALS, FOUR, CountdownDials(numbers=2, largest=999)])
def test_countdown_gold_grades_one_in_both_forms_and_wrong_sign_zero(pool: str, dials: CountdownDials) -> None:
    for problem, gold in generate(40, pool, seed=1, dials=dials):
        assert problem == gold
        numbers, target = parse_problem(gold)  # type: ignore[misc]
        for completion in (
            worked(problem, dials),
            short(problem, dials),
            as_completion(gold),
            f" {short(gold, dials)}\n",
        ):
            assert grade(gold, completion) == (True, "equal")
        for signs in product((1, -1), repeat=len(numbers)):  # every expression, right where its value is the target
            value = sum(sign * number for sign, number in zip(signs, numbers, strict=True))
            text = "".join(f"{'+' if sign > 0 else '-'}{number}" for sign, number in zip(signs, numbers, strict=True))
            assert grade(gold, text) == ((True, "equal") if value == target else (False, "different"))


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("50-46+24", (True, "equal")),
        ("24+50-46", (True, "equal")),  # any order
        ("-46+24+50", (True, "equal")),
        ("50+46+24=96+24=120;50-46+24", (True, "equal")),  # the last attempt counts
        ("50-46+24=99", (True, "equal")),  # steps are the writer's own affair
        ("50-46+24;50+46-24", (False, "different")),  # the last attempt counts
        ("50-22", (False, "different")),  # other numbers
        ("28", (False, "different")),
        ("50-46+24+50-50", (False, "different")),  # a number twice
        ("50-46+24+0", (False, "different")),
        ("4+24", (False, "different")),  # one left out
        ("50-46+24;", (False, "no_answer")),
        ("50--46+24", (False, "no_answer")),
        ("(50-46)+24", (False, "no_answer")),
        ("50-46+24.0", (False, "no_answer")),
        ("50 - 46 + 24", (False, "no_answer")),
        ("50,46,24=28", (False, "no_answer")),  # the problem back
        ("", (False, "no_answer")),
    ],
)
def test_countdown_answer_uses_each_number_once_and_makes_target(completion: str, outcome: tuple[bool, str]) -> None:
    assert grade("50,46,24=28", completion) == outcome


def test_countdown_repeated_number_is_used_twice() -> None:
    assert grade("50,50,24=24", "50-50+24")[0]
    assert not grade("50,50,24=26", "50-24")[0]


@pytest.mark.parametrize("gold", ["", "28", "50,46,24", "=28", "50,,24=28", "a,b=3", "1," * 12 + "1=1", "50,46=٤"])
def test_countdown_gold_errors_if_malformed_and_fails_if_unsolvable(gold: str) -> None:
    assert grade(gold, "50-46+24") == (False, "error")
    assert as_completion(gold) == "" and as_completion("50,46,24=1") == ""


def test_countdown_votes_ignore_term_order() -> None:
    assert extract("50+46+24=96+24=120;50-46+24") == extract("24-46+50") == extract("-46+024+50") == "50+24-46"
    assert extract("50+46-24") != extract("50-46+24")
    assert extract("no") is None


def test_countdown_pools_share_no_numbers_for_any_target_and_seed() -> None:
    held_by = {pool: {text.split("=")[0] for seed in (0, 1) for text, _ in generate(400, pool, seed)} for pool in POOLS}
    for pool, numbers in held_by.items():
        assert {pool_of(f"{number}=7") for number in numbers} == {pool}
        assert not any(numbers & other for name, other in held_by.items() if name != pool)


def test_countdown_problems_are_reproducible_and_extend_shorter_calls() -> None:
    code = "from headwater.tasks.countdown import generate; print(generate(3, 'eval', 0))"
    environment = {"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(sys.path)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == repr(generate(3, "eval", 0))
    # Written down once: a change here would silently move problems between the pools of old runs.
    assert [text for text, _ in generate(3, "eval", 0)] == ["16,07,02=21", "99,47,11=41", "62,59,18=103"]
    many = generate(500, "train", 3)
    assert len({text for text, _ in many}) == 500 and many[:20] == generate(20, "train", 3)
    assert many[:20] != generate(20, "train", 4)


def test_countdown_numbers_descend_and_targets_are_not_negative() -> None:
    for text, _ in generate(300, "train", 0, FOUR):
        numbers, target = parse_problem(text)  # type: ignore[misc]
        assert numbers == sorted(numbers, reverse=True) and len(numbers) == 4
        assert numbers[-1] >= 1 and numbers[0] <= 120 and target >= 0
        assert all(len(number) == 3 for number in text.split("=")[0].split(","))


def test_countdown_refuses_impossible_dials_pools_and_counts() -> None:
    for wrong in ({"numbers": 1}, {"numbers": 7}, {"largest": 3}):
        with pytest.raises(ValueError, match="countdown: "):
            CountdownDials(**wrong)
    with pytest.raises(ValueError, match="no pool 'test'"):
        generate(1, "test", 0)
    # two numbers up to 9: 45 pairs, 2 targets each at most, an eighth of them here
    with pytest.raises(ValueError, match=r"pool 'eval' has about \d+ problems .*, not 91"):
        generate(91, "eval", 0, CountdownDials(numbers=2, largest=9))


@settings(max_examples=300, deadline=None)
@given(completion=st.text("0123456789+-*/=;,. ()\n", max_size=60), gold=st.text("0123456789,=-", max_size=20))
def test_countdown_correct_equals_python_sum(completion: str, gold: str) -> None:
    """Against another reading of the same text: split at the signs, with Python's own integers."""
    correct, _ = grade("50,46,24=28", completion)
    answer = completion.split(";")[-1].split("=")[0].strip()
    parts = answer.replace("-", "+-").removeprefix("+").split("+")
    by_hand = all(part.removeprefix("-").isdigit() for part in parts) and (
        sorted(abs(int(part)) for part in parts) == [24, 46, 50] and sum(map(int, parts)) == 28
    )
    assert correct is by_hand
    assert grade(gold, completion)[1] in {"equal", "different", "no_answer", "error"}
    assert grade(gold, as_completion(gold))[0] is (as_completion(gold) != "")


@pytest.mark.parametrize(
    "hostile",
    [
        "9" * 10_000_000,
        "+1" * 5_000_000,
        "-" * 10_000_000,
        ";" * 10_000_000,
        "=" * 10_000_000,
        " " * 10_000_000 + "50-46+24",
        "50-46+24" + " " * 10_000_000 + "x",
        "__import__('os').system('exit')",
        "50-46+٢٤",
        "50−46+24",
        "50-46+24\ud800",
        "50-46+24\0",
    ],
    ids=range(12),
)
def test_countdown_grades_hostile_text_wrong_at_once(hostile: str) -> None:
    began = time.process_time()
    assert grade("50,46,24=28", hostile)[0] is False and parse_terms(hostile) is None
    assert TASKS["countdown"].extract(hostile) is None  # type: ignore[misc]
    assert time.process_time() - began < 1.0


def test_countdown_validate_accepts_generated_and_lists_unsolvable(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    texts = [text for text, _ in generate(20, "train", 0)]
    path.write_text("".join(f'{{"problem": "{text}", "answer": "{text}"}}\n' for text in [*texts, "9,3=5"]))
    result = call("validate", path, "--task", "countdown")
    assert result.code == 3 and "21 labels, 1 fail" in result.out and "'9,3=5' grades no_answer" in result.out


def test_countdown_recipe_differs_from_pocket_in_task_models_and_length() -> None:
    """A control whose stages were set for it would show nothing."""
    pocket, control = (yaml.safe_load(builtin_text(name)) for name in ("pocket", "pocket-countdown"))
    for stage in (*control["stages"].values(), control["evaluate"]):
        assert stage["sampling"]["max_tokens"] == 80
        stage["sampling"]["max_tokens"] = 48
    assert {name for name in pocket | control if pocket.get(name) != control.get(name)} == {
        "name",
        "task",
        "models",
        "data",
    }
