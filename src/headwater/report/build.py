"""Run directories -> the report: report.json, report.html, the terminal table. Reads files only; never imports torch.

    build(outs)   the values of report.json, from one run directory or several that differ in seeds
    write(out)    build, then OUT/report.json, OUT/report.html, OUT/labels.csv and OUT/figures/
    page(outs)    the page alone, without writing anything
    verdict, terminal_table, console    from the modules that hold them

Costs of an arm are those of all its nodes: a teacher that five arms share was paid for once, but each arm alone would
have had to pay for it. They are means per seed, over the seeds that finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater.report import conditions, guards, label_use
from headwater.report import html as report_html
from headwater.report.contrasts import accuracy, contrasts, ks, mean, pass_at, scored
from headwater.report.predictions import predictions
from headwater.report.read import ARM_TEXT, POOL_TEXT, Graded, Node, Study, costs, mean_costs, read
from headwater.report.terminal import terminal_table
from headwater.report.text import console
from headwater.report.verdict import verdict
from headwater.storage import fault_points
from headwater.storage.run_dir import RunDir, write_atomic, write_json, written_aside
from headwater.storage.untrusted import as_written, refuse_links

__all__ = [
    "ARM_TEXT",
    "POOL_TEXT",
    "build",
    "console",
    "page",
    "read",
    "summarise",
    "terminal_table",
    "verdict",
    "write",
]


def build(outs: Sequence[Path]) -> dict[str, Any]:
    """The values of report.json. Raises UserError for a folder without a run and for runs of different recipes."""
    return summarise(read(outs))


def write(out: Path, outs: Sequence[Path] | None = None) -> dict[str, Any]:
    """Build the report of `outs` (by default of `out` itself), write report.json, report.html, labels.csv and figures/ into `out`."""
    fault_points.failpoint("report.begun")
    sources = list(outs or [out])
    for folder in {*sources, out}:
        refuse_links(folder, "report")
    with as_written(sources[0]):
        study = read(sources)
        report = summarise(study)
        used, page = label_use.as_csv(label_use.uses(study)), report_html.page(study, report)
    write_json(RunDir(out).report_json, report)
    fault_points.failpoint("report.values")
    write_atomic(RunDir(out).labels, used)
    fault_points.failpoint("report.labels")
    if page.plots:
        with written_aside(RunDir(out).figures) as folder:
            for plot in page.plots:
                (folder / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
                (folder / f"{plot.name}.csv").write_text(plot.csv, encoding="utf-8")
    write_atomic(RunDir(out).report_html, page.html)
    fault_points.failpoint("report.page")
    return report


def page(outs: Sequence[Path]) -> str:
    """The page alone, as it would be written now; nothing is written. Raises UserError as `build` does."""
    for folder in outs:
        refuse_links(folder, "report")
    with as_written(outs[0]):
        study = read(outs)
        return report_html.page(study, summarise(study)).html


def summarise(study: Study) -> dict[str, Any]:
    """Every value that the terminal and the page show; each part may read those that were built before it."""
    stages = conditions.stages(study)
    arms = {name: _arm(study, name, stages) for name in study.arms}
    report: dict[str, Any] = {
        "recipe": study.recipe.get("name", ""),
        "seeds": study.seeds,
        "evals": study.evals,
        "arms": arms,
        "contrasts": contrasts(study, arms),
        "conditions": {"C1": conditions.c1(study, stages), "C2": conditions.c2(stages)},
        "stages": stages,
        "warnings": guards.warnings(study),
    }
    report["predictions"] = predictions(report)
    return {**report, "verdict": verdict(report)}


def _arm(study: Study, name: str, stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    runs, finished = study.arms[name], study.finished(name)
    results = {eval_name: study.results(name, eval_name) for eval_name in study.evals}
    results = {eval_name: by_seed for eval_name, by_seed in results.items() if by_seed}
    failed = {str(seed): failure for seed, nodes in runs.items() if (failure := _failure(nodes))}
    return {
        "text": ARM_TEXT.get(name, ""),
        "accuracy": {key: scored(by_seed, accuracy) for key, by_seed in results.items()},
        "pass_at_k": {
            key: {str(k): scored(by_seed, pass_at(k)) for k in ks(by_seed.values())} for key, by_seed in results.items()
        },
        "maj_at_k": {key: _majority(by_seed) for key, by_seed in results.items()},
        "truncated": {key: mean(g.truncated for g in by_seed.values()) for key, by_seed in results.items()},
        **mean_costs([costs(nodes) for nodes in (finished or runs).values()]),
        "costs_per_seed": {str(seed): costs(nodes) for seed, nodes in runs.items()},
        "stages": conditions.of_arm(stages, runs),
        "failed": failed,
        "unfinished": {
            str(seed): next(node.name for node in nodes if not node.done)
            for seed, nodes in runs.items()
            if seed not in finished and str(seed) not in failed
        },
    }


def _failure(nodes: Sequence[Node]) -> dict[str, Any] | None:
    """Why a run of an arm cannot end: its own last node "failed", or it is "not run" since one that it stands on did."""
    for node in nodes:
        if node.failure is not None:
            why = {"sentence": str(node.failure.get("sentence", "")), "code": node.failure.get("code")}
            state = "failed" if node is nodes[-1] else "not run"
            return {"state": state, "node": node.name, "stage": node.stage, **why}
    return None


def _majority(by_seed: Mapping[int, Graded]) -> dict[str, Any] | None:
    """None where a grader extracts no answers; a mean over other seeds than the accuracy's would mislead."""
    held = {seed: graded.majority for seed, graded in by_seed.items() if graded.majority is not None}
    if len(held) < len(by_seed):
        return None
    votes = {id(graded): held[seed] for seed, graded in by_seed.items()}
    return {"k": min(g.samples for g in by_seed.values()), **scored(by_seed, lambda graded: votes[id(graded)])}
