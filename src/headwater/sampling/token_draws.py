"""Token sampling by the inverse cumulative distribution at named uniform random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from headwater import seeds
from headwater.config.stage import Sampling
from headwater.kernels import kernels

BLOCK = 128
"""Tokens of a block: a wide vocabulary is searched first among the blocks' masses, then within one block."""
WIDE = 1024
"""Vocabulary size from which the two-level search is cheaper than one cumulative sum."""
BELOW_ONE = 1.0 - 2.0**-52
"""The largest uniform number used: times any total it stays below the total, so no draw passes the last token with p > 0."""


def named_uniforms(count: int, names: Sequence[tuple[str | int, ...]]) -> np.ndarray:
    """`seeds.uniforms(count, *name)` for every name: (N, count).

    One generator is reseeded for each name; constructing one takes several times as long as the draws themselves.
    """
    bits = np.random.Philox(key=0)
    generator, state = np.random.Generator(bits), bits.state
    out = np.empty((len(names), count))
    for row, name in enumerate(names):
        high, low = divmod(seeds.seed_of(*name), 1 << 64)
        state["state"]["key"][:] = low, high
        bits.state = state
        generator.random(out=out[row])
    return out


def draw_tokens(logits_BV: Tensor, draws_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row (B,) and its log-prob (B,) under the distribution drawn from, after temperature, top-k and top-p.

    logits_BV  any float dtype; probabilities are computed in float32 at `sampling.temperature`
    draws_B    float64 in [0, 1)

    At temperature 0 the most probable token, the first of equals, has probability 1.

    Example: probabilities (0.25, 0.75) give token 0 for a draw below 0.25, else token 1.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0.0:
        most_B, token_B = logits_BV.max(dim=-1)
        return token_B, most_B - most_B  # 0, or NaN
    fast = kernels() if logits_BV.device.type == "cpu" and not sampling.top_k and sampling.top_p >= 1.0 else None
    if fast:
        return fast.sample(logits_BV.contiguous(), draws_B.double(), sampling.temperature)
    if sampling.temperature != 1.0:
        logits_BV = logits_BV / sampling.temperature
    if sampling.top_k and sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    p_BV = torch.softmax(logits_BV, dim=-1)
    if sampling.top_p < 1.0:
        sorted_BV, index_BV = p_BV.sort(dim=-1, descending=True)
        # A token is kept if the mass before it is below top_p, so the most likely one always is.
        cut_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= sampling.top_p
        p_BV = p_BV.masked_fill(cut_BV.scatter(1, index_BV, cut_BV), 0.0)
        p_BV = p_BV / p_BV.sum(dim=-1, keepdim=True)
    token_B1 = inverse_cdf(p_BV, draws_B[:, None].double())
    return token_B1.squeeze(1), p_BV.gather(1, token_B1).log_().squeeze(1)


def inverse_cdf(p_BV: Tensor, draws_B1: Tensor) -> Tensor:
    """The token (B, 1) at which the cumulative distribution passes each draw; any token where p is NaN."""
    if p_BV.shape[1] < WIDE:
        return _search_cdf(p_BV, draws_B1)[0]
    rest = -p_BV.shape[1] % BLOCK
    blocks_BNK = (functional.pad(p_BV, (0, rest)) if rest else p_BV).view(len(p_BV), -1, BLOCK)
    mass_BN = blocks_BNK.sum(dim=-1)
    block_B1, cumulative_BN, target_B1 = _search_cdf(mass_BN, draws_B1)
    chosen_B1 = mass_BN.gather(1, block_B1).double()
    before_B1 = cumulative_BN.gather(1, block_B1) - chosen_B1
    share_B1 = ((target_B1 - before_B1) / chosen_B1).clamp_min_(0.0)
    block_BK = blocks_BNK.gather(1, block_B1[:, :, None].expand(-1, -1, BLOCK)).squeeze(1)
    token_B1 = block_B1 * BLOCK + _search_cdf(block_BK, share_B1)[0]
    return token_B1.clamp_max_(p_BV.shape[1] - 1)


def _search_cdf(mass_BK: Tensor, share_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First entry whose cumulative mass exceeds this share of the total; the cumulative masses; the target mass."""
    cumulative_BK = mass_BK.cumsum(dim=-1, dtype=torch.float64)
    target_B1 = share_B1.clamp_max(BELOW_ONE).mul_(cumulative_BK[:, -1:])
    index_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True)
    return index_B1.clamp_max_(mass_BK.shape[1] - 1), cumulative_BK, target_B1
