"""The paper's two conditions, from what the stages measured.

C1, the teacher is near its optimum: its accuracy and its own best-of-k before and after RL; during RL, the reward and the
share of groups with at least one correct completion. C2, the student is near its teacher: KL in both directions and the
overlap of their top-k tokens on held-out prompts, at the stage boundaries and during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headwater.report.contrasts import rounded
from headwater.report.stages import STAGE_NAMES


def c1(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """C1: has RL raised the teacher's accuracy to its own best-of-k before RL? `rows` are those of `stage_rows`.

    For each evaluation: accuracy and best-of-k (pass@k at the largest k) of the untrained teacher and after each stage that
    trained it. `reached` is the accuracy after the stage divided by the best-of-k before. `training` holds the reward and the
    best of the group at the first and the last step. None if no teacher was evaluated.
    """
    result: dict[str, Any] = {}
    base: dict[str, Any] = next((row for row in rows if "base_teacher" in row["arms"]), {"accuracy": {}})
    trained = [row for row in rows if row["role"] == "teacher" and row["stage"] in STAGE_NAMES]
    for name in sorted({name for row in (base, *trained) for name in row["accuracy"]}):
        before, after = _accuracy_and_best(base, name), []
        for row in trained:
            measured = _accuracy_and_best(row, name)
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
        result[name] = {"before": before, "after": after}
    return result or None


def _accuracy_and_best(row: dict[str, Any], eval_name: str) -> dict[str, Any] | None:
    if eval_name not in row["accuracy"]:
        return None
    k, best = list(row["pass_at_k"][eval_name].items())[-1]
    return {"accuracy": row["accuracy"][eval_name]["mean"], "best_of_k": best, "k": int(k)}


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
