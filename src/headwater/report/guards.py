"""What the guards of training said: rows of report.json and lines for the terminal."""

from __future__ import annotations

from typing import Any

from headwater.report.read import Study


def warnings(study: Study) -> list[dict[str, Any]]:
    """A row for each time that a guard began to warn, or stopped its stage: by arms, stage and seed."""
    found = []
    for arms, _, by_seed in study.groups():
        for seed, node in by_seed.items():
            found += [{"arms": arms, "stage": node.stage, "seed": seed, **row} for row in node.warnings]
    return found


def lines(report: dict[str, Any]) -> list[str]:
    """Example: `opd, step 40, seed 0 (bridge): truncation: 0.62 of the completions …`."""
    return [
        f"{one['stage']}, step {one['step']}, seed {one['seed']} ({', '.join(one['arms'])}): {one['sentence']}"
        for one in report["warnings"]
    ]
