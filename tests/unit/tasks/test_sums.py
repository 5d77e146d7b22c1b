"""The pocket task: gold answers, disjoint pools, dials, and a grader that survives hostile text."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from headwater.tasks.pools import POOLS, pool_of
from headwater.tasks.sums import SumsDials, generate, grade
from tools.pretrain.solutions import sums_is_worked as is_worked
from tools.pretrain.solutions import sums_short as short
from tools.pretrain.solutions import sums_worked as worked


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dials", [SumsDials(), SumsDials(modulus=7, min_terms=2, max_terms=9), SumsDials(1000, 3, 3)])
def test_sums_gold_grades_one_in_both_forms_and_perturbed_zero(pool: str, dials: SumsDials) -> None:
    for problem, gold in generate(40, pool, seed=1, dials=dials):
        assert int(gold) == sum(map(int, problem.split("+"))) % dials.modulus
        for completion in (worked(problem, dials), short(problem, dials), f"={gold}", f" ={gold}\n"):
            assert grade(gold, completion) == (True, "equal")
        for other in range(dials.modulus):
            wrong = str(other).zfill(dials.width)
            assert grade(wrong, short(problem, dials))[0] is (wrong == gold)
        for perturbed in (f"{gold}0", f"1{gold}", f"{gold}+", f"-{gold}", f"{gold} {gold}", f"{gold}.0", ""):
            assert grade(gold, f"={perturbed}")[0] is False


def test_sums_solutions_have_documented_text() -> None:
    # 17+45=62; 62+82=144, mod 100 is 44; 44+03=47
    assert worked("17+45+82+03") == "17+45=62+82=44+03=47"
    assert short("17+45+82+03") == "=47"
    assert is_worked("17+45=62") and not is_worked("=47")
    assert worked("3+6+5", SumsDials(modulus=7)) == "3+6=2+5=0"


def test_sums_reason_names_fault() -> None:
    assert grade("47", "17+45=62+82=44+03=48") == (False, "different")
    assert grade("03", "=3") == (False, "different")  # numbers always have all their digits
    for silent in ("", "47", "=", "47=", "=47=", "=forty", "=47;", "=4 7"):
        assert grade("47", silent) == (False, "no_answer")


def test_sums_pools_share_no_problem_for_any_seed() -> None:
    texts = {pool: {text for seed in (0, 1, 2) for text, _ in generate(500, pool, seed)} for pool in POOLS}
    for pool, problems in texts.items():
        assert {pool_of("sums", text) for text in problems} == {pool}
        assert not any(problems & other for name, other in texts.items() if name != pool)


def test_sums_have_no_duplicates_and_extend_shorter_calls() -> None:
    many = generate(2000, "train", seed=3)
    assert len({text for text, _ in many}) == 2000
    assert generate(50, "train", seed=3) == many[:50]
    assert generate(50, "train", seed=4) != many[:50]


def test_sums_are_equal_in_every_process() -> None:
    code = "from headwater.tasks.sums import generate; print(generate(3, 'eval', 0))"
    environment = {"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(sys.path)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == repr(generate(3, "eval", 0))
    # Written down once: a change here would silently move problems between the pools of old runs.
    assert generate(3, "eval", 0) == [("13+76+64+68+49+20", "90"), ("58+94+84+23+44+22", "25"), ("84+52+09+21", "66")]


def test_sums_dials_set_number_and_size_of_terms() -> None:
    pairs = generate(300, "train", 0, SumsDials(modulus=12, min_terms=3, max_terms=5))
    assert {text.count("+") + 1 for text, _ in pairs} == {3, 4, 5}
    assert {len(term) for text, _ in pairs for term in text.split("+")} == {2}
    assert {int(term) for text, _ in pairs for term in text.split("+")} == set(range(12))


@pytest.mark.parametrize("wrong", [{"modulus": 1}, {"min_terms": 1}, {"min_terms": 5, "max_terms": 4}])
def test_sums_impossible_dials_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="sums: "):
        SumsDials(**wrong)


def test_sums_pool_returns_all_and_states_its_size_if_asked_for_more() -> None:
    dials = SumsDials(modulus=5, min_terms=2, max_terms=3)  # 5**2 + 5**3 = 150 problems in all pools together
    counts = {pool: sum(1 for text in _every_problem(5, (2, 3)) if pool_of("sums", text) == pool) for pool in POOLS}
    assert sum(counts.values()) == 150
    for pool, count in counts.items():
        assert len(generate(count, pool, 0, dials)) == count
        with pytest.raises(ValueError, match=f"pool '{pool}' has {count} problems .* but {count + 1} were requested"):
            generate(count + 1, pool, 0, dials)
    with pytest.raises(ValueError, match="no pool 'test'"):
        generate(1, "test", 0)


def _every_problem(modulus: int, counts: tuple[int, ...]) -> list[str]:
    texts = []
    for count in counts:
        partial = [""]
        for _ in range(count):
            partial = [f"{text}+{term}" for text in partial for term in range(modulus)]
        texts += [text[1:] for text in partial]
    return texts


@pytest.mark.parametrize(
    "hostile",
    [
        "=" * 10_000_000,
        "=" + "9" * 10_000_000,
        "9" * 10_000_000,
        "=47" + " " * 10_000_000 + "x",
        "\0=\0" * 1_000_000,
        "=__import__('os').system('exit')",
        "=٤٧",  # Arabic-Indic digits
        "=⁴⁷",
        "=47\u202e",
        "=\ud800",
        "=47\0",
    ],
    ids=range(11),
)
def test_sums_grade_hostile_text_wrong_at_once(hostile: str) -> None:
    began = time.process_time()
    assert grade("47", hostile) in {(False, "no_answer"), (False, "different")}
    assert time.process_time() - began < 2.0
