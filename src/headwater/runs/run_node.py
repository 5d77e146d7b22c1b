"""Run one node of the plan: train a stage, cache a teacher's rollouts, or evaluate a base model."""

from __future__ import annotations

from typing import Any

from headwater.errors import TrainingStoppedError
from headwater.runs.cache_node import cache_node
from headwater.runs.evaluate_node import evaluate_node
from headwater.runs.node import CacheNode, Node, StageNode, TrainNode
from headwater.runs.node_context import NodeContext
from headwater.runs.plan import Plan
from headwater.runs.train_node import label_note, train_node
from headwater.storage import fault_points
from headwater.storage.files import write_json
from headwater.storage.run_dir import RunDir
from headwater.training.checkpoint import remove_checkpoints


def run_node(node: Node, context: NodeContext) -> None:
    """Run a node to its end, or from where it was interrupted. Its DONE file says that it is complete.

    Raises TrainingStoppedError, whose sentence begins with the stage's name.
    """
    folder = context.node_dir(node)
    fault_points.failpoint("node.begun")
    write_json(
        folder.info,
        {
            "name": folder.name,
            "kind": node.kind,
            "stage": node.stage,
            "role": node.role,
            "seed": node.seed,
            "parents": [context.plan.names[parent] for parent in node.parents],
            "fingerprint": context.plan.fingerprints[node],
            "labels": label_note(node, context) if isinstance(node, TrainNode) else None,
            "settings": node.settings.model_dump(mode="json") if isinstance(node, StageNode) else None,
            "steps": context.steps(node) if isinstance(node, TrainNode) else None,
        },
    )
    fault_points.failpoint("node.described")
    try:
        result = _work(node, context)
    except TrainingStoppedError as error:
        raise TrainingStoppedError(f"{node.stage}, {error}") from None
    fault_points.failpoint("node.worked")
    folder.finish({"fingerprint": context.plan.fingerprints[node], **(result or {})})
    fault_points.failpoint("node.done")
    if context.ranks.is_main:
        remove_unneeded(node, context.plan, context.out)


def _work(node: Node, context: NodeContext) -> dict[str, Any] | None:
    """Returns what DONE holds besides the fingerprint."""
    if isinstance(node, TrainNode):
        return train_node(node, context)
    if isinstance(node, CacheNode):
        return cache_node(node, context)
    evaluate_node(node, context)
    return None


def remove_unneeded(node: Node, plan: Plan, out: RunDir) -> None:
    """Delete what nothing reads once a node is finished: its checkpoints, and the distributions of a cache read by all its stages.

    `compute.keep_checkpoints` keeps both.
    """
    if plan.recipe.compute.keep_checkpoints:
        return
    remove_checkpoints(out.node(plan.names[node]))
    if isinstance(node, TrainNode) and node.cache is not None and plan.cached_rollouts(node.cache, out) == 0:
        out.node(plan.names[node.cache]).remove_distributions()
