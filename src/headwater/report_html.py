"""The report as one HTML file: no script, no network, nothing from a run directory that is not escaped.

Everything is in the page: figures as inline SVG that take the page's colours, light or dark. The page's own
Content-Security-Policy forbids the rest, so that a completion which slipped through could fetch and run nothing.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from headwater import figures, label_use
from headwater.html_parts import escaped, framed, noted, section, table, td
from headwater.report_read import ARM_TEXT, POOL_TEXT, Node, Study, costs, is_number, mean_costs
from headwater.report_stages import paths
from headwater.report_style import STYLE
from headwater.report_words import (
    count,
    duration,
    interval_note,
    named_contrasts,
    p_text,
    percent,
    points,
    reading,
    units,
)

METRICS = {
    "reward": "reward (share correct)",
    "informative": "informative groups, share",
    "kl_teacher_student": "KL(teacher ‖ student), nats a token",
    "kl_student_teacher": "KL(student ‖ teacher), nats a token",
    "entropy": "entropy, nats a token",
    "loss": "loss",
    "truncated": "truncated, share",
    "sampler_gap": "sampler–trainer gap",
}
"""The curves that come first; every other number that a stage measured is folded below them."""

STAGE_TEXT = {
    "teacher_rl": "Teacher RL",
    "sft": "SFT",
    "warmup": "Warm-up",
    "opd": "On-policy distillation",
    "student_rl": "Student RL",
}
"""In the order in which an arm runs them."""
SHOWN_EACH = 3
"""Correct and wrong completions shown of an arm."""
SHOWN_CHARACTERS = 2500


def page(study: Study, report: dict[str, Any]) -> str:
    """The whole file. Sections that have nothing to say are left out."""
    sections = [
        _arms(report),
        _paths(report),
        _contrasts(report),
        _labels(study),
        _conditions(report),
        _curves(study),
        _samples(study),
        _sources(study),
    ]
    title = escaped(f"headwater: {report['recipe']}")
    seeds = f"seed{'s' * (len(report['seeds']) != 1)} {', '.join(map(str, report['seeds']))}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escaped(report["recipe"])}</h1>
<p class="note">{escaped(seeds)}; {len(report["arms"])} arms; made by headwater from the run's files</p>
<p class="verdict">{escaped(report["verdict"])}</p>
</header>
<main>
{"".join(section for section in sections if section)}
</main>
</body>
</html>
"""


def _arms(report: dict[str, Any]) -> str:
    evals = report["evals"] or [""]
    best = {list(by_k)[-1] for arm in report["arms"].values() for by_k in arm["pass_at_k"].values()}
    k = best.pop() if len(best) == 1 else "k"
    heads = ["arm", *(["evaluation"] if len(evals) > 1 else []), "accuracy, %", "95 %", f"pass@{k}, %", f"maj@{k}, %"]
    heads += ["labels", "checks", "sampled", "trained", "scored", "FLOPs", "time"]
    rows = []
    for name, arm in report["arms"].items():
        for place, eval_name in enumerate(evals):
            cells = [_name_cell(name, arm, len(evals))] if place == 0 else []
            cells += [td(eval_name)] if len(evals) > 1 else []
            cells += [td(cell) for cell in _scores(arm, eval_name, k)]
            if place == 0:
                cells += [td(cell, len(evals)) for cell in _spent(arm)]
            rows.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "Intervals are over problems and seeds. Labels: distinct problems whose answer was looked at, and how often "
        "(checks). Tokens are sampled by the policy, trained on, scored by the teacher. Costs are those of every stage "
        "that an arm rests on, shared or not, as the mean per seed; looks at labels for evaluation are not in them."
    )
    forests = []
    for place, eval_name in enumerate(report["evals"]):
        held = [(name, a["accuracy"][eval_name]) for name, a in report["arms"].items() if eval_name in a["accuracy"]]
        lines = [figures.Row(n, a["mean"], a["low"], a["high"], tuple(a["per_seed"].values())) for n, a in held]
        base = dict(held).get("base_student")
        title = f"Accuracy on {eval_name}"
        forests.append(figures.forest(f"forest{place}", title, lines, base["mean"] if base else None, "%"))
    legend = "Bars: 95 % interval. Ticks: single seeds. Dashed: the student before."
    return section(
        "Arms",
        table(f"Accuracy{f' on {evals[0]}' if len(evals) == 1 else ''} and costs", heads, rows)
        + noted(note)
        + framed(forests, legend if forests else ""),
    )


def _name_cell(name: str, arm: dict[str, Any], rows: int) -> str:
    waiting = ", ".join(f"seed {seed} waits for {node}" for seed, node in arm["unfinished"].items())
    more = f'<span class="warn">unfinished: {escaped(waiting)}</span>' if waiting else ""
    span = f' rowspan="{rows}"' if rows > 1 else ""
    return (
        f'<th scope="row"{span}>{escaped(name)}<span class="text">{escaped(ARM_TEXT.get(name, ""))}</span>{more}</th>'
    )


def _scores(arm: dict[str, Any], eval_name: str, common_k: str) -> list[str]:
    """Accuracy, interval, pass@k and maj@k; k stands in the cell where it is not in the column's head."""
    accuracy = arm["accuracy"].get(eval_name)
    if accuracy is None:
        return ["–"] * 4
    k, best = list(arm["pass_at_k"][eval_name].items())[-1]
    majority = arm["maj_at_k"][eval_name]
    said = "" if common_k == k else f" (k={k})"
    return [
        percent(accuracy["mean"]),
        f"{percent(accuracy['low'])} to {percent(accuracy['high'])}",
        f"{percent(best['mean'])}{said}",
        f"{percent(majority['mean'])}{said}" if majority else "–",
    ]


def _spent(spent: dict[str, Any]) -> list[str]:
    tokens = [units(spent["tokens"][key]) for key in ("sampled", "trained", "teacher_scored")]
    labels = [count(spent["labels"]["distinct"]), count(spent["labels"]["checks"])]
    return [*labels, *tokens, units(spent["flops"]), duration(spent["seconds"])]


def _paths(report: dict[str, Any]) -> str:
    tables = [
        table(
            f"Accuracy on {eval_name} before, between and after the stages, %",
            ("arm", "teacher", "student"),
            [
                "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>"
                for row in paths(report, eval_name)
            ],
        )
        for eval_name in report["evals"]
    ]
    return section("Stage by stage", "".join(tables)) if any(paths(report, name) for name in report["evals"]) else ""


def _contrasts(report: dict[str, Any]) -> str:
    if not report["contrasts"]:
        return ""
    several = len(report["evals"]) > 1
    heads = ["a − b", *(["evaluation"] if several else []), "points", "95 %", "p", "labels a / b", "seeds × problems"]
    heads.append("a better than b")
    named = named_contrasts(report)
    rest = [one for one in report["contrasts"] if one not in named]
    tables = table("Comparisons of the paper", heads, [_contrast_row(one, several) for one in named])
    if rest:
        against = table("Every arm against the student before", heads, [_contrast_row(one, several) for one in rest])
        tables += f"<details><summary>Every arm against the student before</summary>{against}</details>"
    note = (
        "Paired on the same problems and seeds; a bootstrap gives the interval, a sign-flip permutation test p: "
        f"{interval_note(report)}. "
        "Not corrected for the number of comparisons. “Holds”: interval above zero and p < 0.05; “does not hold”: the "
        "reverse is shown; else undecided."
    )
    forests = []
    for place, eval_name in enumerate(report["evals"]):
        lines = [
            figures.Row(f"{c['a']} − {c['b']}", c["difference"], c["low"], c["high"])
            for c in named
            if c["eval"] == eval_name
        ]
        if lines:
            title = f"Differences on {eval_name}"
            forests.append(figures.forest(f"contrast{place}", title, lines, 0.0, "percentage points"))
    return section("Comparisons", tables + noted(note) + framed(forests, ""))


def _contrast_row(c: dict[str, Any], several: bool) -> str:
    says = reading(c)
    cells = [
        *([c["eval"]] if several else []),
        points(c["difference"]),
        f"{points(c['low'])} to {points(c['high'])}",
        p_text(c["p"]),
        f"{count(c['labels']['a'])} / {count(c['labels']['b'])}",
        f"{c['seeds']} × {c['problems']}",
    ]
    mark = {"holds": "▲", "does not hold": "▼", "undecided": "○"}[says]
    last = f'<td class="said">{mark} {says}</td>'
    return f'<tr><th scope="row">{escaped(c["a"])} − {escaped(c["b"])}</th>{"".join(map(td, cells))}{last}</tr>'


def _labels(study: Study) -> str:
    """Where every label went: a row for each node that looked at any, with the arms that rest on it."""
    rows = []
    for arms, _, by_seed in study.groups():
        nodes = list(by_seed.values())
        spent = mean_costs([costs([node]) for node in nodes])["labels"]
        pool = nodes[0].pool
        if not pool and not spent["checks"]:
            continue
        allowed = (nodes[0].info.get("labels") or {}).get("distinct_allowed")
        cells = [
            f"{_stage(nodes[0].stage)} ({nodes[0].role or '–'})",
            ", ".join(arms),
            count(allowed) if allowed is not None else "–",
            count(spent["distinct"]),
            count(spent["checks"]),
        ]
        head = f'<th scope="row">{escaped(POOL_TEXT.get(pool or "", pool or "–"))}</th>'
        rows.append(f"<tr>{head}{''.join(map(td, cells))}</tr>")
    if not rows:
        return section("Labels", noted("No stage of this run looked at a label."))
    heads = ["pool", "→ stage", "→ arms", "allowed", "distinct", "checks"]
    note = "Means per seed. Stages that are not listed were handed no labels at all."
    taken = []
    for one in label_use.paths(study):
        cells = [f"{one['half']}H", str(one["stages"]), count(one["labels"])]
        taken.append(f'<tr><th scope="row">{escaped(one["arm"])}</th>{"".join(map(td, cells))}</tr>')
    used = table("Which stages looked at a label, by arm and half", ["arm", "half", "stages", "labels"], taken)
    more = " labels.csv, beside this file, has every problem with its stages, seeds and arms."
    return section("Labels", table("From pool to stage to arm", heads, rows) + used + noted(note + more))


def _conditions(report: dict[str, Any]) -> str:
    c1, c2 = report["conditions"]["C1"], report["conditions"]["C2"]
    parts = []
    if c1:
        rows = []
        for eval_name, found in c1.items():
            before = [("before", found["before"])] if found["before"] else []
            after = [
                (f"after {_stage(one['stage'])}, {POOL_TEXT.get(one['pool'], one['pool'] or 'no labels')}", one)
                for one in found["after"]
            ]
            for when, one in before + after:
                reached = one.get("reached")
                cells = [when, percent(one["accuracy"]), f"{percent(one['best_of_k'])} (k={one['k']})"]
                cells += [f"{percent(reached)} %" if reached is not None else "–", ", ".join(one.get("arms", []))]
                rows.append(f'<tr><th scope="row">{escaped(eval_name)}</th>{"".join(map(td, cells))}</tr>')
        heads = ["evaluation", "teacher", "accuracy, %", "best-of-k, %", "accuracy / best-of-k before", "arms"]
        parts.append(table("C1: the teacher beside its own best-of-k", heads, rows))
    if c2:
        rows = []
        for arm, stages in c2.items():
            for stage, metrics in stages.items():
                ends = [metrics.get(key) for key in ("kl_teacher_student", "kl_student_teacher")]
                cells = [_stage(stage), *(f"{one['first']:.3g} → {one['last']:.3g}" if one else "–" for one in ends)]
                rows.append(f'<tr><th scope="row">{escaped(arm)}</th>{"".join(map(td, cells))}</tr>')
        heads = ["arm", "stage", "KL(teacher ‖ student), first → last step", "KL(student ‖ teacher), first → last step"]
        parts.append(table("C2: the student's distance from its teacher", heads, rows))
    if not parts:
        return ""
    note = "The paper's two conditions: the teacher is near its optimum (C1), the student is near the teacher (C2)."
    return section("Conditions", noted(note) + "".join(parts))


def _curves(study: Study) -> str:
    """A panel for each metric of each stage; one line for each set of arms that shares the stage's nodes."""
    stages: dict[tuple[str, str], list[tuple[str, dict[int, Node]]]] = {}
    for arms, _, by_seed in study.groups():
        if any(node.metrics for node in by_seed.values()):
            first = next(iter(by_seed.values()))
            more = f" and {len(arms) - 3} more" if len(arms) > 3 else ""
            stages.setdefault((first.stage, first.role), []).append((", ".join(arms[:3]) + more, by_seed))
    parts: list[str] = []
    order = list(STAGE_TEXT)
    for stage, role in sorted(stages, key=lambda one: order.index(one[0]) if one[0] in order else len(order)):
        groups = stages[stage, role]
        name = re.sub(r"\W", "", f"{stage}{role}{len(parts)}")
        keys = [figures.key(f"{name}key{style}", style) for style in range(len(groups))]
        legend = "".join(f"<li>{key} {escaped(label)}</li>" for key, (label, _) in zip(keys, groups, strict=True))
        measured = {key for _, by_seed in groups for node in by_seed.values() for row in node.metrics for key in row}
        others = sorted(measured - set(METRICS) - {"step"})
        panels = [list(_panels(name, groups, chosen)) for chosen in (list(METRICS), others)]
        folded = f"<details><summary>Other measures</summary>{framed(panels[1], '')}</details>" if panels[1] else ""
        title = f"{_stage(stage)}{f' ({role})' if role else ''}"
        parts.append(f'<h3>{escaped(title)}</h3><ul class="legend">{legend}</ul>{framed(panels[0], "")}{folded}')
    if not parts:
        return ""
    note = "Thin lines are seeds, the thick line their mean at the steps that all of them reached."
    return section("Training curves", noted(note) + "".join(parts))


def _panels(name: str, groups: Sequence[tuple[str, dict[int, Node]]], keys: Sequence[str]) -> Iterator[str]:
    for place, key in enumerate(keys):
        series = []
        for style, (label, by_seed) in enumerate(groups):
            lines = [
                tuple(zip(*((row["step"], row[key]) for row in node.metrics if is_number(row.get(key))), strict=True))
                for node in by_seed.values()
            ]
            held = tuple(line for line in lines if line)
            if held:
                series.append(figures.Series(label, style, held))  # type: ignore[arg-type]
        if series:
            yield figures.curves(f"{name}{'m' if key in METRICS else 'o'}{place}", METRICS.get(key, key), series)


def _samples(study: Study) -> str:
    parts = []
    for arm in study.arms:
        for nodes in study.finished(arm).values():
            node, evals = nodes[-1], [name for name in study.evals if name in nodes[-1].evals]
            if evals:
                shown = "".join(_completion(row) for row in _chosen(node.eval_rows(evals[0])))
                where = f"{arm}: {evals[0]}, {node.name}"
                parts.append(f"<details><summary>{escaped(where)}</summary>{shown}</details>")
                break
    if not parts:
        return ""
    note = f"Up to {SHOWN_EACH} correct and {SHOWN_EACH} wrong ones of each arm's first finished seed, drawn by name."
    return section("Graded completions", noted(note) + "".join(parts))


def _chosen(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few correct and a few wrong rows in an order that only their names decide."""
    best: dict[bool, list[tuple[str, int, dict[str, Any]]]] = {True: [], False: []}
    for place, row in enumerate(rows):
        rank = hashlib.sha256(f"{row['problem_id']}:{row.get('sample')}".encode(errors="replace")).hexdigest()
        kept = best[bool(row["correct"])]
        kept.append((rank, place, row))
        if len(kept) > 64:
            kept[:] = heapq.nsmallest(SHOWN_EACH, kept)
    return [row for correct in (True, False) for *_, row in heapq.nsmallest(SHOWN_EACH, best[correct])]


def _completion(row: dict[str, Any]) -> str:
    text = str(row.get("text") or "")
    left = len(text) - SHOWN_CHARACTERS
    cut = f'<p class="note">… {left:,} more characters</p>' if left > 0 else ""
    said, kind = ("✓ correct", "right") if row["correct"] else ("✗ wrong", "wrong")
    facts = [f"problem {row['problem_id']}", f"sample {row.get('sample')}", f"{row.get('reason')}"]
    facts += [f"answer read: {row['extracted']}"] if row.get("extracted") is not None else ["no answer read"]
    facts += [f"{row.get('tokens')} tokens, ended by {row.get('finish')}"]
    return (
        f'<article class="{kind}"><p><strong>{said}</strong> {escaped(" · ".join(facts))}</p>'
        f'<pre dir="auto">{escaped(text[:SHOWN_CHARACTERS])}</pre>{cut}</article>'
    )


def _sources(study: Study) -> str:
    recipe = yaml.safe_dump(study.recipe, sort_keys=False, allow_unicode=True, width=100)
    env = "".join(f'<tr><th scope="row">{escaped(key)}</th>{td(str(value))}</tr>' for key, value in study.env.items())
    env = table("Environment", ["what", "value"], [env]) if env else noted("No env.json in this run.")
    return section(
        "Recipe and environment",
        f"<details><summary>The resolved recipe</summary><pre>{escaped(recipe)}</pre></details>"
        f"<details><summary>Environment</summary>{env}</details>",
    )


def _stage(name: str) -> str:
    return STAGE_TEXT.get(name, name)
