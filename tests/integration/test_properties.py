"""Property tests: arbitrary completions, gold answers, recipes and data files give a verdict or one sentence, within bounds."""

from __future__ import annotations

import copy
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headwater.config.arms import ARMS, arm_of
from headwater.config.builtin import builtin_names, builtin_text
from headwater.config.recipe import Columns, Recipe, Source, canonical_json, parse_recipe, read_recipe
from headwater.data.contamination import find_leaks
from headwater.data.labels import half_of, select_labels
from headwater.data.sources import load, without_leaks
from headwater.data.validate import grade_file
from headwater.errors import UserError
from headwater.tasks.registry import TASKS
from headwater.tasks.verifier import Verifier
from headwater.types import Problem, family_of, letters_and_digits, problem_id

quick = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

PIECES = [
    "\\boxed{", "}", "{", "####", "The answer is ", "</think>", "<think>", "\\frac", "\\frac{1}{2}", "```python\n",
    "```json\n", "```\n", "```", "=", "47", "-1,080.5", "1e9", "±", "\\pm", "%", "(B)", "A", " or ", "and", "\\text{", "$",
    "^", "_", "\\\\", '{"a": 1}', '{"value": ', '"abs": 0.1}', "[", "]", "(", ")", "\\left(", "\\right]", "x", "\\sqrt",
    "\\begin{matrix}", "\\end{matrix}", "9" * 400, "\u2028", "\x00", "\ud800", "é", "∞", "²", "½", "true", "null", "NaN",
    ".", ",", " ", "\n", "(?:a+)+", "[^", "def f(x): return x",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=25).map("".join) | st.text(max_size=200)


def sentence(act: Callable[[], object]) -> str:
    """The one sentence with which something was refused; "" where it was not. Any other exception is a failure."""
    try:
        act()
    except UserError as error:
        message = str(error)
    else:
        return ""
    first, *faults = message.split("\n  ")  # of several faults a line each
    assert "\n" not in first and all(fault.strip() and "\n" not in fault for fault in faults)
    assert first.strip() and (not faults or first.endswith(f": {len(faults)} errors"))
    return message


REASONS = {"equal", "different", "no_answer", "truncated", "timeout", "memory", "error"}


@pytest.fixture(scope="module")
def verifiers() -> Iterator[dict[str, Verifier]]:
    """One worker each; what is known to be slow or spoiled is killed at half a second."""
    by_task = {name: Verifier(name, workers=1, seconds=0.5, memory_mb=512) for name in ("maths", "regex", "json")}
    yield by_task
    for verifier in by_task.values():
        verifier.close()


@quick
@given(gold=texts, completion=texts)
def test_graders_and_votes_never_raise(gold: str, completion: str) -> None:
    """In this process: what is cheap, and the quick part of what is not."""
    for task in TASKS.values():
        started = time.perf_counter()
        if task.extract is not None:
            vote = task.extract(completion)
            assert vote is None or isinstance(vote, str)
        grade = task.quick if task.bounded else task.grade
        outcome = None if grade is None else grade(gold, completion)
        assert outcome is None or (isinstance(outcome[0], bool) and outcome[1] in REASONS)
        assert time.perf_counter() - started < 1.0, task.name


@settings(quick, max_examples=60)
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_workers_give_one_verdict_for_each_pair_in_time(
    verifiers: dict[str, Verifier], pairs: list[tuple[str, str]]
) -> None:
    for verifier in verifiers.values():
        started = time.monotonic()
        verdicts = verifier(pairs)
        assert len(verdicts) == len(pairs) and all(verdict.reason in REASONS for verdict in verdicts)
        assert time.monotonic() - started < 15.0


@quick
@given(gold=texts)
def test_gold_answer_is_correct_against_itself_or_refused_with_reason(gold: str) -> None:
    for name in ("exact", "numeric", "choice", "json", "python", "regex"):
        task = TASKS[name]
        own = task.as_completion(gold)
        if task.bounded or own is None:
            continue
        correct, reason = task.grade(gold, own)
        assert correct or reason in ("error", "no_answer", "truncated", "different")
        if name == "exact" and gold.split():
            # What stands before a `</think>` is not part of any answer.
            assert correct or "</think>" in gold
        if name in ("numeric", "choice"):
            assert correct or reason == "error" or "</think>" in gold or name == "choice"


@quick
@given(a=texts, b=texts)
def test_verdict_does_not_depend_on_earlier_questions(a: str, b: str) -> None:
    for name in ("sums", "exact", "numeric", "choice"):
        grade = TASKS[name].grade
        assert grade(a, b) == (grade(b, a), grade(a, b))[1]


# Recipes --------------------------------------------------------------------------------------------------------------

POCKET: dict[str, Any] = yaml.safe_load(builtin_text("pocket"))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**9)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["all", "grpo", "opd"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every field of a recipe."""
    paths = [path] if path else []
    if isinstance(value, dict):
        for key, child in value.items():
            paths += places(child, (*path, key))
    return paths


edits = st.lists(
    st.tuples(st.sampled_from(places(POCKET)), st.sampled_from(["set", "drop", "add"]), values), min_size=1, max_size=4
)


def edited(recipe: dict[str, Any], changes: list[tuple[tuple[str, ...], str, Any]]) -> dict[str, Any]:
    out = copy.deepcopy(recipe)
    for path, kind, value in changes:
        at: Any = out
        for key in path[:-1]:
            at = at.get(key) if isinstance(at, dict) else None
        if not isinstance(at, dict):
            continue
        if kind == "drop":
            at.pop(path[-1], None)
        else:
            at[path[-1] if kind == "set" else f"{path[-1]}_"] = value
    return out


@settings(quick, max_examples=300)
@given(changes=edits)
def test_edited_recipe_parses_or_is_refused_in_one_sentence(
    changes: list[tuple[tuple[str, ...], str, Any]],
) -> None:
    raw = edited(POCKET, changes)
    if message := sentence(lambda: parse_recipe(raw, "recipe r.yaml")):
        assert message.startswith("recipe r.yaml: ")
        return
    recipe = parse_recipe(raw, "recipe r.yaml")
    # What was read can be written down and read again, the same.
    assert Recipe.model_validate(json.loads(canonical_json(recipe))) == recipe
    for arm in ARMS:
        sentence(lambda arm=arm: arm_of(arm, recipe))  # type: ignore[misc]


@quick
@given(
    override=st.text(max_size=40)
    | st.tuples(st.sampled_from(places(POCKET)), texts).map(lambda pair: f"{'.'.join(pair[0])}={pair[1]}")
)
def test_override_is_applied_or_refused_in_one_sentence(override: str) -> None:
    sentence(lambda: parse_recipe(POCKET, "recipe", [override]))


@quick
@given(content=st.binary(max_size=200) | texts.map(lambda text: text.encode("utf-8", "replace")))
def test_arbitrary_file_as_recipe_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    assert sentence(lambda: read_recipe(path)).startswith(f"recipe {path}")


def test_every_builtin_recipe_parses() -> None:
    assert "pocket" in builtin_names()
    for name in builtin_names():
        parse_recipe(yaml.safe_load(builtin_text(name)), name)


# Data files -----------------------------------------------------------------------------------------------------------

cells = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
file_rows = st.lists(
    st.dictionaries(st.sampled_from(["problem", "question", "prompt", "answer", "solution", "id"]), cells, max_size=4)
    | cells,
    max_size=5,
)


@settings(quick, max_examples=300)
@example(rows=[{"problem": {"role": [None]}}], noise=b"", need=False, task="maths")
@given(
    rows=file_rows, noise=st.binary(max_size=20), need=st.booleans(), task=st.sampled_from(["maths", "json", "python"])
)
def test_arbitrary_data_file_gives_problems_or_one_sentence(
    tmp_path: Path, rows: list[Any], noise: bytes, need: bool, task: str
) -> None:
    for name, content in (
        ("a.jsonl", b"\n".join(json.dumps(row).encode() for row in rows) + noise),
        ("a.json", json.dumps(rows).encode() + noise[:1]),
        ("a.parquet", noise),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        source, read = Source(path=str(path)), TASKS[task].gold
        if message := sentence(lambda: load(source, "data.labeled", need_answers=need, gold=read)):  # noqa: B023
            assert message.startswith(f"data.labeled: {path}")
            continue
        loaded = load(source, "data.labeled", need_answers=need, gold=read)
        assert loaded.gold.keys() <= {problem.id for problem in loaded.problems} | set(loaded.contradictions)
        assert all(isinstance(gold, str) and gold for gold in loaded.gold.values())
        without_leaks(loaded, {"itself": loaded})


@quick
@given(rows=file_rows, noise=st.binary(max_size=12))
def test_arbitrary_completions_file_is_graded_or_refused_in_one_sentence(
    tmp_path: Path, rows: list[Any], noise: bytes
) -> None:
    path = tmp_path / "g.jsonl"
    renamed = [
        {"gold": row.get("answer"), "completion": row.get("problem"), "id": row.get("id")}
        if isinstance(row, dict)
        else row
        for row in rows
    ]
    path.write_bytes(b"\n".join(json.dumps(row).encode() for row in renamed) + b"\n" + noise)
    graded: list[dict[str, Any]] = []
    message = sentence(lambda: graded.extend(grade_file(path, task="numeric", workers=1)))
    assert not message or message.startswith(str(path))
    assert all(verdict["reason"] in REASONS for verdict in graded)


@quick
@given(name=st.text(max_size=30))
def test_arbitrary_column_name_is_read_or_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"problem": "a", "answer": "1"}\n')
    source = Source(path=str(path), columns=Columns(problem=name))
    assert ("has no column" in sentence(lambda: load(source, "d", need_answers=True))) == (
        name not in ("problem", "answer")
    )


# Splits ---------------------------------------------------------------------------------------------------------------

problem_texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip), max_size=40
)


@quick
@given(wanted=problem_texts, more=problem_texts, order=st.randoms(use_true_random=False))
def test_split_is_stable_under_reordering_and_added_rows(
    tmp_path: Path, wanted: list[str], more: list[str], order: Any
) -> None:
    """Through the loader, with other spellings of the same problems among the rows; and what the budget buys stays by half."""

    def halves(texts_: list[str]) -> dict[str, int]:
        path = tmp_path / "h.jsonl"
        path.write_text(
            "".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in texts_), encoding="utf-8"
        )
        if not texts_:
            return {}
        loaded = load(Source(path=str(path)), "d", need_answers=True)
        pools = select_labels([problem.id for problem in loaded.problems], None, 0)
        assert {half_of(problem) for problem in pools.first_half} <= {0} and {
            half_of(problem) for problem in pools.second_half
        } <= {1}
        return {problem.id: (0 if problem.id in pools.first_half else 1) for problem in loaded.problems}

    before = halves(wanted)
    rows = [*more, *wanted, *(text.replace(" ", "  ") for text in wanted)]
    order.shuffle(rows)
    after = halves(rows)
    assert {name: after[name] for name in before} == before


@quick
@given(text=st.text(max_size=60), seed=st.integers(0, 5))
def test_spellings_of_one_problem_share_half_and_count_as_leaks(text: str, seed: int) -> None:
    text = f"problem {text}"
    if any("\ud800" <= char <= "\udfff" for char in text):
        return
    spellings = [text, f" {text}\n", f"{text} .", f"({text})", text.replace(" ", "\t ")]
    names = [problem_id(spelling) for spelling in spellings]
    assert names[0] == names[1] == names[4]
    assert len({half_of(name) for name in names}) == 1 == len({family_of(name) for name in names})
    leaks = find_leaks([Problem.of(text, "a")], {"e": [Problem.of(spellings[2 + seed % 2], "b")]})
    assert [leak.why for leak in leaks] == ["exact"]
    assert letters_and_digits(text) == letters_and_digits(spellings[2])


@quick
@given(
    ids=st.lists(st.text("0123456789abcdef", min_size=16, max_size=16), unique=True, max_size=60),
    budget=st.integers(1, 70),
    seed=st.integers(0, 3),
)
def test_budget_buys_exact_number_or_is_refused(ids: list[str], budget: int, seed: int) -> None:
    if budget > len(ids):
        with pytest.raises(UserError, match=r"labels\.budget"):
            select_labels(ids, budget, seed)
        return
    pools = select_labels(ids, budget, seed)
    assert len(pools.all) == len(set(pools.all)) == budget
    assert set(select_labels(list(reversed(ids)), budget, seed).all) == set(pools.all)


def test_property_tests_keep_memory_bounded() -> None:
    """The last of this file: all of the above, torch not counted, in less than 3 GiB."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 * 2**20
