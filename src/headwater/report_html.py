"""The report as one HTML file: no script, no network, nothing from a run directory that is not escaped.

Everything is in the page: figures as inline SVG that take the page's colours, light or dark. The page's own
Content-Security-Policy forbids the rest, so that a completion which slipped through could fetch and run nothing.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from typing import Any

import yaml

from headwater import label_use, report_guards, report_html_claims, report_html_stages
from headwater.html_parts import document, escaped, framed, noted, section, table, td
from headwater.report_read import ARM_TEXT, POOL_TEXT, Study, costs, mean_costs
from headwater.report_stages import stage_name
from headwater.report_style import STYLE
from headwater.report_words import apart, count, duration, percent, units

SHOWN_EACH = 3
"""Correct and wrong completions shown of an arm."""
SHOWN_CHARACTERS = 2500


def page(study: Study, report: dict[str, Any]) -> str:
    """The whole file. Sections that have nothing to say are left out."""
    sections = [
        report_html_claims.predictions(report),
        _arms(report),
        report_html_claims.comparisons(report),
        report_html_stages.by_stage(report),
        report_html_stages.conditions(study, report),
        report_html_stages.curves(study),
        report_guards.page(report),
        _labels(study),
        _samples(study),
        _sources(study),
    ]
    seeds = f"seed{'s' * (len(report['seeds']) != 1)} {', '.join(map(str, report['seeds']))}"
    header = f"""<h1>{escaped(report["recipe"])}</h1>
<p class="note">{escaped(seeds)}; {len(report["arms"])} arms; made by headwater from the run's files</p>
<p class="verdict">{escaped(report["verdict"])}</p>"""
    main = "".join(section for section in sections if section)
    return document(f"headwater: {report['recipe']}", STYLE, header, main)


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
    notes = [note, *(f"{one[0].upper()}{one[1:]}." for one in apart(report))]
    legend = "Bars: 95 % interval. Small ticks: single seeds. Dashed: the student before."
    cost_legend = "Points: means over seeds, with the 95 % interval. Arms of equal cost stand side by side. Dashed: the models before."
    forests, costs_ = report_html_claims.forests(report), report_html_claims.costs(report)
    return section(
        "Arms",
        table(f"Accuracy{f' on {evals[0]}' if len(evals) == 1 else ''} and costs{_validation(report)}", heads, rows)
        + "".join(map(noted, notes))
        + framed(forests, legend)
        + framed(costs_, cost_legend),
    )


def _validation(report: dict[str, Any]) -> str:
    """Labels of the validation set are labels too: the caption says how many."""
    most = max((arm["apart"]["validation"]["labels"]["distinct"] for arm in report["arms"].values()), default=0)
    return f" (and {count(most)} validation labels)" if most else ""


def _name_cell(name: str, arm: dict[str, Any], rows: int) -> str:
    said = [f"unfinished: seed {seed} waits for {node}" for seed, node in arm["unfinished"].items()]
    for seed, failure in arm["failed"].items():
        where = "" if failure["state"] == "failed" else f"{failure['stage']} failed: "
        said.append(f"{failure['state']} on seed {seed}: {where}{failure['sentence']}")
    more = "".join(f'<span class="warn">{escaped(one)}</span>' for one in said)
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
            f"{stage_name(nodes[0].stage, nodes[0].objective)} ({nodes[0].role or '–'})",
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
