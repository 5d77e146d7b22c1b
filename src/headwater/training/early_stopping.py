"""Has a metric stopped getting better? Decided from the numbers written down, so that a resumed stage decides the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HIGHER_IS_BETTER = ("reward", "validation")


def reached(rows: Sequence[Mapping[str, Any]], metric: str, every: int, patience: int, least: float) -> bool:
    """Whether the last `patience` whole windows of `every` steps were none better than the best before them.

    rows   a mapping a step, in order; rows without the metric (as between validations) are left out of their window
    least  the share of the best by which a window must be better to count as better

    A window without any value decides nothing. Example: windows of one step, patience 2, least 0: KL 3, 1, 2, 1 has
    reached its plateau; 3, 2, 1 has not.
    """
    values = []
    for start in range(0, len(rows) - every + 1, every):
        found = [float(row[metric]) for row in rows[start : start + every] if metric in row]
        if found:
            values.append(sum(found) / len(found))
    if len(values) <= patience:
        return False
    sign = 1.0 if metric in HIGHER_IS_BETTER else -1.0
    before, last = values[:-patience], values[-patience:]
    best = max(sign * value for value in before)
    return all(sign * value <= best + least * abs(best) for value in last)
