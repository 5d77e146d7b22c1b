"""The page's section on warnings of the training guards."""

from __future__ import annotations

from typing import Any

from headwater.report.html_parts import escaped, noted, section, table, td
from headwater.report.stages import stage_name


def page(report: dict[str, Any]) -> str:
    rows = []
    for row in report["warnings"]:
        cells = [stage_name(row["stage"]), ", ".join(row["arms"]), str(row["seed"]), str(row["step"]), row["sentence"]]
        said = f"{row['guard']}{' (stopped)' if row['action'] == 'stop' else ''}"
        rows.append(f'<tr><th scope="row">{escaped(said)}</th>{"".join(map(td, cells))}</tr>')
    if not rows:
        return ""
    note = "When a guard of training began to warn; each is explained in docs/guards.md."
    return section(
        "Warnings", table("Guards", ["guard", "stage", "arms", "seed", "step", "what it saw"], rows) + noted(note)
    )
