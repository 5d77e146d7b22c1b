"""Early stopping: end a stage when a metric has reached a plateau.

The decision uses the rows of metrics.jsonl only, so a resumed stage decides as the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater.config.stage import Until
from headwater.storage.files import read_rows_from

HIGHER_IS_BETTER = ("reward", "validation")


class PlateauMonitor:
    """Reads a stage's metrics file as it grows and says whether `until.metric` has reached its plateau.

    until  the stage's stopping rule; None never stops
    """

    def __init__(self, until: Until | None, metrics: Path) -> None:
        self._until, self._path = until, metrics
        self._rows: list[dict[str, Any]] = []  # one entry per step, with the metric alone
        self._offset = 0  # bytes of the file already read

    def reached(self, step: int) -> bool:
        """Whether the stage is over after `step` steps; checked at the end of each window."""
        until = self._until
        if until is None or step % until.every:
            return False
        rows, self._offset = read_rows_from(self._path, self._offset)
        self._rows += [{until.metric: row[until.metric]} if until.metric in row else {} for row in rows]
        return plateau(self._rows[:step], until.metric, until.every, until.patience, until.least)


def plateau(rows: Sequence[Mapping[str, Any]], metric: str, every: int, patience: int, least: float) -> bool:
    """Whether none of the last `patience` windows of `every` steps is better than the best window before them.

    rows   one mapping per step, in order; rows without the metric (between validations) are left out of their window
    least  relative improvement over the best that counts as better

    A window without a value is skipped. Example: windows of one step, patience 2, least 0: the KL values 3, 1, 2, 1 have
    reached a plateau; 3, 2, 1 have not.
    """
    values = []
    for start in range(0, len(rows) - every + 1, every):
        window = [float(row[metric]) for row in rows[start : start + every] if metric in row]
        if window:
            values.append(sum(window) / len(window))
    if len(values) <= patience:
        return False
    sign = 1.0 if metric in HIGHER_IS_BETTER else -1.0
    best = max(sign * value for value in values[:-patience])
    return all(sign * value <= best + least * abs(best) for value in values[-patience:])
