"""Drawing tokens: a named uniform number for each, and the inverse of the cumulative distribution at it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from headwater import seeds
from headwater.config import recipe as config
from headwater.kernels import kernels

BLOCK = 128
"""A wide vocabulary is searched in two levels: first among the masses of blocks of so many tokens, then within one."""
WIDE = 1024
"""From this width on the second level costs less than one cumulative sum over everything."""
BELOW_ONE = 1.0 - 2.0**-52
"""Times any total it stays below it, so that no draw lands past the last token of positive probability."""


def named_uniforms(count: int, names: Sequence[tuple[str | int, ...]]) -> np.ndarray:
    """`seeds.uniforms(count, *name)` for every name, (N, count), with one generator that is set anew for each.

    Making a generator takes several times as long as the numbers themselves.
    """
    bits = np.random.Philox(key=0)
    generator, fresh = np.random.Generator(bits), bits.state
    out = np.empty((len(names), count))
    for row, name in enumerate(names):
        high, low = divmod(seeds.seed_of(*name), 1 << 64)
        fresh["state"]["key"][:] = low, high
        bits.state = fresh
        generator.random(out=out[row])
    return out


def draw_tokens(logits_BV: Tensor, draws_B: Tensor, sampling: config.Sampling) -> tuple[Tensor, Tensor]:
    """One token a row by inverse cumulative distribution, and its log-prob under the distribution drawn from.

    logits_BV  any float; probabilities are made in float32 at `sampling.temperature`
    draws_B    float64 in [0, 1)

    Example: probabilities (0.25, 0.75) give token 0 for a draw below 0.25, else token 1.
    """
    logits_BV = logits_BV.float()
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
        # A token stays while the mass before it is below top_p, so the likeliest always stays.
        cut_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= sampling.top_p
        p_BV = p_BV.masked_fill(cut_BV.scatter(1, index_BV, cut_BV), 0.0)
        p_BV = p_BV / p_BV.sum(dim=-1, keepdim=True)
    token_B1 = inverse(p_BV, draws_B[:, None].double())
    return token_B1.squeeze(1), p_BV.gather(1, token_B1).log_().squeeze(1)


def inverse(p_BV: Tensor, draws_B1: Tensor) -> Tensor:
    """The token (B, 1) at which the cumulative distribution passes each draw; where p is NaN, any token."""
    if p_BV.shape[1] < WIDE:
        return _passed(p_BV, draws_B1)[0]
    rest = -p_BV.shape[1] % BLOCK
    blocks_BNK = (functional.pad(p_BV, (0, rest)) if rest else p_BV).view(len(p_BV), -1, BLOCK)
    mass_BN = blocks_BNK.sum(dim=-1)
    block_B1, cumulative_BN, target_B1 = _passed(mass_BN, draws_B1)
    chosen_B1 = mass_BN.gather(1, block_B1).double()
    before_B1 = cumulative_BN.gather(1, block_B1) - chosen_B1
    share_B1 = ((target_B1 - before_B1) / chosen_B1).clamp_min_(0.0)
    block_BK = blocks_BNK.gather(1, block_B1[:, :, None].expand(-1, -1, BLOCK)).squeeze(1)
    token_B1 = block_B1 * BLOCK + _passed(block_BK, share_B1)[0]
    return token_B1.clamp_max_(p_BV.shape[1] - 1)


def _passed(mass_BK: Tensor, share_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first entry up to which more than this share of the mass lies; the cumulative masses; what was to be passed."""
    cumulative_BK = mass_BK.cumsum(dim=-1, dtype=torch.float64)
    target_B1 = share_B1.clamp_max(BELOW_ONE).mul_(cumulative_BK[:, -1:])
    passed_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True)
    return passed_B1.clamp_max_(mass_BK.shape[1] - 1), cumulative_BK, target_B1
