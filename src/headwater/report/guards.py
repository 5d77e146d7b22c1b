"""What the guards of training said: rows of report.json, a section of the page, lines for the terminal."""

from __future__ import annotations

from typing import Any

from headwater.report.html_parts import escaped, noted, section, table, td
from headwater.report.read import Study
from headwater.report.stage_table import stage_name


def warnings(study: Study) -> list[dict[str, Any]]:
    """A row for each time that a guard began to warn, or stopped its stage: by arms, stage and seed."""
    found = []
    for arms, _, by_seed in study.groups():
        for seed, node in by_seed.items():
            found += [{"arms": arms, "stage": node.stage, "seed": seed, **row} for row in node.warnings]
    return found


def page(report: dict[str, Any]) -> str:
    rows = []
    for one in report["warnings"]:
        cells = [stage_name(one["stage"]), ", ".join(one["arms"]), str(one["seed"]), str(one["step"]), one["sentence"]]
        said = f"{one['guard']}{' (stopped)' if one['action'] == 'stop' else ''}"
        rows.append(f'<tr><th scope="row">{escaped(said)}</th>{"".join(map(td, cells))}</tr>')
    if not rows:
        return ""
    note = "When a guard of training began to warn; each is explained in docs/guards.md."
    return section(
        "Warnings", table("Guards", ["guard", "stage", "arms", "seed", "step", "what it saw"], rows) + noted(note)
    )


def lines(report: dict[str, Any]) -> list[str]:
    """Example: `opd, step 40, seed 0 (bridge): truncation: 0.62 of the completions …`."""
    return [
        f"{one['stage']}, step {one['step']}, seed {one['seed']} ({', '.join(one['arms'])}): {one['sentence']}"
        for one in report["warnings"]
    ]
