"""Build and write the report of one or more run directories. Reads files only and never imports torch.

    build(outs)   the values of report.json, from one run directory or several with different seeds
    write(out)    write report.json, report.html, labels.csv and figures/ into OUT
    page(outs)    the HTML page alone; writes nothing

The costs of an arm are those of all its nodes: a teacher that five arms share was trained once, but each arm on its own
would have had to train it. Costs are means per seed over the finished seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from headwater.config.arms import DESCRIPTIONS
from headwater.report import conditions
from headwater.report import html as report_html
from headwater.report.contrasts import accuracy, mean, paired_contrasts, pass_at, pass_ks, summarize_seeds
from headwater.report.label_use import label_csv
from headwater.report.predictions import predictions
from headwater.report.stages import stage_rows, stages_of_arm
from headwater.report.study import EvalCounts, Node, Study, costs, mean_costs, read_study
from headwater.report.verdict import verdict
from headwater.storage import fault_points
from headwater.storage.files import atomic_folder, write_atomic, write_json
from headwater.storage.run_dir import RunDir
from headwater.storage.untrusted import refuse_links, refuse_malformed_files


def build(outs: Sequence[Path]) -> dict[str, Any]:
    """The values of report.json. Raises UserError for a folder without a run and for runs of different recipes."""
    return summarize(read_study(outs))


def write(out: Path, outs: Sequence[Path] | None = None) -> dict[str, Any]:
    """Build the report of `outs` (default: `out`) and write report.json, report.html, labels.csv and figures/ into `out`."""
    fault_points.failpoint("report.begun")
    sources = list(outs or [out])
    if out not in sources:
        refuse_links(out, "report")
    report, labels, page = _built(sources)
    write_json(RunDir(out).report_json, report)
    fault_points.failpoint("report.values")
    write_atomic(RunDir(out).labels, labels)
    fault_points.failpoint("report.labels")
    if page.plots:
        with atomic_folder(RunDir(out).figures) as folder:
            for plot in page.plots:
                (folder / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
                (folder / f"{plot.name}.csv").write_text(plot.csv, encoding="utf-8")
    write_atomic(RunDir(out).report_html, page.html)
    fault_points.failpoint("report.page")
    return report


def page(outs: Sequence[Path]) -> str:
    """The HTML page as `write` would write it now. Raises UserError as `build` does."""
    return _built(outs)[2].html


def _built(outs: Sequence[Path]) -> tuple[dict[str, Any], str, report_html.Page]:
    """The contents of report.json and labels.csv, and the page."""
    for folder in outs:
        refuse_links(folder, "report")
    with refuse_malformed_files(outs[0]):
        study = read_study(outs)
        report = summarize(study)
        return report, label_csv(study), report_html.page(study, report)


def summarize(study: Study) -> dict[str, Any]:
    """Every value that the terminal and the page show."""
    stages = stage_rows(study)
    arms = {name: _arm(study, name, stages) for name in study.arms}
    report: dict[str, Any] = {
        "recipe": study.recipe.get("name", ""),
        "seeds": study.seeds,
        "evals": study.evals,
        "arms": arms,
        "contrasts": paired_contrasts(study, arms),
        "conditions": {"C1": conditions.c1(stages), "C2": conditions.c2(stages)},
        "stages": stages,
        "warnings": _warnings(study),
    }
    report["predictions"] = predictions(report)
    return {**report, "verdict": verdict(report)}


def _warnings(study: Study) -> list[dict[str, Any]]:
    """One row for each time that a training guard started to warn or stopped its stage."""
    return [
        {"arms": arms, "stage": node.stage, "seed": seed, **row}
        for arms, by_seed in study.stage_groups()
        for seed, node in by_seed.items()
        for row in node.warnings
    ]


def _arm(study: Study, name: str, stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    runs, finished = study.arms[name], study.finished(name)
    results = {eval_name: study.results(name, eval_name) for eval_name in study.evals}
    results = {eval_name: by_seed for eval_name, by_seed in results.items() if by_seed}
    failed = {str(seed): failure for seed, nodes in runs.items() if (failure := _failure(nodes))}
    return {
        "text": DESCRIPTIONS.get(name, ""),
        "accuracy": {key: summarize_seeds(by_seed, accuracy) for key, by_seed in results.items()},
        "pass_at_k": {
            key: {str(k): summarize_seeds(by_seed, pass_at(k)) for k in pass_ks(by_seed.values())}
            for key, by_seed in results.items()
        },
        "maj_at_k": {key: _majority(by_seed) for key, by_seed in results.items()},
        "truncated": {key: mean(counts.truncated for counts in by_seed.values()) for key, by_seed in results.items()},
        **mean_costs([costs(nodes) for nodes in (finished or runs).values()]),
        "costs_per_seed": {str(seed): costs(nodes) for seed, nodes in runs.items()},
        "stages": stages_of_arm(stages, runs),
        "failed": failed,
        "unfinished": {
            str(seed): next(node.name for node in nodes if not node.done)
            for seed, nodes in runs.items()
            if seed not in finished and str(seed) not in failed
        },
    }


def _failure(nodes: Sequence[Node]) -> dict[str, Any] | None:
    """The first failed node of a run. Its state is "failed" if it is the last node, "not run" if a node before it failed."""
    for node in nodes:
        if node.failure is not None:
            return {
                "state": "failed" if node is nodes[-1] else "not run",
                "node": node.name,
                "stage": node.stage,
                "sentence": str(node.failure.get("sentence", "")),
                "code": node.failure.get("code"),
            }
    return None


def _majority(by_seed: Mapping[int, EvalCounts]) -> dict[str, Any] | None:
    """maj@k; None unless every seed has it, since a mean over fewer seeds than the accuracy's would mislead."""
    if any(counts.majority is None for counts in by_seed.values()):
        return None
    votes = summarize_seeds(by_seed, attrgetter("majority"))
    return {"k": min(counts.samples for counts in by_seed.values()), **votes}
