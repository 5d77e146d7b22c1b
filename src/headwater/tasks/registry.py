"""Table of tasks: grader, answer extraction and generator of each. A new task is one file and one row here."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

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
    sums,
    word_problems,
)
from headwater.tasks.golds import cell_as_is, marked_gold

Outcome = tuple[bool, str]

NO_VERDICT = "no verdict: "
"""Begins the reason for a completion for which a user's grader returned neither a bool nor (bool, reason); its type follows."""


def _after_equals(completion: str) -> str | None:
    """Text after the last `=`, the answer of a chained sum, for majority votes."""
    _, sign, answer = completion.rpartition("=")
    answer = answer.strip()
    return answer if sign and 0 < len(answer) <= sums.LONGEST_ANSWER else None


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
    gold           conversion of a data cell to a gold answer; None: the formats of mathematics data sets
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
    gold: Callable[[Any], str | None] | None = None
    warm_up: tuple[str, str] | None = None
    generator: Generator | None = None
    one_answer: bool = True
    file: str | None = None


TASKS: dict[str, Task] = {
    "sums": Task(
        "sums",
        sums.grade,
        _after_equals,
        bounded=False,
        as_completion=lambda gold: f"={gold}",
        generator=Generator(sums.generate, sums.SumsDials),
    ),
    "countdown": Task(
        "countdown",
        countdown.grade,
        countdown.extract,
        bounded=False,
        as_completion=countdown.as_completion,
        gold=cell_as_is,
        one_answer=False,
        generator=Generator(countdown.generate, countdown.CountdownDials),
    ),
    "words": Task(
        "words",
        word_problems.grade,
        word_problems.extract,
        bounded=False,
        as_completion=lambda gold: f"The answer is {gold}.",
        gold=cell_as_is,
        generator=Generator(word_problems.generate, word_problems.WordsDials),
    ),
    "maths": Task(
        "maths",
        maths.grade,
        maths.extract,
        bounded=True,
        quick=maths.quick,
        as_completion=lambda gold: f"\\boxed{{{gold}}}",
        warm_up=("(x+1)^2+\\sqrt{2}", "\\boxed{x^2+2x+1+2^{\\frac{1}{2}}}"),
    ),
    "exact": Task("exact", exact.grade, exact.extract, bounded=False, gold=cell_as_is),
    "numeric": Task(
        "numeric", numeric.grade, numeric.extract, bounded=False, as_completion=numeric.as_completion, gold=cell_as_is
    ),
    "choice": Task("choice", choice.grade, choice.extract, bounded=False, gold=cell_as_is),
    "regex": Task(
        "regex",
        regex.grade,
        exact.extract,
        bounded=True,
        as_completion=regex.as_completion,
        gold=cell_as_is,
        one_answer=False,
    ),
    "json": Task(
        "json",
        json_fields.grade,
        json_fields.extract,
        bounded=True,
        as_completion=json_fields.as_completion,
        gold=cell_as_is,
    ),
    "python": Task(
        "python",
        python_tests.grade,
        extract=None,
        bounded=True,
        quick=python_tests.quick,
        as_completion=python_tests.as_completion,
        blank=python_tests.BLANK,
        gold=cell_as_is,
        one_answer=False,
    ),
}


def find_task(name: str) -> Task:
    """Look up a built-in task, or import a user's grader given as `package.module:function`.

    The function takes (gold, completion) and returns a bool or a (bool, reason) pair; the current directory is
    on its import path. Raises UserError if the name is unknown or names no function.

    Example: `find_task("my_graders:same_words")`.
    """
    if name in TASKS:
        return TASKS[name]
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        known = f"the tasks are {', '.join(TASKS)}, or package.module:function"
        raise UserError(f"task {name!r} is unknown; {known}{did_you_mean(name, TASKS)}")
    if module_name.partition(".")[0] in {*sys.stdlib_module_names, *sys.builtin_module_names}:
        # Security: a recipe with timeit:timeit would run a gold answer as a program.
        raise UserError(
            f"task {name}: {module_name} has no function {function_name} that grades; the standard library is not allowed"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may fail in any way
        raise UserError(f"task {name}: {module_name} does not import ({type(error).__name__}: {error})") from None
    function = getattr(module, function_name, None)
    top = module_name.partition(".")[0]
    if not isinstance(function, FunctionType):
        raise UserError(f"task {name}: {module_name} has no function {function_name}")
    if function.__module__.partition(".")[0] != top:
        raise UserError(f"task {name}: {function_name} is not defined in {top}, only imported there")

    def grade(gold: str, completion: str) -> Outcome:
        return _checked_outcome(function(gold, completion))

    return Task(
        name, grade, extract=None, bounded=True, gold=marked_gold, one_answer=False, file=function.__code__.co_filename
    )


def grader_code(name: str) -> str | None:
    """Fingerprint (sha256) of a user's grader and the local modules that it imports, recursively; None for built-in tasks.

    Local modules are those in the folder of the grader's top-level package or module; for an installed package, those of
    the package. Data files that the grader reads are not included.
    """
    if name in TASKS:
        return None
    find_task(name)  # raises UserError if there is no such grader
    module = name.partition(":")[0]
    file = Path(str(sys.modules[module].__file__)).resolve()
    root = file.parents[module.count(".") + (file.name == "__init__.py")]
    installed = root.name in ("site-packages", "dist-packages")
    digest, seen, queue = hashlib.sha256(), set[Path](), [module]
    while queue:
        dotted = queue.pop(0)
        for path in (
            root.joinpath(*dotted.split(".")).with_suffix(".py"),
            root.joinpath(*dotted.split("."), "__init__.py"),
        ):
            if path.is_file() and path not in seen:
                seen.add(path)
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root)}:{len(content)}\n".encode() + content)
                names = _imported_modules(content, dotted, path.name == "__init__.py")
                queue += [name for name in names if not installed or name.split(".")[0] == module.split(".")[0]]
    return digest.hexdigest()[:16]


def _imported_modules(content: bytes, module: str, is_package: bool) -> list[str]:
    """Dotted names of the modules that a source file may import, with all parent packages."""
    parents = module.split(".")
    names = [".".join(parents[:end]) for end in range(1, len(parents))]
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = parents[: len(parents) - node.level + is_package] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)]


def _checked_outcome(value: Any) -> Outcome:
    """Validate the return value of a user's grader: a bool, numpy's included, or a pair of a bool and a reason.

    Anything else is graded wrong with a reason that begins with NO_VERDICT: numbers and texts count as true in Python, so a grader
    that returns a score by mistake would reward everything.
    """
    correct, reason = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if _is_bool(correct) and (reason is None or isinstance(reason, str)):
        return bool(correct), ("equal" if correct else "different") if reason is None else str(reason)
    return False, NO_VERDICT + _type_of(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


def _type_of(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_type_of, value[:3]))}{', …' if len(value) > 3 else ''})"
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
