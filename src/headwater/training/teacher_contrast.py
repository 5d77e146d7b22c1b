"""How far a teacher's distributions are from uniform, on a few tokens of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from headwater.distributed.process_group import ProcessGroup
from headwater.losses.batch import Row
from headwater.losses.distributions import Distributions, Gain, concatenate
from headwater.losses.materialized import Exact, TopK
from headwater.training.update import Metrics

TOKENS = 16
"""Tokens of a step that are compared, each of another rollout: where a teacher has turned uniform, every token shows it."""


def contrast_metrics(rows: Sequence[Row], vocabulary: int, ranks: ProcessGroup) -> Metrics:
    """{"teacher_contrast": mean of `contrast`} of a step, the same on every rank; empty where no token has log-probs of its own.

    rows        of all ranks, in the same order; each rank looks at its own
    vocabulary  V, the teacher's output width
    """
    spread = range(0, len(rows), max(1, len(rows) // TOKENS))[:TOKENS]
    chosen = [(rows[index], index * 31 % rows[index].tokens) for index in spread]
    own = [row.teacher.rows(place, place + 1) for row, place in chosen if row.local and row.teacher is not None]
    # As one value: one pass over the output head's weights, rather than one for each token.
    known = contrast(concatenate(own, None), vocabulary) if own else []
    sums = ranks.all_reduce_sum({"sum": sum(known), "count": float(len(known))})
    return {"teacher_contrast": sums["sum"] / sums["count"]} if sums["count"] else {}


@torch.no_grad()
def contrast(distributions: Distributions, vocabulary: int) -> list[float]:
    """Mean of min(1, |log p + ln V| / ln V) over the tokens whose log-probs each row holds; nothing for a row that holds none.

    It is 0 for a uniform distribution, also where only its top k are known, or tokens that another model chose; a mean log-prob
    or an entropy could be near that of a uniform distribution by chance.

    Example: V = 4 and (½, ½, 0, 0): |−ln 2 + ln 4| / ln 4 = ½, and 1 where log p is −∞: ¾.
    """
    known = distributions.materialize()
    known = known.teacher if isinstance(known, Gain) else known
    if isinstance(known, Exact):
        rows = list(known.logp_NV)
    elif isinstance(known, TopK) and known.group_V is None:
        counts = [known.ids_NK.shape[1]] * len(known) if known.count_N is None else known.count_N.tolist()
        rows = [logp_K[:count] for logp_K, count in zip(known.logp_NK, counts, strict=True) if count]
    else:
        return []
    uniform = math.log(max(2, vocabulary))
    return [float(((logp_E.float() + uniform).abs() / uniform).clamp_max(1.0).mean()) for logp_E in rows]
