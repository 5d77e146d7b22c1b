"""The way of each arm through its stages: accuracy before, between and after them."""

from __future__ import annotations

from typing import Any

SHORT = {"teacher_rl": "RL", "sft": "SFT", "warmup": "warm-up", "opd": "OPD", "student_rl": "RL"}


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
    stages = [stage for stage in arm["stages"] if stage["role"] == role and stage["stage"] in SHORT]
    scored = any(stage["stage"] == "teacher_rollouts" or stage["tokens"]["teacher_scored"] for stage in arm["stages"])
    if role == "teacher" and not stages and not scored:
        return "–"
    before = report["arms"].get(f"base_{role}", {}).get("accuracy", {}).get(eval_name)
    parts = [_percent(before)]
    parts += [f"{SHORT[stage['stage']]} {_percent(stage['accuracy'].get(eval_name))}" for stage in stages]
    return " → ".join(parts)


def _percent(accuracy: dict[str, Any] | None) -> str:
    return "?" if accuracy is None else f"{100 * accuracy['mean']:.1f}"
