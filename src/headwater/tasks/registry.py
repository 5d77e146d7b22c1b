"""Table of tasks: grader, answer extraction and generator of each. A new task is one file and one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater import plugins
from headwater.errors import UserError, did_you_mean
from headwater.tasks import (
    choice,
    countdown,
    exact,
    json_fields,
    maths,
    numeric,
    python_tests,
    regex,
    sandbox,
    skills,
    sums,
    word_problems,
)
from headwater.tasks.golds import cell_as_is, gold_answer, marked_gold

Outcome = tuple[bool, str]

NO_VERDICT = "no verdict: "
"""Begins the reason for a completion for which a user's grader returned neither a bool nor (bool, reason); its type follows."""


@dataclass(frozen=True)
class Generator:
    """Problem generator of a task.

    make   (count, pool, seed, dials) -> distinct (problem, gold answer) pairs; ValueError if it cannot
    dials  frozen dataclass of difficulty parameters: numbers with defaults; ValueError if out of range

    Example: `TASKS["sums"].generator.make(1, "eval", 0, SumsDials())` is `[("17+45+82+03", "47")]`.
    """

    make: Callable[[int, str, int, Any], list[tuple[str, str]]]
    dials: type[Any]


@dataclass(frozen=True)
class Task:
    """A grader and what data loading, votes and validation need for it.

    Example: `find_task("sums").grade("47", "17+45=62+82=44+03=47")` gives `(True, "equal")`.

    grade          (gold, completion) -> (correct, reason)
    extract        canonical answer of a completion for majority votes (maj@k); None if the task has no such notion
    bounded        whether grading needs a worker process with limits; False only if it is cheap and safe in-process
    quick          (gold, completion) -> outcome if a cheap exact comparison decides, else None; always fast
    as_completion  a completion that contains the gold answer, for `validate`; its result is None if none is known
    blank          a wrong completion, which `validate` grades instead; the reason "error" means that the gold is unusable
    gold           conversion of a data cell to a gold answer; None if the cell has none
    refusal        why this machine cannot confine the programs that it runs; its result is None if it can
    warm_up        a pair to grade at worker start, so that imports do not count against the first answer's time
    generator      problem generator (`generate` in a recipe); None if the task has none
    file           source file of a user's grader; None for built-in tasks
    one_answer     whether answers that are correct for one gold are the same answer, so that they are one vote of maj@k, and two
                   golds of one problem agree if each is correct for the other; False where a gold is a test that many answers pass
    """

    name: str
    grade: Callable[[str, str], Outcome]
    extract: Callable[[str], str | None] | None
    bounded: bool
    quick: Callable[[str, str], Outcome | None] | None = None
    as_completion: Callable[[str], str | None] = str
    blank: str = "-"
    gold: Callable[[Any], str | None] = cell_as_is
    refusal: Callable[[], str | None] | None = None
    warm_up: tuple[str, str] | None = None
    generator: Generator | None = None
    one_answer: bool = True
    file: str | None = None


TASKS: dict[str, Task] = {
    "sums": Task(
        "sums",
        sums.grade,
        sums.extract,
        bounded=False,
        as_completion=lambda gold: f"={gold}",
        gold=gold_answer,
        generator=Generator(sums.generate, sums.SumsDials),
    ),
    "countdown": Task(
        "countdown",
        countdown.grade,
        countdown.extract,
        bounded=False,
        as_completion=countdown.as_completion,
        one_answer=False,
        generator=Generator(countdown.generate, countdown.CountdownDials),
    ),
    "skills": Task(
        "skills",
        sums.grade,
        sums.extract,
        bounded=False,
        as_completion=lambda gold: f"={gold}",
        gold=gold_answer,
        generator=Generator(skills.generate, skills.SkillsDials),
    ),
    "words": Task(
        "words",
        word_problems.grade,
        word_problems.extract,
        bounded=False,
        as_completion=lambda gold: f"The answer is {gold}.",
        generator=Generator(word_problems.generate, word_problems.WordsDials),
    ),
    "maths": Task(
        "maths",
        maths.grade,
        maths.extract,
        bounded=True,
        quick=maths.quick,
        as_completion=lambda gold: f"\\boxed{{{gold}}}",
        gold=gold_answer,
        warm_up=("(x+1)^2+\\sqrt{2}", "\\boxed{x^2+2x+1+2^{\\frac{1}{2}}}"),
    ),
    "exact": Task("exact", exact.grade, exact.extract, bounded=False),
    "numeric": Task("numeric", numeric.grade, numeric.extract, bounded=False, as_completion=numeric.as_completion),
    "choice": Task("choice", choice.grade, choice.extract, bounded=False),
    "regex": Task(
        "regex",
        regex.grade,
        exact.extract,
        bounded=True,
        as_completion=regex.as_completion,
        one_answer=False,
    ),
    "json": Task(
        "json",
        json_fields.grade,
        json_fields.extract,
        bounded=True,
        as_completion=json_fields.as_completion,
    ),
    "python": Task(
        "python",
        python_tests.grade,
        extract=None,
        bounded=True,
        quick=python_tests.quick,
        as_completion=python_tests.as_completion,
        blank=python_tests.BLANK,
        refusal=sandbox.refusal,
        warm_up=python_tests.WARM_UP,
        one_answer=False,
    ),
}


def find_task(name: str) -> Task:
    """Look up a built-in task, or a user's grader: `package.module:function`, or the name of an entry point `headwater.tasks`.

    The function takes (gold, completion) and returns a bool or a (bool, reason) pair; the current directory is
    on its import path. Raises UserError if the name is unknown or names no function.

    Example: `find_task("my_graders:same_words")`.
    """
    if name in TASKS:
        return TASKS[name]
    function = plugins.find("task", name)
    if function is None:
        known = f"the tasks are {', '.join([*TASKS, *plugins.names('task')])}, or package.module:function"
        raise UserError(f"task {name!r} is unknown; {known}{did_you_mean(name, TASKS)}")

    def grade(gold: str, completion: str) -> Outcome:
        return _checked_outcome(function(gold, completion))

    return Task(
        name, grade, extract=None, bounded=True, gold=marked_gold, one_answer=False, file=function.__code__.co_filename
    )


def grader_code(name: str) -> str | None:
    """Fingerprint of a user's grader and the local modules that it imports; None for built-in tasks. Raises as `find_task` does."""
    function = None if name in TASKS else plugins.find("task", name)
    return None if function is None else plugins.code_fingerprint(function.__module__)


def _checked_outcome(value: Any) -> Outcome:
    """Validate the return value of a user's grader: a bool, numpy's included, or a pair of a bool and a reason.

    Anything else is graded wrong with a reason that begins with NO_VERDICT: numbers and texts count as true in Python, so a grader
    that returns a score by mistake would reward everything.
    """
    correct, reason = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if isinstance(correct, (bool, np.bool_)) and (reason is None or isinstance(reason, str)):
        return bool(correct), ("equal" if correct else "different") if reason is None else str(reason)
    return False, NO_VERDICT + _type_of(value)


def _type_of(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_type_of, value[:3]))}{', …' if len(value) > 3 else ''})"
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
