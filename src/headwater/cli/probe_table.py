"""Terminal tables of a probe: the two models, the distance between them, and the advice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from headwater.report.format import percent, plain_table, units


def probe_tables(result: Mapping[str, Any]) -> Group:
    """Everything that probe.json holds, for a terminal."""
    labels = result["labels"]
    spent = (
        f"{labels['looked_at']} of the {labels['budget']} labels of the budget were used ({labels['checks']:,} checks); training "
        f"would use the same ones. {result['seconds']:.0f} s"
    )
    parts: list[Table | Text] = [_models(result), _distance(result), Text(spent), Text(""), *_advice(result["advice"])]
    return Group(*parts)


def _models(result: Mapping[str, Any]) -> Table:
    table = plain_table(
        f"{result['recipe']} · seed {result['seed']} · {result['problems']} problems × {result['samples']} samples"
    )
    student, teacher = (result["models"][role] for role in ("student", "teacher"))
    group = f"groups of {student['group_size']}"
    if student["group_size"] != teacher["group_size"]:
        group = f"groups of {student['group_size']} and {teacher['group_size']}"
    for head in ("", "student", "teacher"):
        table.add_column(head, justify="left" if head == "" else "right")

    both = (student, teacher)
    table.add_row("pass rate, % [95 %]", *(_interval(stats["pass_rate"]) for stats in both))
    for k in student["pass_at"]:
        table.add_row(f"pass@{k}, %", *(percent(stats["pass_at"][k]) for stats in both))
    table.add_row(
        "C1: reward / best of all samples", *("–" if stats["c1"] is None else f"{stats['c1']:.2f}" for stats in both)
    )
    table.add_row(f"informative {group}, % [95 %]", *(_interval(stats["informative"]) for stats in both))
    table.add_row("  by 1 − p^G − (1−p)^G, %", *(percent(stats["informative_formula"]) for stats in both))
    table.add_row("ended by a stop token, %", *(percent(stats["ended"]) for stats in both))
    table.add_row("cut at the token limit, %", *(percent(stats["truncated"]) for stats in both))
    for name, title in (
        ("cut", "  cut and not right, %"),
        ("no_answer", "ended without an answer, %"),
        ("ungraded", "stopped the grader, %"),
        ("wrong", "wrong answer, %"),
    ):
        table.add_row(title, *(percent(stats["outcomes"][name]) for stats in both))
    table.add_row("entropy, nats a token", *(f"{stats['entropy']:.2f}" for stats in both))
    table.add_row("tokens a completion", *(units(stats["tokens"]) for stats in both))
    return table


def _distance(result: Mapping[str, Any]) -> Table:
    table, c2, finish = plain_table("student against teacher (C2)"), result["conditions"]["C2"], result["finish"]
    for head in ("", "on student prefixes", "on teacher prefixes"):
        table.add_column(head, justify="left" if head == "" else "right")
    table.add_row("KL(student‖teacher), nats a token", f"{c2['kl_student_teacher']:.3f}", "")
    table.add_row("KL(teacher‖student), nats a token", "", f"{c2['kl_teacher_student']:.3f}")
    overlaps = [c2[f"overlap_{role}_prefixes"] for role in ("student", "teacher")]
    table.add_row("overlap of the top tokens, %", *(percent(overlap) for overlap in overlaps))
    if finish is not None:
        table.caption = (
            f"continuing the first quarter of a correct teacher answer ({finish['problems']} problems), the student is correct "
            f"{_interval(finish['student'])} % of the time,\nthe teacher {_interval(finish['teacher'])} %; "
            f"on those answers KL(teacher‖student) is {finish['kl']:.3f}; the warm-up would train {result['cache_passes']:.1f} times "
            "on each"
        )
    return table


def _advice(advice: dict[str, Any]) -> list[Text]:
    labels, warmup = advice["labels"], advice["warmup"]
    where = {
        "teacher": "spend them on the teacher (arm bridge)",
        "student": "spend them on the student (arm direct_grpo)",
        "nowhere": "do not spend any yet",
    }[labels["where"]]
    close = "; it is close" if labels["close"] else ""
    sentences = [
        *((f"Completions of the {role}", f"{cause}.") for role, cause in advice["outcomes"].items()),
        *([("Teacher", f"{advice['teacher']}.")] if advice["teacher"] else []),
        ("Labels", f"{where}{close}: {labels['because']}."),
        ("Warm-up", f"{'needed' if warmup['needed'] else 'not needed'}: {warmup['because']}."),
        ("From OPD to student RL", f"{advice['switch']}."),
    ]
    if advice["run"]["arm"] is not None:
        sentences.append(("Run", f"--arm {advice['run']['arm']}: {advice['run']['because']}."))
    if (follow_up := advice["follow_up"]) is not None:
        sentences.append(("Beyond the paper", f"--arm {follow_up['arm']}: {follow_up['because']}."))
    return [Text.assemble((f"{name}: ", "bold"), sentence) for name, sentence in sentences]


def _interval(interval: dict[str, float]) -> str:
    return f"{percent(interval['mean'])} [{percent(interval['low'])}, {percent(interval['high'])}]"
