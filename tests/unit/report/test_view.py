"""Axes of the columns of intervals."""

from __future__ import annotations

from headwater.report.view import interval_axis


def test_axis_of_shares_ends_at_one() -> None:
    axis = interval_axis([{"low": 0.5, "high": 1.0}], "{:.2f}".format)
    assert axis.labels[1] == "1.00" and axis.position(1.0) == "100.0%"
    assert interval_axis([{"low": 0.0, "high": 0.5}], "{:.2f}".format).labels[1] == "0.52"
