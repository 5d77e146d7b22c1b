"""Stages that must not use labels complete with a `Labels` object that raises on every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headwater.config.builtin import find_recipe
from headwater.data.labels import Labels
from headwater.runs.display import NodeProgress
from headwater.runs.inputs import RunInputs
from headwater.runs.node import Node
from headwater.runs.node_context import NodeContext
from headwater.runs.plan import Plan
from headwater.runs.run_node import run_node
from headwater.runs.setup import prepared
from headwater.storage.run_dir import RunDir
from runs import TINY, rows


class TouchedError(AssertionError):
    pass


def forbidden() -> Any:
    """A `Labels` that raises whatever is done with it."""

    def refuse(name: str) -> Callable[..., Any]:
        def touched(*_: Any, **__: Any) -> Any:
            raise TouchedError(f"Labels.{name} was used")

        return touched

    names = [*(name for name in vars(Labels) if callable(getattr(Labels, name))), "__getattribute__"]
    return type("Forbidden", (), {name: refuse(name) for name in names if name not in ("__init__", "__class__")})()


def run_without_labels(
    arm: str, out: Path, *changes: str, but: Callable[[Node], bool] = lambda node: False
) -> list[Node]:
    """Run an arm's nodes with forbidden labels, apart from those that `but` chooses; the nodes that ran so.

    Evaluation keeps labels of its own: the answer of a held-out problem is used, and counted apart.
    """
    recipe = find_recipe("pocket", [*TINY, *changes])
    with prepared(recipe, [arm], [0]) as (plan, inputs):
        return run_nodes(plan, inputs, RunDir(out), but)


def with_labels(inputs: RunInputs, labels: Labels) -> RunInputs:
    return replace(inputs, memo={**inputs.memo, ("labels",): labels})


def run_nodes(plan: Plan, inputs: RunInputs, out: RunDir, but: Callable[[Node], bool]) -> list[Node]:
    watch = NodeProgress(lambda done, total, unit: None, lambda count, metrics: None, lambda: False)
    blind = []
    for node in plan.order():
        if but(node):
            run_node(node, NodeContext(plan, inputs, out, watch))
        else:
            run_node(node, NodeContext(plan, with_labels(inputs, forbidden()), out, watch))
            blind.append(node)
    return blind


def teacher_rl(node: Node) -> bool:
    return node.stage == "teacher_rl"


@pytest.mark.parametrize(
    ("arm", "stages"),
    [
        ("raw_teacher", {"warmup", "opd"}),
        ("sft_teacher", {"sft", "warmup", "opd"}),
        ("bridge", {"warmup", "opd"}),
        ("opd_only", {"opd"}),
        ("warmup_only", {"warmup"}),
        ("teacher_sft", {"sft"}),
    ],
)
def test_dense_stages_of_every_arm_complete_with_raising_labels(arm: str, stages: set[str], tmp_path: Path) -> None:
    blind = run_without_labels(arm, tmp_path, but=teacher_rl)
    assert {node.stage for node in blind if node.kind == "train"} == stages
    for path in (tmp_path / "nodes").iterdir():
        assert (path / "DONE").exists()
        if path.name.split(".")[0] in stages:
            assert len(rows(path / "metrics.jsonl")) == 2
            assert all(row["tokens_trained"] > 0 for row in rows(path / "metrics.jsonl"))


@pytest.mark.parametrize("divergence", ["forward", "jsd", "sampled"])
def test_every_opd_divergence_completes_with_raising_labels(divergence: str, tmp_path: Path) -> None:
    blind = run_without_labels("raw_teacher", tmp_path, f"stages.opd.dense.divergence={divergence}")
    assert {node.stage for node in blind if node.kind == "train"} == {"warmup", "opd"}


def test_mixed_stage_of_share_zero_completes_with_raising_labels(tmp_path: Path) -> None:
    changes = ("stages.opd.objective=mixed", "stages.opd.sparse_share=0.0", "stages.opd.group_size=4")
    blind = run_without_labels("raw_teacher", tmp_path, *changes)
    assert "opd" in {node.stage for node in blind}


@pytest.mark.parametrize("arm", ["direct_grpo", "bridge"])
def test_sparse_stages_fail_with_raising_labels(arm: str, tmp_path: Path) -> None:
    with pytest.raises(TouchedError):
        run_without_labels(arm, tmp_path)


def test_mixed_stage_with_sparse_share_fails_with_raising_labels(tmp_path: Path) -> None:
    changes = ("stages.opd.objective=mixed", "stages.opd.sparse_share=0.5", "stages.opd.group_size=4")
    with pytest.raises(TouchedError):
        run_without_labels("raw_teacher", tmp_path, *changes)


def test_stage_receives_labels_of_its_own_pool_only(tmp_path: Path) -> None:
    """With the second half's answers in nobody's reach, everything but stage 3 runs as ever."""
    recipe = find_recipe("pocket", list(TINY))
    watch = NodeProgress(lambda done, total, unit: None, lambda count, metrics: None, lambda: False)
    with prepared(recipe, ["bridge_rl"], [0]) as (plan, inputs):
        half = with_labels(inputs, inputs.labels.only(inputs.pools.first_half))
        for node in plan.order():
            context = NodeContext(plan, half, RunDir(tmp_path), watch)
            if node.stage == "student_rl":
                with pytest.raises(KeyError):
                    run_node(node, context)
            else:
                run_node(node, context)


def test_evaluation_grading_does_not_count_as_label_use() -> None:
    recipe = find_recipe("pocket", list(TINY))
    with prepared(recipe, ["bridge"], [0]) as (_, inputs):
        problems, labels = inputs.evals["sums"]
        labels.check([(problems[0].id, "=1")])
        assert labels.looked_at == {problems[0].id}
        assert inputs.labels.looked_at == set() and inputs.labels.checks == 0
        assert not {problem.id for problem in problems} & set(inputs.pools.all)
