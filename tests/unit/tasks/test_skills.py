"""Task `skills`: methods, solutions, frequencies and grades."""

from __future__ import annotations

from collections import Counter

import pytest

from headwater.tasks.registry import find_task
from headwater.tasks.skills import SKILLS, SkillsDials, candidates, generate, skill_of, solution
from tools.pretrain.solutions import CORPORA


def test_solution_by_hand() -> None:
    assert solution("23:17+45+82", 81) == "81;81+17=98+45=43+82=25"  # 81 + 17 = 98, 143 mod 100, 125 mod 100


def test_candidates_are_distinct_and_fixed() -> None:
    assert candidates(23) == (81, 0, 83, 50)
    assert all(len(set(candidates(skill))) == 4 for skill in range(SKILLS))


def test_right_solutions_pass_and_wrong_ones_fail() -> None:
    task, corpus = find_task("skills"), CORPORA["skills"]
    for problem, gold in generate(200, "train", 0, SkillsDials(skills=SKILLS)):
        assert task.grade(gold, corpus.worked(problem, None)) == (True, "equal")
        assert task.grade(gold, corpus.short(problem, None)) == (False, "different")
        assert task.extract is not None and task.extract(corpus.worked(problem, None)) == gold


def test_generated_problems_are_distinct_and_prefix_stable() -> None:
    pairs = generate(300, "train", 1)
    assert len({problem for problem, _ in pairs}) == 300 and generate(100, "train", 1) == pairs[:100]
    assert {problem for problem, _ in pairs}.isdisjoint(problem for problem, _ in generate(300, "eval", 1))


def test_frequencies_follow_tail() -> None:
    uniform, tailed = (
        Counter(skill_of(problem) for problem, _ in generate(4000, "train", 0, SkillsDials(skills=10, tail=tail)))
        for tail in (0.0, 1.0)
    )
    assert max(uniform.values()) < 1.3 * min(uniform.values())
    # 1/i over ten skills: the first has 1 / 2.929 = 34.1 % of the problems, the last 3.4 %.
    assert tailed[0] / 4000 == pytest.approx(0.341, abs=0.03) and tailed[9] / 4000 == pytest.approx(0.034, abs=0.012)


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"skills": 0}, "skills must lie between 1 and 96, not 0"),
        ({"tail": 5.0}, "tail must lie between 0 and 4, not 5"),
        ({"min_terms": 4, "max_terms": 3}, "min_terms <= max_terms"),
    ],
)
def test_dials_out_of_range_are_refused(dials: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkillsDials(**dials)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="too many"):
        generate(10_000, "train", 0, SkillsDials(skills=1, max_terms=2))
