"""What the terminal says about the trained student after a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from headwater.cli.results import print_report
from headwater.report import result, terminal


@pytest.mark.parametrize("adapter", [False, True])
def test_student_kept_as_adapter_is_called_one(
    adapter: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ("adapter_config.json" if adapter else "config.json")).write_text("{}")
    arms = {"bridge": SimpleNamespace(student_folders={0: tmp_path})}
    monkeypatch.setattr(result.Result, "arms", arms)
    monkeypatch.setattr(terminal, "terminal_table", lambda report, width: "")
    print_report({}, tmp_path, as_json=False)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("student: "))
    assert line.startswith(f"student: {tmp_path}") and ("`headwater merge`" in line) == adapter
