"""Early stopping: end a stage when a metric has reached a plateau.

The decision uses the rows of metrics.jsonl only, so a resumed stage decides as the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headwater.config.stage import Until

HIGHER_IS_BETTER = ("reward", "validation")


def has_plateau(rows: Sequence[Mapping[str, Any]], until: Until | None) -> bool:
    """Whether a stage is over after the steps of `rows`, one each; decided at the end of each window. Without `until`, never."""
    if until is None or len(rows) % until.every:
        return False
    return plateau(rows, until.metric, until.every, until.patience, until.least)


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
