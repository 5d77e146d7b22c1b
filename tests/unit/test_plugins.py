"""A user's own functions, by `module:function`, by entry point and passed to the Python API."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest
import torch

from headwater import plugins
from headwater.api import read_recipe
from headwater.config.objectives import OBJECTIVES
from headwater.config.recipe import Recipe
from headwater.config.samplers import SAMPLERS
from headwater.errors import UserError
from headwater.losses.objectives import objective_of
from headwater.runs import trackers
from headwater.runs.plan import make_plan
from headwater.sampling.build import importance_cap, sampler_factory
from headwater.storage.run_dir import RunDir
from headwater.tasks.registry import find_task, grader_code
from tiny import tiny_policy

CODE = """
from headwater.config.objectives import ObjectiveSpec, objective
from headwater.config.samplers import sampler
from headwater.losses.objectives import Objective
from headwater.runs.trackers import Tracker


def same_case(gold, completion):
    return gold.isupper() == completion.isupper()


@objective(ObjectiveSpec("twice", source="policy", signals=("reward",), stages=("student_rl",)))
def doubled(stage):
    return Objective(stage, ((2.0, lambda tokens: tokens.advantages_N),))


def undeclared(stage):
    return None


@sampler(trainer_logp=False)
def echo(recipe):
    return lambda policy: ("sampler of", recipe.name, policy)


def collecting(out):
    return Tracker(lambda node, step, values: None, lambda: None)
"""
ENTRY_POINTS = """
[headwater.tasks]
case = my_plugin:same_case
broken = my_plugin:missing
[headwater.objectives]
doubled = my_plugin:doubled
[headwater.samplers]
echo = my_plugin:echo
[headwater.trackers]
collecting = my_plugin:collecting
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `my_plugin` and an installed distribution that names its functions."""
    (tmp_path / "my_plugin.py").write_text(CODE, encoding="utf-8")
    info = tmp_path / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    objectives, samplers = dict(OBJECTIVES), dict(SAMPLERS)
    yield tmp_path
    sys.modules.pop("my_plugin", None)
    for table, rows in ((OBJECTIVES, objectives), (SAMPLERS, samplers)):
        table.clear()  # type: ignore[attr-defined]
        table.update(rows)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["case", "my_plugin:same_case"])
def test_find_task_takes_entry_points_and_names(name: str, plugin: Path) -> None:
    task = find_task(name)
    assert task.grade("A", "B") == (True, "equal") and task.grade("A", "b") == (False, "different")
    assert task.bounded  # a user's grader runs in a worker process
    assert grader_code(name) == plugins.code_fingerprint("my_plugin")


def test_unknown_names_list_entry_points(plugin: Path) -> None:
    with pytest.raises(UserError, match=r"task 'cases' is unknown; the tasks are sums, .*broken, case, or package"):
        find_task("cases")
    with pytest.raises(UserError, match=r"task broken: my_plugin has no function missing"):
        find_task("broken")
    with pytest.raises(UserError, match=r"--track x: no such tracker; there are .*trackio, collecting, or package"):
        trackers.openers(["x"])


@pytest.mark.parametrize("name", ["doubled", "my_plugin:doubled"])
def test_user_objective_has_its_loss(name: str, plugin: Path) -> None:
    recipe = read_recipe("pocket", {"stages.student_rl.objective": name})
    stage = recipe.stages.student_rl
    assert stage is not None and stage.needs_labels and not stage.needs_teacher
    objective = objective_of(stage)

    class Tokens:
        advantages_N = torch.tensor([1.0, -3.0])
        old_logp_N = torch.zeros(2)

    assert objective.token_loss(Tokens()).tolist() == [2.0, -6.0]  # type: ignore[arg-type]


def test_user_objective_is_refused_outside_its_stages_or_undeclared(plugin: Path) -> None:
    with pytest.raises(UserError, match=r"stages.opd"):
        read_recipe("pocket", {"stages.opd.objective": "doubled"})
    with pytest.raises(
        UserError, match=r"my_plugin:undeclared is not declared with @headwater.config.objectives.objective"
    ):
        read_recipe("pocket", {"stages.student_rl.objective": "my_plugin:undeclared"})
    with pytest.raises(
        UserError, match=r"my_plugin:undeclared is not declared with @headwater.config.samplers.sampler"
    ):
        read_recipe("pocket", {"compute.sampler": "my_plugin:undeclared"})


def test_user_sampler_is_made_from_recipe(plugin: Path) -> None:
    recipe = read_recipe("pocket", {"compute.sampler": "echo"})
    policy = tiny_policy()
    assert sampler_factory(recipe)(policy) == ("sampler of", "pocket", policy)  # type: ignore[comparison-overlap]
    assert importance_cap(recipe) == recipe.compute.vllm.importance_cap  # its log-probs are not the trainer's


def fingerprints(recipe: Recipe) -> set[str]:
    content = {
        "models": lambda role: role,
        "pools": {key: ["p"] for key in ("all", "first_half", "second_half")},
        "labels": dict.fromkeys(("all", "first_half", "second_half"), "l"),
        "unlabeled": [], "evals": {}, "validation": None,
    }  # fmt: skip
    plan = make_plan(recipe, ["direct_grpo"], [0], content)
    return {plan.fingerprints[node] for node in plan.order() if node.kind == "train"}


@pytest.mark.parametrize("change", [{"stages.student_rl.objective": "doubled"}, {"compute.sampler": "echo"}])
def test_fingerprint_follows_plugin_code(change: dict[str, str], plugin: Path) -> None:
    before = fingerprints(read_recipe("pocket", change))
    assert before == fingerprints(read_recipe("pocket", change)) != fingerprints(read_recipe("pocket"))
    (plugin / "my_plugin.py").write_text(CODE.replace("2.0", "3.0"), encoding="utf-8")
    assert fingerprints(read_recipe("pocket", change)) != before


def test_openers_take_names_functions_and_callbacks(plugin: Path, tmp_path: Path) -> None:
    steps = []
    opened = trackers.openers(["collecting", "my_plugin:collecting"], [lambda *step: steps.append(step)])
    assert list(opened) == ["collecting", "my_plugin:collecting", "callback 0"]
    opened["callback 0"](RunDir(tmp_path)).log("node", 1, {"reward": 0.5})
    assert steps == [("node", 1, {"reward": 0.5})]


def test_name_of_gives_importable_name(plugin: Path) -> None:
    function = plugins.find("task", "my_plugin:same_case")
    assert isinstance(function, FunctionType)
    assert plugins.name_of(function, "task") == "my_plugin:same_case"
    assert read_recipe("pocket", {"task": function}).task == "my_plugin:same_case"
    assert (
        read_recipe({**read_recipe("pocket").model_dump(mode="json"), "task": function}).task == "my_plugin:same_case"
    )


def test_name_of_refuses_functions_without_importable_name() -> None:
    def inner(gold: str, completion: str) -> bool:
        return True

    for function in (lambda gold, completion: True, inner, str.lower):
        with pytest.raises(
            UserError, match=r"^task .*: other processes cannot import it; define it with `def` at the top"
        ):
            plugins.name_of(function, "task")


def test_changes_as_values_equal_changes_as_texts() -> None:
    values = {"stages.opd.optim.lr": 1e-6, "labels.budget": 8, "models.lora": {"r": 4}, "compute.workers": None}
    texts = ["stages.opd.optim.lr=1e-6", "labels.budget=8", "models.lora={r: 4}", "compute.workers=null"]
    assert read_recipe("pocket", values) == read_recipe("pocket", texts)
    assert read_recipe("pocket", {"models.student": Path("/m")}).models.student == "/m"
