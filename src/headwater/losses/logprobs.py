"""Log-prob, entropy and divergence of each token from hidden states, in float32 and in chunks.

The logits of a whole batch, (N, V), never exist at once. A linear head, which nearly every model has, goes through
`fused_linear`; any other head through the plain form here, which recomputes each chunk's logits in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwater.losses import fused_linear
from headwater.losses.comparison import Student
from headwater.losses.fused_linear import FusedPass, TokenLoss
from headwater.losses.output_head import Head, LinearHead, log_probs
from headwater.losses.token_losses import entropy
from headwater.losses.token_stats import TokenInputs, TokenStats


def loss_and_stats(
    hidden_NH: Tensor, head: Head, inputs: TokenInputs, token_loss: TokenLoss, chunk_elements: int | None = None
) -> tuple[Tensor, TokenStats]:
    """The sum of the token losses, with gradients to hidden states and head, and the tokens' statistics.

    token_loss  maps the statistics of consecutive tokens to their weighted, unreduced losses; it is differentiated by log-prob
                and divergence only, and is called once per part of the tokens
    The other arguments are those of `token_stats`.

    Example: with `token_loss` the log-prob itself, the loss is the log-likelihood of the targets.
    """
    if isinstance(head, LinearHead) and len(hidden_NH):
        fused = _fused_pass(hidden_NH.device, inputs, token_loss, chunk_elements)
        return fused_linear.loss_and_stats(hidden_NH, head, fused)
    stats = token_stats(hidden_NH, head, inputs, chunk_elements)
    return token_loss(stats, slice(0, len(hidden_NH))).sum(), stats


def token_stats(hidden_NH: Tensor, head: Head, inputs: TokenInputs, chunk_elements: int | None = None) -> TokenStats:
    """Log-prob, entropy and, with a teacher, divergences of every token.

    hidden_NH       the policy's last hidden state at the position before each target (N, H)
    chunk_elements  logits in memory at once; None takes the device's default

    Example: a head of zeros over V tokens gives logp −ln V and entropy ln V everywhere.
    """
    count = hidden_NH.shape[0]
    if count == 0:
        empty_N = hidden_NH.new_zeros(0, dtype=torch.float32)
        return TokenStats(empty_N, empty_N)
    if isinstance(head, LinearHead) and not torch.is_grad_enabled():
        return fused_linear.stats_only(hidden_NH, head, _fused_pass(hidden_NH.device, inputs, None, chunk_elements))
    with torch.no_grad():
        vocabulary = head(hidden_NH[:1]).shape[-1]
    size = max(1, chunk_elements // vocabulary) if chunk_elements else tokens_at_once(vocabulary, hidden_NH.device)
    recompute = torch.is_grad_enabled() and count > size
    parts = []
    for start in range(0, count, size):
        stop = min(count, start + size)
        chunk = hidden_NH[start:stop], head, inputs.rows(start, stop)
        parts.append(checkpoint(_chunk_stats, *chunk, use_reentrant=False) if recompute else _chunk_stats(*chunk))
    first, *others = (TokenStats(*part) for part in parts)
    return first.concatenate(others, None)


def _fused_pass(
    device: torch.device, inputs: TokenInputs, token_loss: TokenLoss | None, chunk_elements: int | None
) -> FusedPass:
    chunk = chunk_elements or fused_linear.CHUNK_ELEMENTS[_kind(device)]
    return FusedPass(inputs, token_loss, chunk, min(chunk, fused_linear.BLOCK_ELEMENTS[_kind(device)]))


def tokens_at_once(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits may be in memory at once on a device."""
    return max(1, fused_linear.CHUNK_ELEMENTS[_kind(device)] // vocabulary)


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"


def _chunk_stats(hidden_NH: Tensor, head: Head, inputs: TokenInputs) -> tuple[Any, ...]:
    """The fields of `TokenStats`: checkpointing handles tuples of tensors only."""
    logp_NV = log_probs(head(hidden_NH), inputs.temperature)
    logp_N = logp_NV.gather(1, inputs.targets_N[:, None]).squeeze(1)
    with torch.no_grad():
        entropy_N = entropy(logp_NV)
    compared = inputs.compare(Student(logp_NV, logp_N), gradient=False)
    return tuple(vars(TokenStats.of(logp_N, entropy_N, compared)).values())
