"""Checks of teachers: tags of a normalized loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.config.builtin import find_recipe
from headwater.doctor import teacher_checks
from headwater.doctor.checks import CHECKS, examine
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding
from headwater.runs.inputs import RunInputs
from runs import TINY


def findings_of(check: object, out: Path, *changes: str) -> tuple[Finding, ...]:
    """Findings of one check of the tiny pocket recipe's arm `raw_teacher`."""
    inputs = RunInputs(find_recipe("pocket", [*TINY, *changes]), need_answers=False)
    with inputs:
        result = examine(
            DoctorContext(inputs, ("raw_teacher",), (0,), out), [row for row in CHECKS if row.run is check]
        )
    return result.findings


@pytest.mark.parametrize("changes", [(), ("stages.opd.dense.normalize=tags",)])
def test_loss_normalized_by_tag_needs_several_tags(changes: tuple[str, ...], tmp_path: Path) -> None:
    findings = findings_of(teacher_checks.normalized_tags, tmp_path, *changes)
    assert [finding.evidence for finding in findings] == [
        "stages.opd.dense.normalize: is tags, and all problems have the tag 'sums'; leave it out" for _ in changes
    ]
