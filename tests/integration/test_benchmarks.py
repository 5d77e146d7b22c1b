"""Benchmark measurements in a process of their own."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import runner
from benchmarks.cases import Case

STUDENT, TEACHER = "random:1x128:64", "random:2x128:64"
OPD = Case((("b", "opd"),), "opd", STUDENT, TEACHER, batch=4, prompt_tokens=3, new_tokens=5, steps=1)


def tiny(kind: Any, **fields: Any) -> Case:
    return replace(OPD, kind=kind, places=(("t", kind),), **fields)


def test_measurement_in_child_process_returns_every_figure(tmp_path: Path) -> None:
    case = tiny("sampling", peers=("headwater",))
    figures = runner.run_in_process("headwater", {"case": asdict(case), "root": str(tmp_path)})
    assert figures["tokens_sampled"] == 20.0 and figures["seconds"] > 0.0
    failed = runner.run_in_process("nobody", {"case": asdict(case), "root": str(tmp_path)})
    assert "KeyError" in failed["failed"]
