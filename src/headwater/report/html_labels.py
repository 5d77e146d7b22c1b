"""Sections of the page about labels: where they were used, and the audit of those counts."""

from __future__ import annotations

from typing import Any

from headwater.errors import UserError
from headwater.report import audit, label_flow, label_use
from headwater.report.format import count
from headwater.report.stages import stage_name
from headwater.report.study import POOL_TEXT, Study, costs, mean_costs
from headwater.report.view import Column, RowHeader, Section, Table, number_columns, text_columns
from headwater.storage.run_dir import RunDir

MAX_AUDIT_BYTES = 300_000_000
"""Rollout bytes above which the page leaves the audit out, because recounting would take longer than the rest of the report."""


def labels(study: Study, report: dict[str, Any]) -> Section:
    """How many labels each stage used, from which pool, and for which arms."""
    rows, flows = [], []
    for arms, by_seed in study.stage_groups():
        nodes = list(by_seed.values())
        spent = mean_costs([costs([node]) for node in nodes])["labels"]
        pool = nodes[0].pool
        allowed = (nodes[0].info.get("labels") or {}).get("distinct_allowed")
        if not spent["checks"] and (not pool or allowed == 0):  # with a pool: trained on its problems without answers
            continue
        stage, pool_text = stage_name(nodes[0].stage, nodes[0].objective), POOL_TEXT.get(pool or "", pool or "–")
        numbers = ["–" if allowed is None else count(allowed), count(spent["distinct"]), count(spent["checks"])]
        rows.append([pool_text, f"{stage} ({nodes[0].role or '–'})", ", ".join(arms), *numbers])
        if spent["distinct"]:
            flows.append(label_flow.Flow(pool_text, stage, spent["distinct"], tuple(arms)))
    columns = [*text_columns("pool", "→ stage", "→ arms"), *number_columns("allowed", "distinct", "checks")]
    by_half = [
        [path["arm"], f"{path['half']}H", str(path["stages"]), count(path["labels"])]
        for path in label_use.label_paths(study)
    ]
    half_columns = [*text_columns("arm", "half", "stages"), *number_columns("labels")]
    trained = [name for name in report["arms"] if not name.startswith("base_")]
    plots = [label_flow.flow("labels", "Labels from pool to stage to arm", flows, trained)] if flows and trained else []
    view = {
        "plots": plots,
        "table": Table("From pool to stage to arm", columns, rows) if rows else None,
        "by_half": Table("Which stages used a label, by arm and half", half_columns, by_half),
    }
    return Section("Labels", "labels", view, tuple(plots))


def audit_section(study: Study) -> Section | None:
    """The label audit of each run directory, or the reason why it could not be made."""
    return Section("Audit", "audit", {"audits": [_audit(run) for run in study.runs]}) if study.runs else None


def _audit(run: RunDir) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in run.path.glob("nodes/*/rollouts/*.jsonl"))
    if size > MAX_AUDIT_BYTES:
        note = f"{size / 1e6:,.0f} MB of rollouts are too many to recount here; run `headwater report DIR --audit`."
        return {"table": None, "note": note}
    try:
        checks = audit.audit_run(run.path)
    except UserError as error:
        return {"table": None, "note": f"This run cannot be audited: {error}"}
    rows = [
        [
            RowHeader(check.name, (check.claim,)),
            "✓ holds" if check.holds else f"✗ {len(check.faults)} faults",
            check.evidence if check.holds else f"{check.evidence}; {check.faults[0]}",
        ]
        for check in checks
    ]
    columns = [Column("claim"), Column("reading", nowrap=True), Column("what was counted")]
    holding = sum(check.holds for check in checks)
    note = f"{holding} of {len(checks)} claims about the use of labels hold, recounted from the run's files."
    return {"table": Table("What the files prove about labels", columns, rows, stacked=True), "note": note}
