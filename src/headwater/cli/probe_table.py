"""What the probe found, for a terminal: one table of the two models, one of what lies between them, and the advice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from headwater.report.format import percent, plain_table, units


def text(found: dict[str, Any]) -> Group:
    """Everything that probe.json holds, in words."""
    labels = found["labels"]
    looked = (
        f"{labels['looked_at']} of the {labels['budget']} labels of the budget were looked at ({labels['checks']:,} checks); they are "
        f"the same that training would use. {found['seconds']:.0f} s"
    )
    parts: list[Table | Text] = [_models(found), _between(found), Text(looked), Text(""), *_advice(found["advice"])]
    return Group(*parts)


def _models(found: dict[str, Any]) -> Table:
    table = plain_table(
        f"{found['recipe']} · seed {found['seed']} · {found['problems']} problems × {found['samples']} samples"
    )
    student, teacher = (found["models"][role] for role in ("student", "teacher"))
    group = f"groups of {student['group_size']}"
    if student["group_size"] != teacher["group_size"]:
        group = f"groups of {student['group_size']} and {teacher['group_size']}"
    for head in ("", "student", "teacher"):
        table.add_column(head, justify="left" if head == "" else "right")

    def row(name: str, values: Sequence[str]) -> None:
        table.add_row(name, *values)

    both = (student, teacher)
    row("pass rate, % [95 %]", [_interval(one["pass_rate"]) for one in both])
    for k in student["pass_at"]:
        row(f"pass@{k}, %", [percent(one["pass_at"][k]) for one in both])
    row("C1: reward / best of all samples", ["–" if one["c1"] is None else f"{one['c1']:.2f}" for one in both])
    row(f"informative {group}, % [95 %]", [_interval(one["informative"]) for one in both])
    row("  by 1 − p^G − (1−p)^G, %", [percent(one["informative_formula"]) for one in both])
    row("ended by a stop token, %", [percent(one["ended"]) for one in both])
    row("cut at the token limit, %", [percent(one["truncated"]) for one in both])
    row("entropy, nats a token", [f"{one['entropy']:.2f}" for one in both])
    row("tokens a completion", [units(one["tokens"]) for one in both])
    return table


def _between(found: dict[str, Any]) -> Table:
    table, c2, finish = plain_table("between them (C2)"), found["conditions"]["C2"], found["finish"]
    for head in ("", "on student prefixes", "on teacher prefixes"):
        table.add_column(head, justify="left" if head == "" else "right")
    table.add_row("KL(student‖teacher), nats a token", f"{c2['kl_student_teacher']:.3f}", "")
    table.add_row("KL(teacher‖student), nats a token", "", f"{c2['kl_teacher_student']:.3f}")
    overlaps = [c2[f"overlap_{role}_prefixes"] for role in ("student", "teacher")]
    table.add_row("overlap of the likeliest tokens, %", *(percent(one) for one in overlaps))
    if finish is not None:
        table.caption = (
            f"from the first quarter of a right answer of the teacher ({finish['problems']} problems) the student ends right "
            f"{_interval(finish['student'])} % of the time,\nthe teacher {_interval(finish['teacher'])} %; "
            f"on those answers KL(teacher‖student) is {finish['kl']:.3f}; the warm-up would go {found['cache_passes']:.1f} times "
            "through each"
        )
    return table


def _advice(advice: dict[str, Any]) -> list[Text]:
    labels, warmup = advice["labels"], advice["warmup"]
    where = {
        "teacher": "labels upstream, on the teacher (arm bridge)",
        "student": "labels on the student (arm direct_grpo)",
        "nowhere": "labels nowhere yet",
    }[labels["where"]]
    close = "; it is close" if labels["close"] else ""
    named = [
        ("Labels", f"{where}{close}: {labels['because']}."),
        ("Warm-up", f"{'needed' if warmup['needed'] else 'not needed'}: {warmup['because']}."),
        ("From OPD to student RL", f"{advice['switch']}."),
    ]
    return [Text.assemble((f"{name}: ", "bold"), said) for name, said in named]


def _interval(found: dict[str, float]) -> str:
    return f"{percent(found['mean'])} [{percent(found['low'])}, {percent(found['high'])}]"
