"""Run directories of version 0.1.0 (137 modules side by side) open, report and resume: a bridge killed in the middle of OPD.

`fixtures/run_of_0_1_0.tar.xz` holds the run as it was when the process was killed, its two models, and `expected.json`: what the same
version measured in an undisturbed run.
"""

from __future__ import annotations

import json
import math
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from headwater.report.audit import audit_run
from runs import call, load_json, rows, sets

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "run_of_0_1_0.tar.xz"
CHANGES = (
    "models.teacher=models/teacher", "models.student=models/student", "stages.opd.checkpoint_every=1",
    "stages.warmup.dense.top_k=4", "stages.opd.steps=3",
)  # fmt: skip


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with tarfile.open(ARCHIVE) as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return load_json(Path("expected.json"))


def test_old_run_directory_reports(old: dict[str, Any]) -> None:
    result = call("report", "run")
    assert result.code == 0, result.err
    arms = load_json(Path("run/report.json"))["arms"]
    assert arms["base_student"]["accuracy"] == old["arms"]["base_student"]["accuracy"]
    assert Path("run/report.html").stat().st_size > 10_000


def test_old_run_directory_resumes_without_rerunning_finished_nodes(
    old: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwater.pipeline.preflight", lambda *given: None)
    before = {path: os.stat(path).st_mtime_ns for path in Path("run/nodes").glob("*/DONE")}
    assert len(before) == 5
    result = call("run", "pocket", "--out", "run", "--arm", "bridge", *sets(*CHANGES))
    assert result.code == 0, result.err
    # The same work has the same name in both versions, so nothing that was done is done again.
    assert sorted(path.name for path in Path("run/nodes").iterdir()) == old["nodes"]
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    losses = [row["loss"] for row in rows(next(Path("run/nodes").glob("opd*")) / "metrics.jsonl")]
    assert len(losses) == 3 and all(
        math.isclose(a, b, rel_tol=1e-3) for a, b in zip(losses, old["opd_loss"], strict=True)
    )
    report = load_json(Path("run/report.json"))
    assert json.dumps({name: arm["labels"] for name, arm in report["arms"].items()}, sort_keys=True) == json.dumps(
        {name: arm["labels"] for name, arm in old["arms"].items()}, sort_keys=True
    )
    assert len(rows(Path("run/ledger.jsonl"))) == old["ledger_rows"]
    assert all(row.holds for row in audit_run(Path("run")))
