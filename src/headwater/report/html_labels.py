"""Sections of the page about labels: where they were used, and the audit of those counts."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from headwater.errors import UserError
from headwater.report import audit, label_use
from headwater.report.format import count
from headwater.report.label_flow import Flow, label_flow
from headwater.report.stages import stage_name
from headwater.report.study import POOL_TEXT, Study, costs, mean_costs
from headwater.report.view import Column, RowHeader, Section, Table
from headwater.storage.run_dir import RunDir

MAX_AUDIT_BYTES = 300_000_000
"""Rollout bytes above which the page leaves the audit out, because recounting would take longer than the rest of the report."""


def labels(study: Study, report: dict[str, Any]) -> Section:
    """How many labels each stage used, from which pool, and for which arms."""
    rows: list[dict[str, Any]] = []
    for arms, by_seed in study.stage_groups():
        nodes = list(by_seed.values())
        used = mean_costs([costs([node]) for node in nodes])["labels"]
        pool, allowed = nodes[0].pool, nodes[0].labels_allowed
        if used["checks"] or (pool and allowed != 0):  # with a pool: trained on its problems without their answers
            stage, role = stage_name(nodes[0].stage, nodes[0].objective), nodes[0].role or "–"
            name = POOL_TEXT.get(pool or "", pool or "–")
            rows.append({"pool": name, "stage": stage, "role": role, "arms": arms, "allowed": allowed, **used})
    columns = [
        Column("pool", itemgetter("pool")),
        Column("→ stage", lambda row: f"{row['stage']} ({row['role']})"),
        Column("→ arms", lambda row: ", ".join(row["arms"])),
        Column("allowed", lambda row: None if row["allowed"] is None else count(row["allowed"]), "right"),
        Column("distinct", lambda row: count(row["distinct"]), "right"),
        Column("checks", lambda row: count(row["checks"]), "right"),
    ]
    half_columns = [
        Column("arm", itemgetter("arm")),
        Column("half", lambda path: f"{path['half']}H"),
        Column("stages", itemgetter("stages")),
        Column("labels", lambda path: count(path["labels"]), "right"),
    ]
    by_half = Table("Which stages used a label, by arm and half", half_columns, label_use.label_paths(study))
    trained = [name for name in report["arms"] if not name.startswith("base_")]
    flows = [Flow(row["pool"], row["stage"], row["distinct"], tuple(row["arms"])) for row in rows if row["distinct"]]
    plots = [label_flow("labels", "Labels from pool to stage to arm", flows, trained)] if flows and trained else []
    view = {"plots": plots, "table": Table("From pool to stage to arm", columns, rows), "by_half": by_half}
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
    columns = [
        Column("claim", lambda check: RowHeader(check.name, (check.claim,))),
        Column("reading", lambda check: "✓ holds" if check.holds else f"✗ {len(check.faults)} faults", nowrap=True),
        Column("what was counted", lambda check: "; ".join([check.evidence, *check.faults[:1]])),
    ]
    holding = sum(check.holds for check in checks)
    note = f"{holding} of {len(checks)} claims about the use of labels hold, recounted from the run's files."
    return {"table": Table("What the files prove about labels", columns, checks, cards=True), "note": note}
