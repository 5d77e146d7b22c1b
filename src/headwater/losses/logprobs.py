"""Hidden states -> log-probs, entropy and divergences a token, and a loss with its gradients, in float32 and in chunks.

The logits of a whole batch, (N, V), never exist at once. A linear head, which is nearly every model's, goes through `fused`; any
other head through the plain form here, which makes each chunk's logits again for its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwater.losses import fused_linear, token_losses
from headwater.losses.distributions import Distributions, Head, LinearHead, widened
from headwater.losses.fused_linear import TokenLoss, Work
from headwater.losses.token_losses import Divergence
from headwater.losses.token_stats import TokenStats


def loss_and_stats(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    temperature: float,
    token_loss: TokenLoss,
    teacher: Distributions | None = None,
    divergence: Divergence | None = None,
    teacher_tokens: bool = False,
    chunk_elements: int | None = None,
) -> tuple[Tensor, TokenStats]:
    """The sum of the tokens' losses, which carries gradients to hidden states and head, and what was measured of them.

    token_loss  gives some of the tokens' losses, weighted and unreduced, from their stats: of those only log-prob and
                divergence are differentiated; it is called with consecutive parts of the tokens
    The other arguments are those of `token_stats`.

    Example: with `token_loss` the log-prob itself, the loss is the log-likelihood of the targets.
    """
    if isinstance(head, LinearHead) and len(hidden_NH):
        work = _work(hidden_NH, targets_N, temperature, teacher, divergence, teacher_tokens, token_loss, chunk_elements)
        return fused_linear.loss_and_stats(hidden_NH, head, work)
    found = token_stats(hidden_NH, head, targets_N, temperature, teacher, divergence, teacher_tokens, chunk_elements)
    return token_loss(found, slice(0, len(hidden_NH))).sum(), found


def token_stats(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    temperature: float,
    teacher: Distributions | None = None,
    divergence: Divergence | None = None,
    teacher_tokens: bool = False,
    chunk_elements: int | None = None,
) -> TokenStats:
    """Log-prob, entropy and, with a teacher, divergences for every token.

    hidden_NH   the policy's last hidden state at the position before each target (N, H)
    targets_N   the token ids whose log-probs are wanted (N,)
    temperature the one that sampled the tokens; logits are divided by it
    divergence  the loss's divergence; both KLs are always measured, without gradient
    teacher_tokens  also measure the teacher's log-prob of each target
    chunk_elements  logits alive at once; None takes what suits the device

    Example: a head of zeros over V tokens gives logp −ln V and entropy ln V everywhere.
    """
    count = hidden_NH.shape[0]
    if count == 0:
        empty_N = hidden_NH.new_zeros(0, dtype=torch.float32)
        return TokenStats(empty_N, empty_N)
    if isinstance(head, LinearHead) and not torch.is_grad_enabled():
        work = _work(hidden_NH, targets_N, temperature, teacher, divergence, teacher_tokens, None, chunk_elements)
        return fused_linear.stats_only(hidden_NH, head, work)
    with torch.no_grad():
        vocabulary = head(hidden_NH[:1]).shape[-1]
    size = max(1, chunk_elements // vocabulary) if chunk_elements else tokens_at_once(vocabulary, hidden_NH.device)
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
    return TokenStats.joined([TokenStats(*part) for part in parts])


def _work(
    hidden_NH: Tensor,
    targets_N: Tensor,
    temperature: float,
    teacher: Distributions | None,
    divergence: Divergence | None,
    teacher_tokens: bool,
    token_loss: TokenLoss | None,
    chunk_elements: int | None,
) -> Work:
    kind = _kind(hidden_NH.device)
    chunk = chunk_elements or fused_linear.CHUNK_ELEMENTS[kind]
    block = min(chunk, fused_linear.BLOCK_ELEMENTS[kind])
    return Work(targets_N, temperature, teacher, divergence, teacher_tokens, token_loss, chunk, block)


def tokens_at_once(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits may be alive at once there."""
    return max(1, fused_linear.CHUNK_ELEMENTS[_kind(device)] // vocabulary)


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"


def _chunk(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    temperature: float,
    teacher: Distributions | None,
    divergence: Divergence | None,
    teacher_tokens: bool,
) -> tuple[Any, ...]:
    logits_NV = head(hidden_NH)
    logp_NV = torch.log_softmax(logits_NV.to(widened(logits_NV.dtype)) / temperature, dim=-1)
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
        measured = token_losses.reverse_kl(student_NE, teacher_NE), token_losses.forward_kl(student_NE, teacher_NE)
        teacher_logp_N = known.token_logp(targets_N) if teacher_tokens else None
    return logp_N, entropy_N, divergence_N, *measured, teacher_logp_N
