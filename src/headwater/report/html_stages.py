"""Sections of the report's page on what happened on the way: stage by stage, the conditions, the training curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from headwater.report import figures
from headwater.report.conditions import C2_MEASURES
from headwater.report.format import percent
from headwater.report.html_parts import escaped, framed, noted, section, table, td
from headwater.report.stages import STAGE_NAMES, accuracy_paths, accuracy_steps, stage_name
from headwater.report.study import POOL_TEXT, Node, Study, is_finite_number

METRICS = {
    "reward": "reward (share correct)",
    "best_of_group": "best of group (pass@G)",
    "informative": "informative groups, share",
    "kl_teacher_student": "KL(teacher ‖ student), nats a token",
    "kl_student_teacher": "KL(student ‖ teacher), nats a token",
    "overlap": "overlap of likeliest tokens, share",
    "entropy": "entropy, nats a token",
    "validation": "validation accuracy",
    "truncated": "truncated, share",
}
"""The curves of training; every other number that a stage measured stays in its metrics.jsonl."""

HELD_OUT = {
    "kl_teacher_student": "KL(teacher ‖ student) on teacher prefixes",
    "kl_student_teacher": "KL(student ‖ teacher) on student prefixes",
    "overlap_teacher_prefixes": "overlap on teacher prefixes",
    "overlap_student_prefixes": "overlap on student prefixes",
    "entropy_student": "student's entropy, nats a token",
}
"""The curves of the conditions, on held-out prompts."""

Group = tuple[str, dict[int, Node]]
"""A legend's text, and the nodes by seed."""


def by_stage(report: dict[str, Any], album: figures.Album) -> str:
    """Accuracy and pass@k before, between and after: each arm's way, a panel an arm, and every stage with its measures."""
    if not any(accuracy_paths(report, name) for name in report["evals"]):
        return ""
    tables = [
        table(
            f"Accuracy on {eval_name} before, between and after the stages, %",
            ("arm", "teacher", "student"),
            [
                f'<tr><th scope="row">{escaped(arm)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in ways)}</tr>'
                for arm, *ways in accuracy_paths(report, eval_name)
            ],
        )
        for eval_name in report["evals"]
    ]
    note = "What stands before is the model as it came. Means over seeds."
    drawn = framed([album.add(one) for one in _ways(report)], "Of the student, after each of its stages.", "pair")
    return section("Stage by stage", "".join(tables) + noted(note) + drawn + _stage_table(report) + _ended(report))


def _ways(report: dict[str, Any]) -> Iterator[figures.Drawn]:
    """Accuracy and pass@k of every arm's student through its stages, on the first evaluation; seeds apart are not shown."""
    eval_name = report["evals"][0]
    held = [
        (name, accuracy_steps(report, arm, "student"))
        for name, arm in report["arms"].items()
        if not name.startswith("base_")
    ]
    places = [place for place in PLACES if any(_place(short) == place for _, steps in held for short, _ in steps)]
    for what, value in (("Accuracy", _accuracy), ("pass@k at the largest k", _best)):
        series = []
        for style, (name, steps) in enumerate(held):
            found = {places.index(_place(short)): value(stage, eval_name) for short, stage in steps}
            line = [(float(place), one) for place, one in sorted(found.items()) if one is not None]
            if line:
                series.append(figures.Series(name, style, (tuple(zip(*line, strict=True)),)))  # type: ignore[arg-type]
        if series:
            title = f"{what} on {eval_name} through the stages, %"
            yield figures.paths(figures.named("stages", what.split()[0], eval_name), title, series, places)


PLACES = ("before", "SFT", "warm-up", "OPD", "RL")
"""Where a student's stages stand in the figure of all arms; what takes OPD's place stands there."""


def _place(short: str) -> str:
    return short if short in PLACES else "OPD"


def _accuracy(stage: dict[str, Any], eval_name: str) -> float | None:
    found = stage.get("accuracy", {}).get(eval_name)
    return None if found is None else 100.0 * float(found["mean"])


def _best(stage: dict[str, Any], eval_name: str) -> float | None:
    """pass@k at the largest k; of a stage it is a number, of a model before a mean with its interval."""
    by_k = stage.get("pass_at_k", {}).get(eval_name)
    if not by_k:
        return None
    last = [*by_k.values()][-1]
    return 100.0 * float(last["mean"] if isinstance(last, dict) else last)


def _stage_table(report: dict[str, Any]) -> str:
    """Every stage once: what it reached, and what it measured of itself at its first and last step."""
    if not report["evals"]:
        return ""
    eval_name = report["evals"][0]
    rows = []
    for row in report["stages"]:
        accuracy = row["accuracy"].get(eval_name)
        by_k = row["pass_at_k"].get(eval_name, {})
        if not row["ends"] and accuracy is None:
            continue
        best = f"{percent([*by_k.values()][-1])} (k={[*by_k][-1]})" if by_k else "–"
        shares = row["informative"]
        cells = [
            POOL_TEXT.get(row["pool"] or "", "none"),
            _some(row["arms"]),
            percent(accuracy["mean"]) if accuracy else "–",
            best,
            *(_two(row["ends"].get(key)) for key in ("reward", "best_of_group", "informative", "entropy")),
            "–" if shares is None else f"{shares:.2f}",
        ]
        name = stage_name(row["stage"], row["objective"], row["role"])
        rows.append(f'<tr><th scope="row">{escaped(name)}</th>{"".join(map(td, cells))}</tr>')
    heads = ["stage", "pool", "arms", "accuracy, %", "pass@k, %", "reward", "best of group", "informative", "entropy"]
    heads.append("informative, all steps")
    return table(f"Every stage once: on {eval_name}, and first → last step of training", heads, rows)


def _two(ends: dict[str, float] | None) -> str:
    return "–" if ends is None else f"{ends['first']:.3g} → {ends['last']:.3g}".replace("-", "−")


def _some(arms: Sequence[str]) -> str:
    """Example: `_some(["a", "b", "c", "d", "e"])` is `a, b, c and 2 more`."""
    return ", ".join(arms[:3]) + (f" and {len(arms) - 3} more" if len(arms) > 3 else "")


def _ended(report: dict[str, Any]) -> str:
    """Stages that ended before their last step, and why."""
    said = [
        f"{stage_name(row['stage'], row['objective'])} of {', '.join(row['arms'])} ended on seed {seed} after "
        f"{ended['step']} of {ended['of']} steps: {ended['why']}."
        for row in report["stages"]
        for seed, ended in row["ended"].items()
    ]
    return "".join(noted(one) for one in said)


def conditions(study: Study, report: dict[str, Any], album: figures.Album) -> str:
    """C1 and C2 as tables and curves."""
    parts = [part for part in (_c1(report), _c1_curves(study, album), _c2(report), _c2_curves(study, album)) if part]
    if not parts:
        return ""
    note = "The paper's two conditions: the teacher is near its optimum (C1), the student is near the teacher (C2)."
    return section("Conditions", noted(note) + "".join(parts))


def _c1(report: dict[str, Any]) -> str:
    rows = []
    for eval_name, found in (report["conditions"]["C1"] or {}).items():
        before = [("before", found["before"])] if found["before"] else []
        after = [
            (f"after {stage_name(one['stage'])}, {POOL_TEXT.get(one['pool'], one['pool'] or 'no labels')}", one)
            for one in found["after"]
        ]
        for when, one in before + after:
            reached, training = one.get("reached"), one.get("training", {})
            cells = [when, percent(one["accuracy"]), f"{percent(one['best_of_k'])} (k={one['k']})"]
            cells += [f"{percent(reached)} %" if reached is not None else "–"]
            cells += [_two(training.get(key)) for key in ("reward", "best_of_group")]
            cells.append(_some(one.get("arms", [])))
            rows.append(f'<tr><th scope="row">{escaped(eval_name)}</th>{"".join(map(td, cells))}</tr>')
    heads = ["evaluation", "teacher", "accuracy, %", "best-of-k, %", "accuracy / best-of-k before"]
    heads += ["reward in training", "best of group in training", "arms"]
    return table("C1: the teacher beside its own best-of-k", heads, rows) if rows else ""


def _c1_curves(study: Study, album: figures.Album) -> str:
    """A panel for each way to train the teacher: its reward beside the best of its own groups."""
    panels = []
    for arms, by_seed in study.stage_groups():
        nodes = list(by_seed.values())
        if not all(node.role == "teacher" and node.trained for node in nodes):
            continue
        named = (("reward", "reward"), ("best of group", "best_of_group"))
        lines = [(text, _lines(nodes, key)) for text, key in named]
        series = [figures.Series(text, style, held) for style, (text, held) in enumerate(lines) if held]
        if series:
            pool = POOL_TEXT.get(nodes[0].pool or "", "")
            title = f"{stage_name(nodes[0].stage)}, {pool} ({len(arms)} arm{'s' * (len(arms) != 1)})"
            panels.append(album.add(figures.curves(figures.named("c1", nodes[0].name), title, series)))
    return _legend(["reward", "best of group"]) + framed(panels, "") if panels else ""


def _c2(report: dict[str, Any]) -> str:
    if not report["conditions"]["C2"]:
        return ""
    rows, anywhere = [], False
    for row in report["stages"]:
        held = row["conditions"] or {key: row["ends"][key] for key in C2_MEASURES[:2] if key in row["ends"]}
        if row["role"] != "student" or not held:
            continue
        anywhere |= bool(row["conditions"])
        prompts = "held out" if row["conditions"] else "training"
        cells = [POOL_TEXT.get(row["pool"] or "", "none"), _some(row["arms"]), prompts]
        cells += [_two(held.get(key)) for key in C2_MEASURES]
        name = stage_name(row["stage"], row["objective"], row["role"])
        rows.append(f'<tr><th scope="row">{escaped(name)}</th>{"".join(map(td, cells))}</tr>')
    heads = ["stage", "pool", "arms", "prompts", "KL(T ‖ S), teacher prefixes", "KL(S ‖ T), student prefixes"]
    heads += [
        "overlap, teacher prefixes",
        "overlap, student prefixes",
        "entropy of the student",
        "entropy of the teacher",
    ]
    note = (
        "Each stage's first → last state; nats a token; T is the teacher, S the student. Overlap: share of the teacher's "
        "likeliest tokens that are among the student's."
    )
    note += "" if anywhere else " These runs measured the divergences on the prompts of training alone."
    return table("C2: the student's distance from its teacher", heads, rows) + noted(note)


def _c2_curves(study: Study, album: figures.Album) -> str:
    return _panels_by_stage(study, album, HELD_OUT, lambda node: node.conditions, "on held-out prompts")


def curves(study: Study, album: figures.Album) -> str:
    """A panel for each metric of each stage; one line for each set of arms that shares the stage's nodes."""
    parts = _panels_by_stage(study, album, METRICS, lambda node: node.metrics, "")
    note = (
        "Lines are means over seeds at the steps that all of them reached, bands run from the lowest to the highest seed. "
        "What else a stage measured is in its metrics.jsonl."
    )
    return section("Training curves", noted(note) + parts) if parts else ""


def _panels_by_stage(
    study: Study,
    album: figures.Album,
    titles: dict[str, str],
    rows: Callable[[Node], list[dict[str, Any]]],
    where: str,
) -> str:
    stages: dict[tuple[str, str, str], list[Group]] = {}
    for arms, by_seed in study.stage_groups():
        if any(rows(node) for node in by_seed.values()):
            first = next(iter(by_seed.values()))
            held = stages.setdefault((first.stage, first.role, first.objective), [])
            held.append((_some(arms), by_seed))
    order, parts = list(STAGE_NAMES), []
    for stage, role, objective in sorted(
        stages, key=lambda one: order.index(one[0]) if one[0] in order else len(order)
    ):
        groups = stages[stage, role, objective]
        panels = []
        for key, title in titles.items():
            lines = [_lines(by_seed.values(), key, rows) for _, by_seed in groups]
            series = [
                figures.Series(label, style, held)
                for style, ((label, _), held) in enumerate(zip(groups, lines, strict=True))
                if held
            ]
            if series:
                name = figures.named("held_out" if where else "curve", stage, role, objective, key)
                panels.append(album.add(figures.curves(name, title, series)))
        if panels:
            name = stage_name(stage, objective, role) + (f", {where}" if where else "")
            parts.append(f"<h3>{escaped(name)}</h3>{_legend([label for label, _ in groups])}{framed(panels, '')}")
    return "".join(parts)


def _lines(
    nodes: Any, key: str, rows: Callable[[Node], list[dict[str, Any]]] = lambda node: node.metrics
) -> tuple[figures.Line, ...]:
    """(steps, values) of each node that measured it."""
    held = [[(row["step"], row[key]) for row in rows(node) if is_finite_number(row.get(key))] for node in nodes]
    return tuple(([step for step, _ in one], [value for _, value in one]) for one in held if one)


def _legend(labels: Sequence[str]) -> str:
    items = "".join(f"<li>{figures.key(style)} {escaped(label)}</li>" for style, label in enumerate(labels))
    return f'<ul class="legend">{items}</ul>'
