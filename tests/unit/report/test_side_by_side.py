"""Runs of different recipes side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fake_runs import ARMS, TEACHER, by_problem, fake_run, graded
from headwater.errors import UserError
from headwater.report import side_by_side
from headwater.report.side_by_side import differing_settings


def changed_recipe(out: Path, **changes: object) -> Path:
    recipe = json.loads((out / "recipe.json").read_text())
    (out / "recipe.json").write_text(json.dumps({**recipe, **changes}))
    return out


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A run of direct GRPO and the bridge, and one of the bridge alone with another learning rate and other results."""
    arms = {name: ARMS[name] for name in ("direct_grpo", "bridge")}
    first = fake_run(tmp_path / "a" / "run", seeds=(0,), arms=arms)
    bridge = [node._replace(times=2.0) if node == TEACHER else node for node in ARMS["bridge"]]
    second = fake_run(tmp_path / "b" / "run", seeds=(0,), arms={"bridge": bridge}, correct=lambda *_: True)
    changed_recipe(first, stages={"opd": {"optim": {"lr": 1e-3}, "steps": 12}})
    changed_recipe(second, stages={"opd": {"optim": {"lr": 1e-4}, "steps": 12}})
    return [first, second]


@pytest.mark.usefixtures("undrawn")
def test_comparison_has_row_for_each_arm_and_run(runs: list[Path], tmp_path: Path) -> None:
    values = side_by_side.write(tmp_path, runs)
    correct = [sum(map(sum, by_problem(graded(out, "bridge", 0), "correct").values())) / 240 for out in runs]
    assert correct[1] == 1.0
    means = {name: run["arms"]["bridge"]["accuracy"]["sums"]["mean"] for name, run in values["runs"].items()}
    assert means == {"a/run": pytest.approx(correct[0], abs=1e-6), "b/run": 1.0}
    assert values["settings"] == {"stages.opd.optim.lr": {"a/run": 1e-3, "b/run": 1e-4}}
    (difference,) = values["differences"]
    assert (difference["a"], difference["b"], difference["arm"]) == ("b/run", "a/run", "bridge")
    assert difference["difference"] == pytest.approx(1.0 - correct[0], abs=1e-6)
    accuracy = side_by_side.tables(values)[0]
    groups = [
        row if isinstance(row, str) else [column.cell(row) for column in accuracy.columns] for row in accuracy.rows
    ]
    assert groups[-3].startswith("bridge: ") and [cells[0] for cells in groups[-2:]] == ["a/run", "b/run"]
    assert groups[-1][1].startswith("100.0 [") and groups[-1][2].mean == 1.0 and groups[-1][3] == "96"
    (row,) = [row for row in groups if isinstance(row, str) and row.startswith("direct_grpo")]
    assert groups[groups.index(row) + 1][0] == "a/run" and isinstance(
        groups[groups.index(row) + 2], str
    )  # b has no such arm
    assert json.loads((tmp_path / "compare.json").read_text()) == values
    costs = "96 labels, [\\d.]+ GFLOPs and \\d+\u00a0s of training"
    assert re.search(rf"b/run: bridge 100\.0 % \({costs}\)\.$", side_by_side.headline(values))


def test_comparison_page_draws_curves_of_all_runs(runs: list[Path], tmp_path: Path) -> None:
    before = (runs[0] / "plan.json").read_bytes()
    side_by_side.write(tmp_path, runs)
    page = (tmp_path / "compare.html").read_text()
    assert re.search(
        r"reward \(share correct\) over training steps, 1 seed: a/run: bridge from .*; b/run: bridge from ", page
    )
    assert page.count("reward (share correct) over training steps") == 2  # one panel of the teacher, one of the student
    assert not (runs[0] / "report.html").exists() and (runs[0] / "plan.json").read_bytes() == before


def test_runs_are_of_one_recipe_if_only_free_fields_differ(runs: list[Path], tmp_path: Path) -> None:
    assert not side_by_side.of_one_recipe(runs)
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(UserError, match="do not have the format"):
        side_by_side.of_one_recipe([tmp_path, runs[0]])
    (tmp_path / "recipe.json").unlink()
    assert side_by_side.of_one_recipe([runs[0], tmp_path])  # a folder without a run is refused by the report
    assert side_by_side.of_one_recipe([changed_recipe(runs[0], seed=7, stages={}), changed_recipe(runs[1], stages={})])
    with pytest.raises(UserError, match="holds no run"):
        side_by_side.write(tmp_path / "out", [runs[0], tmp_path])


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a", "old/b"], ["a", "b"]),
        (["x/run", "y/run"], ["x/run", "y/run"]),
        (["a/b/c", "d/b/c"], ["a/b/c", "d/b/c"]),
    ],
)
def test_run_names_are_shortest_distinct_paths(folders: list[str], names: list[str]) -> None:
    assert side_by_side.run_names([Path("/data", folder) for folder in folders]) == names


@pytest.mark.parametrize(("code", "state"), [(4, "stopped"), (1, "failed")])
@pytest.mark.usefixtures("undrawn")
def test_comparison_tells_stopped_from_failed_arm(runs: list[Path], tmp_path: Path, code: int, state: str) -> None:
    values = side_by_side.write(tmp_path, runs)
    arm = values["runs"]["b/run"]["arms"]["bridge"]
    failure = {"state": "failed", "sentence": "opd, step 3 of 12: no gradient", "stage": "opd", "code": code}
    arm |= {"accuracy": {}, "failed": {"0": failure}}
    accuracy = side_by_side.tables(values)[0]
    assert accuracy.columns[1].cell(accuracy.rows[-1]) == state


def test_section_of_one_recipe_alone_is_one_row() -> None:
    warmup = {"steps": 4, "optim": {"lr": 1e-3}}
    plain = {"seed": 0, "stages": {"opd": None, "warmup": warmup}}
    opd = {"steps": 8, "optim": {"lr": 1e-4, "beta1": 0.9}}
    longer = {"seed": 0, "stages": {"opd": opd, "warmup": {"steps": 4, "optim": {"lr": 2e-3}}}}
    assert differing_settings({"a": plain, "b": longer}) == {
        "stages.opd": {"a": None, "b": "3 fields"},
        "stages.warmup.optim.lr": {"a": 1e-3, "b": 2e-3},
    }
