"""The report as one HTML file: no network, one script of our own, nothing from a run directory that is not escaped.

Everything is in the page: figures as inline SVG that take the page's colours, light or dark. The page's own
Content-Security-Policy names our script by its hash and forbids the rest, so that a completion which slipped through could
fetch and run nothing.
"""

from __future__ import annotations

import importlib.resources
from typing import Any

import yaml

from headwater.config.arms import DESCRIPTIONS
from headwater.report import audit_section, figures, guards, html_claims, html_stages, label_flow, label_use
from headwater.report.format import count, duration, non_training_notes, percent, units
from headwater.report.html_claims import axis_head, extent
from headwater.report.html_parts import (
    anchor,
    data_element,
    document,
    escaped,
    framed,
    interval,
    noted,
    section,
    table,
    td,
)
from headwater.report.rollouts import sample
from headwater.report.stages import stage_name
from headwater.report.study import POOL_TEXT, Study, costs, mean_costs
from headwater.report.style import STYLE
from headwater.storage.run_dir import read_jsonl


def page(study: Study, report: dict[str, Any], album: figures.Album | None = None) -> str:
    """The whole file, and every figure into `album`. Sections that have nothing to say are left out."""
    album = figures.Album() if album is None else album
    sections = [
        _arms(report, album),
        html_claims.predictions(report),
        _labels(study, report, album),
        html_claims.comparisons(report, album),
        html_claims.costs(report, album),
        html_stages.by_stage(report, album),
        html_stages.conditions(study, report, album),
        html_stages.curves(study, album),
        guards.page(report),
        _rollouts(study),
        audit_section.page(study),
        _sources(study),
        _files(album),
    ]
    seeds = f"seed{'s' * (len(report['seeds']) != 1)} {', '.join(map(str, report['seeds']))}"
    body = "".join(one for one in sections if one)
    header = f"""<a class="skip" href="#main">Skip to the report</a>
<h1>{escaped(report["recipe"])}</h1>
<p class="note">{escaped(seeds)}; {len(report["arms"])} arms; made by headwater from the run's files</p>
<div class="verdict"><strong>{escaped(html_claims.headline(report))}</strong>{html_claims.chips(report)}
<p>{escaped(report["verdict"])}</p></div>"""
    nav = "".join(
        f'<li><a href="#{anchor(title)}">{escaped(title)}</a></li>'
        for title in TITLES
        if f'id="{anchor(title)}"' in body
    )
    header += f'<nav aria-label="Sections"><ul>{nav}</ul></nav>'
    script = (importlib.resources.files("headwater") / "report" / "page" / "browse.js").read_text(encoding="utf-8")
    return document(f"headwater: {report['recipe']}", STYLE, header, body, script)


TITLES = (
    "Arms",
    "The paper's predictions",
    "Labels",
    "Comparisons",
    "Labels and compute",
    "Stage by stage",
    "Conditions",
    "Training curves",
    "Warnings",
    "Rollouts",
    "Audit",
    "Recipe and environment",
    "Figures and data",
)


def _arms(report: dict[str, Any], album: figures.Album) -> str:
    evals = report["evals"] or [""]
    best = {list(by_k)[-1] for arm in report["arms"].values() for by_k in arm["pass_at_k"].values()}
    k = best.pop() if len(best) == 1 else "k"
    scored = [one for arm in report["arms"].values() for one in arm["accuracy"].values()]
    ends = extent(scored) if scored else (0.0, 1.0)
    axis = axis_head(ends, lambda value: f"{percent(max(0.0, value))} %")
    heads = [
        "arm",
        *(["evaluation"] if len(evals) > 1 else []),
        "accuracy, %",
        "95 %",
        axis,
        f"pass@{k}, %",
        f"maj@{k}, %",
    ]
    heads += ["labels", "checks", "sampled", "trained", "scored", "FLOPs", "time"]
    before = report["arms"].get("base_student", {}).get("accuracy", {})
    rows = []
    for name, arm in report["arms"].items():
        for place, eval_name in enumerate(evals):
            cells = [_name_cell(name, arm, len(evals))] if place == 0 else []
            cells += [td(eval_name)] if len(evals) > 1 else []
            mean, between, *rest = map(td, _scores(arm, eval_name, k))
            level = before[eval_name]["mean"] if eval_name in before else None
            cells += [mean, between, _interval(arm["accuracy"].get(eval_name), ends, level), *rest]
            if place == 0:
                cells += [td(cell, len(evals)) for cell in _spent(arm)]
            rows.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "Intervals are over problems and seeds: the bar is the interval, thin ticks are single seeds, the dashed line is the student "
        "before. Labels: distinct problems whose answer was looked at, and how often "
        "(checks). Tokens are sampled by the policy, trained on, scored by the teacher. Costs are those of every stage "
        "that an arm rests on, shared or not, as the mean per seed; looks at labels for evaluation are not in them."
    )
    notes = [note, *(f"{one[0].upper()}{one[1:]}." for one in non_training_notes(report))]
    html_claims.forests(report, album)
    caption = f"Accuracy{f' on {evals[0]}' if len(evals) == 1 else ''} and costs{_validation(report)}"
    return section("Arms", table(caption, heads, rows) + "".join(map(noted, notes)))


def _interval(accuracy: dict[str, Any] | None, ends: tuple[float, float], level: float | None) -> str:
    if accuracy is None:
        return "<td></td>"
    seeds = list(accuracy["per_seed"].values())
    mean, low, high = (accuracy[key] for key in ("mean", "low", "high"))
    return interval(mean, low, high, ends, level, seeds if len(seeds) > 1 else ())


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
    return f'<th scope="row"{span}>{escaped(name)}<span class="text">{escaped(DESCRIPTIONS.get(name, ""))}</span>{more}</th>'


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


def _labels(study: Study, report: dict[str, Any], album: figures.Album) -> str:
    """Where every label went: a band and a row for each node that looked at any, with the arms that rest on it."""
    rows, flows = [], []
    for arms, by_seed in study.stage_groups():
        nodes = list(by_seed.values())
        spent = mean_costs([costs([node]) for node in nodes])["labels"]
        pool = nodes[0].pool
        allowed = (nodes[0].info.get("labels") or {}).get("distinct_allowed")
        if not spent["checks"] and not (
            pool and allowed != 0
        ):  # it trained on problems of the pool without their answers
            continue
        stage = stage_name(nodes[0].stage, nodes[0].objective)
        cells = [
            f"{stage} ({nodes[0].role or '–'})",
            ", ".join(arms),
            count(allowed) if allowed is not None else "–",
            count(spent["distinct"]),
            count(spent["checks"]),
        ]
        named = POOL_TEXT.get(pool or "", pool or "–")
        rows.append(f'<tr><th scope="row">{escaped(named)}</th>{"".join(map(td, cells))}</tr>')
        if spent["distinct"]:
            flows.append(label_flow.Flow(named, stage, spent["distinct"], tuple(arms)))
    if not rows:
        return section("Labels", noted("No stage of this run looked at a label."))
    heads = ["pool", "→ stage", "→ arms", "allowed", "distinct", "checks"]
    note = "Means per seed. Stages that are not listed were handed no labels at all."
    taken = []
    for one in label_use.label_paths(study):
        cells = [f"{one['half']}H", str(one["stages"]), count(one["labels"])]
        taken.append(f'<tr><th scope="row">{escaped(one["arm"])}</th>{"".join(map(td, cells))}</tr>')
    used = table("Which stages looked at a label, by arm and half", ["arm", "half", "stages", "labels"], taken)
    more = " labels.csv, beside this file, has every problem with its stages, seeds and arms."
    trained = [name for name in report["arms"] if not name.startswith("base_")]
    drawn = label_flow.flow("labels", "Labels from pool to stage to arm", flows, trained) if flows and trained else None
    band = framed([album.add(drawn)], "The wider a band, the more distinct labels.", "large") if drawn else ""
    folded = f"<details><summary>By arm and half</summary>{used}</details>"
    return section("Labels", band + table("From pool to stage to arm", heads, rows) + folded + noted(note + more))


def _rollouts(study: Study) -> str:
    """The browser of rollouts: a form, a list that the page's script fills, and the data."""
    texts = {}
    for run in study.runs:
        if run.problems.exists():
            texts.update({str(row["id"]): str(row["text"]) for row in read_jsonl(run.problems)})
    found = sample(study, texts)
    if not found.rows:
        return ""
    of = f" of about {found.total:,}" if found.total > len(found.rows) else ""
    note = (
        f"A sample of {len(found.rows):,}{of} rollouts: of each stage its first, middle and last step, of each arm's result its graded "
        "evaluation. All of them are in nodes/*/rollouts/ and nodes/*/evals/."
    )
    selects = "".join(
        f'<label>{text}<select name="{name}"><option value="">all</option></select></label>'
        for name, text in (("stage", "Stage"), ("arm", "Arm"), ("verdict", "Verdict"), ("seed", "Seed"))
    )
    search = '<label>Search in problem and completion<input type="search" name="search" autocomplete="off"></label>'
    scale = (
        "Under dense reward each token is coloured by log π_T/π of the teacher over the student that sampled it: "
        '<span class="a">the teacher likes it more</span> <span class="b">less</span>, underlined from 2 nats. Under sparse reward '
        "the whole text has one colour, that of its advantage."
    )
    body = (
        f'{noted(note)}<form id="filters">{selects}{search}<button type="reset">Show all</button></form>'
        f'<p class="note scale">{scale}</p><p class="note" id="rollout-count" role="status"></p><div id="rollout-list"></div>'
        '<button type="button" id="rollout-more" hidden>Show more</button>'
        '<p class="note without">This browser needs the page\'s own script, which did not run.</p>'
    )
    data = {"rows": found.rows, "problems": found.problems, "arms": found.arms}
    return section("Rollouts", body) + data_element("rollouts-data", data)


def _sources(study: Study) -> str:
    recipe = yaml.safe_dump(study.recipe, sort_keys=False, allow_unicode=True, width=100)
    env = "".join(f'<tr><th scope="row">{escaped(key)}</th>{td(str(value))}</tr>' for key, value in study.env.items())
    env = table("Environment", ["what", "value"], [env]) if env else noted("No env.json in this run.")
    return section(
        "Recipe and environment",
        f"<details><summary>The resolved recipe</summary><pre>{escaped(recipe)}</pre></details>"
        f"<details><summary>Environment</summary>{env}</details>",
    )


def _files(album: figures.Album) -> str:
    """What lies beside the page for papers: each figure as SVG, its numbers as CSV."""
    if not album.drawn:
        return ""
    items = "".join(
        f"<li><code>{escaped(one.name)}</code> {escaped(one.label.split(':')[0][:120])}</li>" for one in album.drawn
    )
    note = "In figures/ beside this file, each as .svg and with its numbers as .csv; report.json has everything."
    return section(
        "Figures and data",
        noted(note) + f"<details><summary>{len(album.drawn)} figures</summary><ul>{items}</ul></details>",
    )
