"""Table of tasks: how each grades a completion against a gold answer. A new task is one file and one row here."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from headwater.errors import UserError
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

Outcome = tuple[bool, str]


def _as_is(gold: str) -> str:
    return gold


def cell_as_is(value: Any) -> str | None:
    """The gold answer in a cell of a file, as it stands: text, a number's text, an object as JSON; None for none.

    Example: `cell_as_is({"value": 3.14, "abs": 0.01})` is `'{"value": 3.14, "abs": 0.01}'`.
    """
    if value is None or value != value:  # NaN is how tables write a missing cell
        return None
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, bool)) else str(value)
    return text if text.strip() else None


def _after_equals(completion: str) -> str | None:
    """The answer of a chained sum, for votes: what stands after the last `=`, where the grader would read it."""
    _, sign, answer = completion.rpartition("=")
    answer = answer.strip()
    return answer if sign and 0 < len(answer) <= sums.LONGEST_ANSWER else None


@dataclass(frozen=True)
class Generator:
    """How a task makes problems of its own.

    make   (how many, pool, seed, dials) -> that many different (problem, gold answer) pairs; ValueError where it cannot
    dials  the frozen dataclass of its difficulty: numbers with defaults; ValueError for what is out of range

    Example: `TASKS["sums"].generator.make(1, "eval", 0, SumsDials())` is `[("17+45+82+03", "47")]`.
    """

    make: Callable[[int, str, int, Any], list[tuple[str, str]]]
    dials: type[Any]


@dataclass(frozen=True)
class Task:
    """One way to grade.

    Example: `find_task("sums").grade("47", "17+45=62+82=44+03=47")` gives `(True, "equal")`.

    grade          (gold, completion) -> (correct, reason)
    extract        the answer a completion gives, as text to vote on (maj@k); None where the task has no such notion
    bounded        whether grading needs a worker process with limits; False only for what is cheap and safe in-process
    quick          (gold, completion) -> the outcome where cheap exact comparison settles it, else None; never slow
    warm_up        a pair whose grading loads and prepares whatever grading needs, before any answer's time counts
    as_completion  how a gold answer looks as a completion, for `validate`; None where it does not say how to satisfy it
    blank          a completion that says nothing right: what `validate` tries then; "error" would blame the gold answer
    gold           how a cell of a data file becomes a gold answer; None reads answers as mathematics data sets write them
    generator      how it makes problems of its own (`generate` in a recipe); None where it cannot
    """

    name: str
    grade: Callable[[str, str], Outcome]
    extract: Callable[[str], str | None] | None
    bounded: bool
    quick: Callable[[str, str], Outcome | None] | None = None
    as_completion: Callable[[str], str | None] = _as_is
    blank: str = "-"
    gold: Callable[[Any], str | None] | None = None
    warm_up: tuple[str, str] | None = None
    generator: Generator | None = None


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
        "regex", regex.grade, exact.extract, bounded=True, as_completion=regex.as_completion, gold=cell_as_is
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
    ),
}


def find_task(name: str) -> Task:
    """A task of the table, or a user's own grader given as `package.module:function`.

    The function takes (gold, completion) and returns a bool or a (bool, reason) pair; the current directory is
    importable for it. Raises UserError when the name is unknown or leads to nothing that can be called.

    Example: `find_task("my_graders:same_words")`.
    """
    if name in TASKS:
        return TASKS[name]
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(f"task {name!r} is unknown; the tasks are {', '.join(TASKS)}, or package.module:function")
    if module_name.partition(".")[0] in {*sys.stdlib_module_names, *sys.builtin_module_names}:
        # A recipe that names timeit:timeit would run a gold answer as a program. What is imported is somebody's own grader.
        raise UserError(
            f"task {name}: {module_name} has no function {function_name} that grades; Python's own library is never taken"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may fail in any way; the sentence says how
        raise UserError(f"task {name}: {module_name} does not import ({type(error).__name__}: {error})") from None
    function = getattr(module, function_name, None)
    top = module_name.partition(".")[0]
    if not isinstance(function, FunctionType):
        raise UserError(f"task {name}: {module_name} has no function {function_name}")
    if function.__module__.partition(".")[0] != top:
        raise UserError(f"task {name}: {function_name} is not defined in {top}, only imported there")

    def grade(gold: str, completion: str) -> Outcome:
        return _checked(function(gold, completion))

    return Task(name, grade, extract=None, bounded=True)


def grader_code(name: str) -> str | None:
    """sha256 of a user's grader: its module's file and the modules of its own that it imports, at whatever depth; None for
    a task of the table, whose code is this version's.

    Its own are those in the folder that holds the grader's top package or module; where that is an installed one, those of its
    package. What it reads beside code is not seen.
    """
    if name in TASKS:
        return None
    find_task(name)  # raises UserError where there is no such grader
    module = name.partition(":")[0]
    file = Path(str(sys.modules[module].__file__)).resolve()
    root = file.parents[module.count(".") + (file.name == "__init__.py")]
    installed = root.name in ("site-packages", "dist-packages")
    digest, seen, todo = hashlib.sha256(), set[Path](), [module]
    while todo:
        dotted = todo.pop(0)
        for path in (
            root.joinpath(*dotted.split(".")).with_suffix(".py"),
            root.joinpath(*dotted.split("."), "__init__.py"),
        ):
            if path.is_file() and path not in seen:
                seen.add(path)
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root)}:{len(content)}\n".encode() + content)
                found = _imports(content, dotted, path.name == "__init__.py")
                todo += [one for one in found if not installed or one.split(".")[0] == module.split(".")[0]]
    return digest.hexdigest()[:16]


def _imports(content: bytes, module: str, package: bool) -> list[str]:
    """Dotted names of the modules that a source file may import, and of the packages that hold it and them."""
    parents = module.split(".")
    found = [".".join(parents[:end]) for end in range(1, len(parents))]
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = parents[: len(parents) - node.level + package] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [".".join(name.split(".")[:end]) for name in found for end in range(1, name.count(".") + 2)]


def _checked(value: Any) -> Outcome:
    """What a user's grader returned, or (False, "error") when that is no verdict.

    A truthy number or text is refused too: a grader that returns its score by mistake would reward everything.
    """
    if isinstance(value, bool):
        return value, "equal" if value else "different"
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], bool) and isinstance(value[1], str):
        return value[0], value[1]
    return False, "error"
