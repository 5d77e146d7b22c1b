"""A short version of `make endurance`: memory and open files stay constant over many steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from endurance import growth, long_stage
from forked_runs import warm_runs


def test_long_stage_keeps_memory_and_open_files_constant(tmp_path: Path) -> None:
    result = long_stage(warm_runs(), tmp_path / "out", 150)
    assert result.code == 0, result.err
    grown, files = growth(result)
    assert grown < 0.02 and files <= 0
    assert len(result.usage) >= 8


@pytest.mark.parametrize(("per_step", "seen"), [(0, False), (1 << 18, True)])
def test_growth_detects_leak(per_step: int, seen: bool) -> None:
    from forked_runs import ProcessResult

    usage = [(0.5 * at, 200 * 2**20 + at * per_step, 12 + (at % 3 == 0)) for at in range(100)]
    grown, files = growth(ProcessResult(0, "", 50.0, {}, usage))
    assert (grown > 0.02) == seen and files == 0
