"""The way of each arm through its stages: accuracy before, between and after them."""

from __future__ import annotations

from typing import Any

from headwater.config.objectives import OBJECTIVES

SHORT = {"teacher_rl": "RL", "sft": "SFT", "warmup": "warm-up", "opd": "OPD", "student_rl": "RL"}
STAGE_TEXT = {
    "teacher_rl": "Teacher RL",
    "warmup": "Warm-up",
    "opd": "On-policy distillation",
    "student_rl": "Student RL",
    "sft": "SFT",
}
"""In the order in which a reader meets them."""
UNTRAINED_TEXT = {
    "base_student": "Student before",
    "base_teacher": "Teacher before",
    "teacher_rollouts": "Teacher's rollouts",
}
"""Nodes that train nothing."""


def stage_name(stage: str, objective: str = "", role: str = "") -> str:
    """A stage by what it does, also where an arm puts another objective in its place.

    Example: `stage_name("opd", "mixed")` is `On-policy distillation mixed with reward`; `stage_name("sft", "sft", "teacher")`
    is `SFT of the teacher`.
    """
    title = STAGE_TEXT.get(stage) or UNTRAINED_TEXT.get(stage, stage)
    if stage == "sft" and role:
        title = f"{title} of the {role}"
    replaced = report_title(objective)
    return replaced.format(stage=title) if replaced else title


def report_title(objective: str) -> str:
    """The title that an objective gives its stage; empty for a stage's usual objective and for one that is unknown here."""
    return OBJECTIVES[objective].report_title if objective in OBJECTIVES else ""


def steps_of(report: dict[str, Any], arm: dict[str, Any], role: str) -> list[tuple[str, dict[str, Any]]]:
    """The model before, and the stages that trained it, by their short names; the values of report.json for each.

    Example: `[("before", {"accuracy": …}), ("warm-up", …), ("OPD", …)]`.
    """
    stages = [stage for stage in arm["stages"] if stage["role"] == role and stage["stage"] in SHORT]
    objectives = [stage.get("objective", "") for stage in stages]
    named = [
        (o if report_title(o) else SHORT[stage["stage"]], stage) for o, stage in zip(objectives, stages, strict=True)
    ]
    return [("before", report["arms"].get(f"base_{role}", {})), *named]


def paths(report: dict[str, Any], eval_name: str) -> list[tuple[str, str, str]]:
    """(arm, the teacher's way, the student's way) in percent, for arms that train; `?` where a stage has no evaluation yet.

    Example: `("bridge", "22.1 → RL 96.3", "8.9 → warm-up 53.2 → OPD 67.5")`.
    """
    rows = []
    for name, arm in report["arms"].items():
        if name.startswith("base_"):
            continue
        ways = [_way(report, arm, role, eval_name) for role in ("teacher", "student")]
        rows.append((name, ways[0], ways[1]))
    return rows


def _way(report: dict[str, Any], arm: dict[str, Any], role: str, eval_name: str) -> str:
    steps = steps_of(report, arm, role)
    scored = any(stage["stage"] == "teacher_rollouts" or stage["tokens"]["teacher_scored"] for stage in arm["stages"])
    if role == "teacher" and len(steps) == 1 and not scored:
        return "–"
    parts = [_percent(stage.get("accuracy", {}).get(eval_name)) for _, stage in steps]
    return " → ".join([parts[0], *(f"{name} {part}" for (name, _), part in zip(steps[1:], parts[1:], strict=True))])


def _percent(accuracy: dict[str, Any] | None) -> str:
    return "?" if accuracy is None else f"{100 * accuracy['mean']:.1f}"
