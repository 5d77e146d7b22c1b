"""The paper's two conditions, from what the stages measured.

C1, the teacher is near its optimum: its accuracy and its own best-of-k before and after RL; during RL, the reward and the
share of groups with at least one correct completion. C2, the student is near its teacher: KL in both directions and the
overlap of their top-k tokens on held-out prompts, at the stage boundaries and during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headwater.report.contrasts import accuracy, mean, pass_at, rounded
from headwater.report.study import EvalCounts, Study

C2_MEASURES = (
    "kl_teacher_student", "kl_student_teacher", "overlap_teacher_prefixes", "overlap_student_prefixes", "entropy_student",
    "entropy_teacher",
)  # fmt: skip


def c1(study: Study, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """C1: has RL raised the teacher's accuracy to its own best-of-k before RL? `rows` are `stage_rows(study)`.

    For each evaluation: accuracy and best-of-k (pass@k at the largest k) of the untrained teacher and after each stage that
    trained it. `reached` is the accuracy after the stage divided by the best-of-k before. `training` holds the reward and the
    best of the group at the first and the last step. None if no teacher was evaluated.
    """
    result: dict[str, Any] = {}
    base_nodes = [nodes[-1] for nodes in study.arms.get("base_teacher", {}).values() if nodes[-1].done]
    trained = [
        (row, [node for node in by_seed.values() if node.done])
        for row, (_, by_seed) in zip(rows, study.stage_groups(), strict=True)
        if all(node.role == "teacher" and node.trained for node in by_seed.values())
    ]
    for name in sorted({name for node in base_nodes for name in node.evals} | set(study.evals)):
        before = _accuracy_and_best([node.evals[name] for node in base_nodes if name in node.evals])
        after = []
        for row, nodes in trained:
            measured = _accuracy_and_best([node.evals[name] for node in nodes if name in node.evals])
            if measured is not None:
                reached = measured["accuracy"] / before["best_of_k"] if before and before["best_of_k"] else None
                after.append(
                    {
                        **{key: row[key] for key in ("stage", "pool", "arms")},
                        **measured,
                        "training": {k: row["ends"][k] for k in ("reward", "best_of_group") if k in row["ends"]},
                        "reached": None if reached is None else rounded(reached),
                    }
                )
        if before or after:
            result[name] = {"before": before, "after": after}
    return result or None


def _accuracy_and_best(evals: Sequence[EvalCounts]) -> dict[str, Any] | None:
    if not evals:
        return None
    k = min(counts.samples for counts in evals)
    best = mean(float(pass_at(k)(counts).mean()) for counts in evals)
    return {"accuracy": mean(float(accuracy(counts).mean()) for counts in evals), "best_of_k": best, "k": k}


def c2(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """C2: distance of student and teacher at the start and the end of each student stage. `rows` are `stage_rows(study)`.

    arm -> stage -> measure -> {"first", "last"}, means over seeds; KL and entropy in nats per token. `prompts` names the
    prompts: "held out", measured at the stage boundaries, or "training", measured at the first and the last step, for runs
    that did not measure the conditions. None if neither was measured.
    """
    result: dict[str, Any] = {}
    for row in rows:
        ends = {key: row["ends"][key] for key in ("kl_teacher_student", "kl_student_teacher") if key in row["ends"]}
        if row["role"] != "student" or not (row["conditions"] or ends):
            continue
        measures = (
            {"prompts": "held out", **row["conditions"]} if row["conditions"] else {"prompts": "training", **ends}
        )
        for arm in row["arms"]:
            result.setdefault(arm, {})[row["stage"]] = measures
    return result or None
