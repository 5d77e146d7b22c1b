"""RunInputs: lazy reading, once for each input, errors included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headwater.config.arms import ARMS
from headwater.config.builtin import find_recipe
from headwater.config.recipe import Source
from headwater.data.sources import LoadedProblems, load
from headwater.errors import UserError
from headwater.runs.inputs import RunInputs
from headwater.runs.plan import make_plan
from headwater.runs.read_once import InputError
from headwater.types import Verdict
from runs import TINY


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fields of all data sources that are read."""
    fields: list[str] = []

    def counting_load(source: Source, what: str, *settings: Any) -> LoadedProblems:
        fields.append(what)
        return load(source, what, *settings)

    monkeypatch.setattr("headwater.runs.inputs.load", counting_load)
    return fields


def file_of(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_inputs_are_read_lazily_and_once(calls: list[str]) -> None:
    with RunInputs(find_recipe("pocket", list(TINY))) as inputs:
        assert calls == []
        assert inputs.pools and sorted(calls) == ["data.evals.sums", "data.labeled"]
        make_plan(inputs.recipe, tuple(ARMS), (0, 1), inputs.content())
        assert len(inputs.all_problems) == len(inputs.problems) + 5 and inputs.labels.budget == 16
        assert inputs.tokenizer("student") is inputs.tokenizer("student")
    assert len(calls) == 2


def test_stage_reads_rollouts_of_its_steps_at_most_its_pool() -> None:
    """16 labels × 4 samples; 16 rollouts a step."""
    with RunInputs(find_recipe("pocket", list(TINY))) as inputs:
        warmup = inputs.recipe.stages.require("warmup")
        lengths = [warmup.model_copy(update={"steps": steps}) for steps in (0, 1, 3, 9)]
        assert [inputs.cached_rollouts("all", stage) for stage in lengths] == [16, 16, 48, 64]
        assert inputs.cached_rollouts("first_half", lengths[2]) == 32
        assert inputs.cached_rollouts("all", lengths[1], unknown_steps=True) == 64


def test_unreadable_input_is_tried_once_and_named(tmp_path: Path, calls: list[str]) -> None:
    recipe = find_recipe("pocket", [*TINY, f"data.labeled={{path: {tmp_path / 'none.jsonl'}}}"])
    inputs = RunInputs(recipe)
    for read in (lambda: inputs.labeled, lambda: inputs.pools, lambda: inputs.labels, lambda: inputs.problems):
        with pytest.raises(InputError, match=r"data\.labeled: .*none\.jsonl: no such file") as refused:
            read()
        assert refused.value.part == "data" and refused.value.exit_code == 2
    assert calls.count("data.labeled") == 1


@pytest.mark.parametrize(
    ("change", "part", "read"),
    [
        ("task=no_such_module:grade", "task", lambda inputs: inputs.grader),
        ("labels.budget=65", "labels", lambda inputs: inputs.pools),
        ("models.student=/nowhere", "model", lambda inputs: inputs.tokenizer("student")),
        ("models.expert=null", "model", lambda inputs: inputs.weights_fingerprint("expert")),
    ],
)
def test_input_error_names_its_input(change: str, part: str, read: Any) -> None:
    with pytest.raises(InputError) as refused:
        read(RunInputs(find_recipe("pocket", [*TINY, change])))
    assert refused.value.part == part


def test_bought_label_without_answer_is_refused_by_run(
    tmp_path: Path,
) -> None:
    rows = [{"problem": f"{n}+{n}", "answer": str(2 * n)} for n in range(10, 30)]
    path = file_of(tmp_path / "labeled.jsonl", *rows, {"problem": "1+1", "answer": None})
    recipe = find_recipe("pocket", [*TINY, f"data.labeled={{path: {path}}}", "labels.budget=21"])
    with pytest.raises(UserError, match="row 21: the problem has no answer"):
        _ = RunInputs(recipe).labeled
    lenient = RunInputs(recipe, need_answers=False)
    assert len(lenient.labeled.without_answer) == 1
    with pytest.raises(InputError, match="1 of the 21 problems that the budget buys have no answer"):
        _ = lenient.labels


def test_wrapped_grader_grades_every_label_and_shares_budget() -> None:
    graded: list[str] = []

    def wrap(grade: Any) -> Any:
        def grade_and_note(pairs: Any) -> list[Verdict]:
            graded.extend(text for _, text in pairs)
            return [Verdict(True, "noted") for _ in pairs]

        return grade_and_note

    inputs = RunInputs(find_recipe("pocket", list(TINY)))
    wrapped = inputs.with_grader(wrap)
    label = inputs.pools.all[0]
    assert wrapped.labels.check([(label, "a")])[0].reason == "noted" and inputs.labels.looked_at == {label}
    problems, labels = wrapped.evals["sums"]
    assert labels.check([(problems[0].id, "b")])[0].correct
    assert graded == ["a", "b"] and wrapped.labeled is inputs.labeled


def test_estimate_assumes_limit_for_missing_file(tmp_path: Path) -> None:
    missing = f"data.labeled={{path: {tmp_path / 'none.jsonl'}, limit: 40}}"
    inputs = RunInputs.for_estimate(find_recipe("pocket", [*TINY, missing]))
    assert len(inputs.pool("all")) == 16 and len(inputs.labeled.problems) == 40
    assert inputs.missing == [
        f"data.labeled: {tmp_path / 'none.jsonl'} is not here; assumed to hold 40 problems, its limit"
    ]
