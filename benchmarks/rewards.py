"""The reward of workloads in which there is nothing to solve."""

from __future__ import annotations

import re


def parity(completion: str) -> bool:
    """Whether the number of the last token is even: half of all completions, whatever the model.

    Example: `parity("t7 t12")` is True.
    """
    return int((re.findall(r"\d+", completion) or ["0"])[-1]) % 2 == 0
