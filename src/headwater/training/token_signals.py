"""Per-token teacher signal of a few rollouts, for the report's rollout browser.

The signal is the per-token reward of the trust-region reading (2605.12483, v4): R_t = log(π_T(y_t | s_t) / π_k(y_t | s_t)), in
nats. The loss uses whole distributions instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from headwater.losses.batch import Row
from headwater.losses.distributions import Gain
from headwater.losses.materialized import Exact

ROWS, TOKENS = 4, 256
"""Number of rollouts of a step, and of tokens of each, whose signal is kept."""
AT_ONCE = 32
"""Tokens whose distributions are in memory at once: 20 MB at a vocabulary of 150,000."""

Text = Callable[[Sequence[int]], str]
"""Token ids -> text (`Prompter.completion`)."""


def kept(rows: Sequence[Row]) -> list[int]:
    """Indices of the rows whose signal is kept, spread over the step. Example: 0, 2, 4 and 6 of 8 rows."""
    return list(range(0, len(rows), max(1, len(rows) // ROWS)))[:ROWS]


@torch.no_grad()
def signal_of(row: Row, text: Text) -> dict[str, Any]:
    """{"pieces": [text, …], "signal": [nats, …]} of the first tokens; empty without an exact teacher distribution.

    Example: a student that wrote `=5` where its teacher would have shown more steps: `{"pieces": ["=", "5"], "signal": [-4.1, -2.3]}`.
    """
    if row.teacher is None:
        return {}
    ids = row.rollout.completion_ids[:TOKENS]
    teacher_logp: list[float] = []
    for start in range(0, len(ids), AT_ONCE):
        some = ids[start : start + AT_ONCE]
        taught = row.teacher.rows(start, start + len(some)).materialize()
        if isinstance(taught, Gain):
            taught = taught.teacher
        if not isinstance(taught, Exact):
            return {}  # a top-k distribution does not hold every token's log-prob
        teacher_logp += taught.token_logp(torch.tensor(some, device=taught.logp_NV.device)).tolist()
    ratios = [t - s for t, s in zip(teacher_logp, row.rollout.sampler_logp, strict=False)]
    return {"pieces": pieces(ids, text), "signal": [round(ratio, 2) for ratio in ratios]}


def pieces(ids: Sequence[int], text: Text) -> list[str]:
    """Text that each token adds. A token that ends within a character adds nothing; the one that completes it adds the character.

    Example: where `é` is two tokens, their pieces are `""` and `"é"`.
    """
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        now = text(ids[:end])
        whole = now.startswith(before) and not now.endswith("\ufffd")
        texts.append(now[len(before) :] if whole else "")
        before = now if whole else before
    return texts
