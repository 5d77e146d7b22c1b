"""The paper's two conditions, from what the stages measured.

C1, the teacher is near its optimum: its accuracy and its own best-of-k before and after RL; during RL, the reward and the
share of groups with at least one correct completion. C2, the student is near its teacher: KL in both directions and the
overlap of their top-k tokens on held-out prompts, at the stage boundaries and during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headwater.report.contrasts import rounded
from headwater.report.stages import STAGE_NAMES, accuracy_and_best


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
        before = accuracy_and_best(base, name)
        goal = before["best_of_k"] if before else 0.0
        after = [
            {
                **{key: row[key] for key in ("stage", "pool", "arms")},
                **measured,
                "training": {key: row["ends"][key] for key in ("reward", "best_of_group") if key in row["ends"]},
                "reached": rounded(measured["accuracy"] / goal) if goal else None,
            }
            for row in trained
            if (measured := accuracy_and_best(row, name))
        ]
        result[name] = {"before": before, "after": after}
    return result or None


def c2(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """C2: distance of student and teacher at the start and the end of each student stage. `rows` are `stage_rows(study)`.

    arm -> stage -> `distance` of that stage. None if it was measured for no stage.
    """
    result: dict[str, Any] = {}
    for row in rows:
        if measures := distance(row):
            for arm in row["arms"]:
                result.setdefault(arm, {})[row["stage"]] = measures
    return result or None


def distance(row: dict[str, Any]) -> dict[str, Any] | None:
    """measure -> {"first", "last"} of a student's stage, means over seeds; KL and entropy in nats per token.

    `prompts` names the prompts: "held out", measured at the stage boundaries, or "training", measured at the first and the
    last step, for runs that did not measure the conditions. None if neither was measured.
    """
    ends = {key: row["ends"][key] for key in ("kl_teacher_student", "kl_student_teacher") if key in row["ends"]}
    if row["role"] != "student" or not (row["conditions"] or ends):
        return None
    return {"prompts": "held out", **row["conditions"]} if row["conditions"] else {"prompts": "training", **ends}
