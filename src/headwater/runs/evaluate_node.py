"""Evaluate a model on every evaluation set of the recipe."""

from __future__ import annotations

from headwater.runs.display import ACCURACY
from headwater.runs.node import Node
from headwater.runs.node_context import NodeContext
from headwater.storage import fault_points
from headwater.storage.files import write_rows
from headwater.storage.ledger import record
from headwater.teachers.build import Teacher
from headwater.training.update import Metrics


def evaluate_node(node: Node, context: NodeContext) -> None:
    """Evaluate a base model."""
    context.node_dir(node).cut_back_to(-1)
    run_evals(context.frozen(node.start), node, context, "final", 0)


def run_evals(policy: Teacher, node: Node, context: NodeContext, when: str, step: int) -> None:
    """Run every evaluation of the recipe; write its graded completions and its ledger row (purpose `eval`).

    when  `final`, or `step-000010` for an evaluation between two steps

    Raises StopRequested when asked to stop; evaluations between two steps that are written by then are not repeated.
    """
    folder, progress, evals = context.node_dir(node), context.progress, context.inputs.evals
    final = when == "final"
    advance = progress.advance_or_stop if final else lambda count: progress.check_stop()
    accuracies: Metrics = {}
    if final:
        completions = sum(len(problems) for problems, _ in evals.values()) * context.inputs.recipe.evaluate.samples
        progress.start(0, completions, "completions evaluated")

    for name, held_out in evals.items():
        fault_points.failpoint("evaluation.begun")
        if not final and context.ranks.broadcast(folder.has_kept(folder.evaluation(when, name))):
            continue
        # Every model answers a problem with the same random numbers, which makes paired comparisons less noisy.
        draw = (node.seed, "eval", name)
        rows, spend = context.grade_held_out(node, policy, held_out, "eval", step, draw, advance)
        if final:
            write_rows(folder.evaluation(when, name), rows)
        else:
            folder.keep(step, folder.evaluation(when, name), rows)
        fault_points.failpoint("evaluation.written")
        record(folder.ledger, spend)
        fault_points.failpoint("evaluation.charged")
        accuracies[f"{ACCURACY}{name}"] = sum(row["correct"] for row in rows) / len(rows)
    if final:
        progress.advance(0, accuracies)
