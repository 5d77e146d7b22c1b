"""Run one node of the plan: train a stage, cache a teacher's rollouts, or evaluate a base model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headwater.errors import TrainingStoppedError
from headwater.runs.cache_node import cache_node
from headwater.runs.evaluate_node import evaluate_node
from headwater.runs.node_context import NodeContext
from headwater.runs.plan import Node
from headwater.runs.train_node import label_note, train_node
from headwater.storage import fault_points
from headwater.storage.run_dir import write_json
from headwater.training.checkpoint import remove_checkpoints

RUNNERS: dict[str, Callable[[Node, NodeContext], dict[str, Any] | None]] = {
    "train": train_node,
    "rollouts": cache_node,
    "evaluate": evaluate_node,
}


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
            "labels": label_note(node, context),
            "settings": None if node.settings is None else node.settings.model_dump(mode="json"),
            "steps": context.steps(node) if node.kind == "train" else None,
        },
    )
    fault_points.failpoint("node.described")
    try:
        ended = RUNNERS[node.kind](node, context)
    except TrainingStoppedError as error:
        raise TrainingStoppedError(f"{node.stage}, {error}") from None
    fault_points.failpoint("node.worked")
    folder.finish({"fingerprint": context.plan.fingerprints[node], **({"ended": ended} if ended else {})})
    fault_points.failpoint("node.done")
    if not context.inputs.recipe.compute.keep_checkpoints:
        remove_checkpoints(folder)
