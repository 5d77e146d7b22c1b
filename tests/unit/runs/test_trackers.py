"""Trackers: every one is closed, whatever fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.runs.trackers import MetricsForwarder, Tracker
from headwater.storage.run_dir import RunDir


def test_every_tracker_is_closed_where_one_fails(tmp_path: Path) -> None:
    closed: list[str] = []

    def tracker(name: str) -> Tracker:
        def close() -> None:
            closed.append(name)
            if name == "second":
                raise ConnectionError("the service is gone")

        return Tracker(lambda node, step, values: None, close)

    names = ("first", "second", "third")
    forwarder = MetricsForwarder(RunDir(tmp_path), {}, trackers={name: tracker(name) for name in names})
    with pytest.raises(ConnectionError):
        forwarder.close()
    assert sorted(closed) == sorted(names)
