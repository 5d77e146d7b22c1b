"""The audit of labels as a section of the report's page: each claim, whether it holds, and what was counted."""

from __future__ import annotations

from headwater.errors import UserError
from headwater.report import audit
from headwater.report.html_parts import escaped, noted, section, table, td
from headwater.report.study import Study
from headwater.storage.run_dir import RunDir

MOST_BYTES = 300_000_000
"""Of rollouts, past which recounting them takes longer than all the rest of the report."""


def page(study: Study) -> str:
    """One table a run directory; a sentence where it cannot be audited."""
    return section("Audit", "".join(_one(run) for run in study.runs)) if study.runs else ""


def _one(run: RunDir) -> str:
    size = sum(path.stat().st_size for path in run.path.glob("nodes/*/rollouts/*.jsonl"))
    if size > MOST_BYTES:
        return noted(f"{size / 1e6:,.0f} MB of rollouts: not recounted here; `headwater report DIR --audit` does it.")
    try:
        found = audit.audit_run(run.path)
    except UserError as error:
        return noted(f"This run cannot be audited: {error}")
    rows = []
    for check in found:
        said = "✓ holds" if check.holds else f"✗ {len(check.faults)} faults"
        what = check.evidence if check.holds else f"{check.evidence}; {check.faults[0]}"
        head = f'<th scope="row">{escaped(check.name)}<span class="text">{escaped(check.claim)}</span></th>'
        rows.append(f'<tr>{head}<td class="said">{said}</td>{td(what)}</tr>')
    held = sum(check.holds for check in found)
    note = f"{held} of {len(found)} claims about where labels went hold, recounted from the run's files."
    return table("What the files prove about labels", ["claim", "reading", "what was counted"], rows, "told") + noted(
        note
    )
