"""Reward for workloads without a real task."""

from __future__ import annotations

import re


def parity(completion: str) -> bool:
    """Whether the number of the last token is even: about half of all completions, for any model.

    Example: `parity("t7 t12")` is True.
    """
    return int((re.findall(r"\d+", completion) or ["0"])[-1]) % 2 == 0
