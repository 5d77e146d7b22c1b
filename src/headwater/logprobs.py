"""Hidden states -> log-probs, entropy and divergences a token, in float32 and in chunks.

The logits of a whole batch, (N, V), never exist at once: each chunk's are made, used and dropped, and made again for its
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwater import losses
from headwater.distributions import Distributions, Head

CHUNK_ELEMENTS = 1 << 24
"""Logits alive at once: 16 Mi float32 (64 MiB) for the student and as many for the teacher."""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(student_logp (N, E), teacher_logp (N, E)) -> (N,); one of `losses`."""


@dataclass(frozen=True)
class TokenStats:
    """What the policy says of N tokens. Only `logp_N` and `divergence_N` carry gradients."""

    logp_N: Tensor
    entropy_N: Tensor
    divergence_N: Tensor | None = None
    kl_student_teacher_N: Tensor | None = None
    kl_teacher_student_N: Tensor | None = None
    teacher_logp_N: Tensor | None = None


def token_stats(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    temperature: float,
    teacher: Distributions | None = None,
    divergence: Divergence | None = None,
    teacher_tokens: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
    vocabulary: int | None = None,
) -> TokenStats:
    """Log-prob, entropy and, with a teacher, divergences for every token.

    hidden_NH   the policy's last hidden state at the position before each target (N, H)
    targets_N   the token ids whose log-probs are wanted (N,)
    temperature the one that sampled the tokens; logits are divided by it
    divergence  the loss's divergence, differentiated; both KLs are always measured, without gradient
    teacher_tokens  also measure the teacher's log-prob of each target
    vocabulary  V, to size the chunks; None takes it from the first token's logits

    Example: a head of zeros over V tokens gives logp −ln V and entropy ln V everywhere.
    """
    if hidden_NH.shape[0] == 0:
        empty_N = hidden_NH.new_zeros(0, dtype=torch.float32)
        return TokenStats(empty_N, empty_N)
    if vocabulary is None:
        with torch.no_grad():
            vocabulary = head(hidden_NH[:1]).shape[-1]
    size = max(1, chunk_elements // vocabulary)
    count = hidden_NH.shape[0]
    recompute = torch.is_grad_enabled() and count > size
    parts = []
    for start in range(0, count, size):
        stop = min(count, start + size)
        rows = (hidden_NH[start:stop], head, targets_N[start:stop], temperature)
        dists = None if teacher is None else teacher.rows(start, stop)
        parts.append(
            checkpoint(_chunk, *rows, dists, divergence, teacher_tokens, use_reentrant=False)
            if recompute
            else _chunk(*rows, dists, divergence, teacher_tokens)
        )
    logp, entropy, *others = zip(*parts, strict=True)
    return TokenStats(
        torch.cat(logp), torch.cat(entropy), *(None if one[0] is None else torch.cat(one) for one in others)
    )


def _chunk(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    temperature: float,
    teacher: Distributions | None,
    divergence: Divergence | None,
    teacher_tokens: bool,
) -> tuple[Any, ...]:
    logp_NV = torch.log_softmax(head(hidden_NH).float() / temperature, dim=-1)
    logp_N = logp_NV.gather(1, targets_N[:, None]).squeeze(1)
    with torch.no_grad():
        # An impossible token (−inf) has probability 0 and adds 0, not NaN.
        entropy_N = -(logp_NV.exp() * logp_NV.clamp_min(-1e30)).sum(dim=-1)
    if teacher is None:
        return logp_N, entropy_N, None, None, None, None
    known = teacher.ready()
    student_NE, teacher_NE = known.align(logp_NV)
    divergence_N = None if divergence is None else divergence(student_NE, teacher_NE)
    with torch.no_grad():
        measured = losses.reverse_kl(student_NE, teacher_NE), losses.forward_kl(student_NE, teacher_NE)
        teacher_logp_N = known.token_logp(targets_N) if teacher_tokens else None
    return logp_N, entropy_N, divergence_N, *measured, teacher_logp_N
