"""Records of when and where a node ran."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headwater.runs.executors.base import recorded_attempt
from headwater.storage.files import read_json
from headwater.storage.run_dir import RunDir


def test_attempts_are_recorded_also_where_node_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunDir(tmp_path).node("opd.s0.1234")
    times = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr("time.time", lambda: next(times))
    with pytest.raises(KeyboardInterrupt), recorded_attempt(folder):
        raise KeyboardInterrupt
    with recorded_attempt(folder):
        pass
    rows = read_json(tmp_path / "attempts" / "opd.s0.1234.json")
    assert [(row["started"], row["ended"]) for row in rows] == [(10.0, 12.5), (20.0, 21.0)]
    assert all(row["worker"].endswith(f", process {os.getpid()}") for row in rows)
    assert not folder.path.exists()  # the node's own folder holds its results only


def test_malformed_record_of_attempts_does_not_stop_node(tmp_path: Path) -> None:
    folder = RunDir(tmp_path).node("opd.s0.1234")
    folder.attempts.parent.mkdir()
    folder.attempts.write_text("{")
    with recorded_attempt(folder):
        folder.path.mkdir(parents=True)
    assert folder.path.is_dir()
