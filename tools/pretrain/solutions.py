"""Correct solutions of generated problems, worked and short: what the pocket and desk models are trained on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from headwater.tasks import countdown, skills, sums, word_problems
from headwater.tasks.countdown import CountdownDials, format_terms, parse_problem
from headwater.tasks.skills import SkillsDials
from headwater.tasks.sums import SumsDials
from headwater.tasks.word_problems import ANSWER_PREFIXES, WordProblem, WordsDials, problems


@dataclass(frozen=True)
class Corpus:
    """A pocket task as training data.

    generate       as `Generator.make` of the task
    worked, short  (problem, dials) -> solution
    is_worked      whether a completion shows steps before its answer; for statistics of samples, never for grading
    about          dials -> the task, for a model card
    """

    generate: Callable[[int, str, int, Any], list[tuple[str, str]]]
    grade: Callable[[str, str], tuple[bool, str]]
    worked: Callable[[str, Any], str]
    short: Callable[[str, Any], str]
    is_worked: Callable[[str], bool]
    about: Callable[[Any], str]


# Sums -----------------------------------------------------------------------------------------------------------------


def running_sums(problem: str, dials: SumsDials = sums.DIALS) -> list[str]:
    """Zero-padded running sum after each term: `17+45+82` -> ['17', '62', '44']."""
    sums: list[str] = []
    total = 0
    for term in problem.split("+"):
        total = (total + int(term)) % dials.modulus
        sums.append(str(total).zfill(dials.width))
    return sums


def sums_worked(problem: str, dials: SumsDials = sums.DIALS) -> str:
    """Worked solution: `17+45+82+03` -> `17+45=62+82=44+03=47`."""
    terms, sums = problem.split("+"), running_sums(problem, dials)
    return terms[0] + "".join(f"+{term}={total}" for term, total in zip(terms[1:], sums[1:], strict=True))


def sums_short(problem: str, dials: SumsDials = sums.DIALS) -> str:
    """Short solution: `17+45+82+03` -> `=47`."""
    return "=" + running_sums(problem, dials)[-1]


def sums_is_worked(completion: str) -> bool:
    return not completion.lstrip().startswith("=")


def sums_about(dials: SumsDials) -> str:
    return f"chained sums mod {dials.modulus} of {dials.min_terms} to {dials.max_terms} terms"


# Countdown ------------------------------------------------------------------------------------------------------------


def attempts(problem: str, dials: CountdownDials = countdown.DIALS) -> list[str]:
    """Attempts of a worked solution with their steps: signs from all + to all − until the target is reached.

    Example: `attempts("50,46,24=72")` is `["50+46+24=96+24=120", "50+46-24=96-24=72"]`.
    """
    parsed = parse_problem(problem)
    if parsed is None:
        raise ValueError(f"countdown: {problem!r:.80} is no problem such as 50,46,24=28")
    numbers, target = parsed
    lines: list[str] = []
    for signs in product((1, -1), repeat=len(numbers) - 1):
        terms = [numbers[0], *(sign * number for sign, number in zip(signs, numbers[1:], strict=True))]
        steps = [[sum(terms[:done]), *terms[done:]] for done in range(1, len(terms) + 1)]
        lines.append("=".join(format_terms(step, dials.width) for step in steps))
        if sum(terms) == target:
            return lines
    raise ValueError(f"countdown: {problem} has no solution that begins with +{numbers[0]}")


def countdown_worked(problem: str, dials: CountdownDials = countdown.DIALS) -> str:
    """Worked solution, all attempts until the target is reached: `50,46,24=72` -> `50+46+24=96+24=120;50+46-24=96-24=72`."""
    return ";".join(attempts(problem, dials))


def countdown_short(problem: str, dials: CountdownDials = countdown.DIALS) -> str:
    """Short solution, the successful attempt alone: `50,46,24=72` -> `50+46-24`."""
    return attempts(problem, dials)[-1].partition("=")[0]


def countdown_is_worked(completion: str) -> bool:
    return "=" in completion or ";" in completion


def countdown_about(dials: CountdownDials) -> str:
    return f"Countdown with + and − on {dials.numbers} numbers up to {dials.largest}"


# Skills ---------------------------------------------------------------------------------------------------------------


def skills_right(problem: str, dials: SkillsDials = skills.DIALS) -> str:
    """Solution by the skill's method: `23:17+45` -> `81;81+17=98+45=43`."""
    return skills.solution(problem, skills.candidates(skills.skill_of(problem))[0])


def skills_wrong(problem: str, dials: SkillsDials = skills.DIALS) -> str:
    """Solution by one of the other methods that come into question, which the problem's text decides; its answer is wrong."""
    others = skills.candidates(skills.skill_of(problem))[1:]
    return skills.solution(problem, others[hashlib.sha256(problem.encode()).digest()[0] % len(others)])


def skills_about(dials: SkillsDials) -> str:
    return f"sums under {dials.skills} skills, each with a method of its own"


CORPORA = {
    "sums": Corpus(sums.generate, sums.grade, sums_worked, sums_short, sums_is_worked, sums_about),
    "countdown": Corpus(
        countdown.generate, countdown.grade, countdown_worked, countdown_short, countdown_is_worked, countdown_about
    ),
    "skills": Corpus(
        skills.generate, sums.grade, skills_right, skills_wrong, lambda completion: ";" in completion, skills_about
    ),
}


# Word problems --------------------------------------------------------------------------------------------------------


def words_worked(problem: WordProblem) -> str:
    """Worked solution: one sentence per operation on the path to the answer, then the answer.

    Example: `"Mia picked 3*4=12 apples. Tom picked 12+5=17 apples. Together that is 12+17=29. The answer is 29."`
    """
    world, question = problem.world, problem.world.question
    sentences = [
        f"{step.quantity.owner} {problem.scene.did} {step.expression}={step.value} {step.quantity.thing}."
        for step in (world.steps[index] for index in world.needed)
        if step.sign
    ]
    if question.sign:
        subject = {"total": "Together that is", "gap": "The difference is", "price": "That is", "share": "Each part is"}
        sentences.append(f"{subject[question.relation]} {question.expression}={question.value}.")
    return " ".join([*sentences, words_short(problem)]).format(*problem.names)


def words_short(problem: WordProblem) -> str:
    return f"The answer is {problem.gold}."


def words_is_worked(completion: str) -> bool:
    return not completion.lstrip().startswith(ANSWER_PREFIXES)


def words_solutions(
    n: int, pool: str, seed: int | str, worked_share: float, dials: WordsDials = word_problems.DIALS
) -> list[tuple[str, str]]:
    """n (problem, completion) training pairs, each worked with probability `worked_share` and short otherwise."""
    draw = random.Random(f"words:{pool}:{seed}:forms").random
    drafts = islice(problems(pool, seed, dials), n)
    return [(draft.text, (words_worked if draw() < worked_share else words_short)(draft)) for draft in drafts]
