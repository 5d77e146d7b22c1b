"""Drawing a token: the inverse of the cumulative distribution, in one level and in two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headwater import seeds
from headwater.config.stage import Sampling
from headwater.sampling.token_draws import BLOCK, WIDE, draw_tokens, inverse_cdf, named_uniforms


def test_batched_uniforms_equal_uniforms_of_each_name() -> None:
    names = [(0, "opd", step, "a1b2", sample) for step in range(3) for sample in range(5)] + [(), ("x",), (-7,)]
    assert np.array_equal(named_uniforms(37, names), np.stack([seeds.uniforms(37, *name) for name in names]))


@hypothesis_settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(WIDE, 3 * WIDE), spread=st.floats(0.0, 30.0))
def test_two_level_draw_equals_draw_from_exact_sum(seed: int, width: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p_BV = torch.softmax(torch.randn(8, width, generator=generator) * spread, dim=-1)
    draws_B = torch.rand(8, generator=generator, dtype=torch.float64)
    token_B = inverse_cdf(p_BV, draws_B[:, None]).squeeze(1)
    cumulative_BV = p_BV.double().cumsum(dim=1)
    target_B = draws_B * cumulative_BV[:, -1]
    for row, token in enumerate(token_B.tolist()):
        # float32 sums of a block of tokens are right to about 1e-7 of the whole: the draw lies within its token up to that.
        upper = float(cumulative_BV[row, token])
        assert float(p_BV[row, token]) > 0.0
        assert upper - float(p_BV[row, token]) - 1e-6 <= float(target_B[row]) <= upper + 1e-6


def test_two_level_draw_is_uniform_over_even_grid() -> None:
    """Draws (i + ½)/V of a uniform distribution over V tokens: each token once, in order, across every block border."""
    width = 10 * BLOCK + 24  # the last block is not full
    assert width >= WIDE
    draws = ((torch.arange(width, dtype=torch.float64) + 0.5) / width)[:, None]
    assert inverse_cdf(torch.full((width, width), 1.0 / width), draws).squeeze(1).tolist() == list(range(width))


def test_two_level_draw_never_returns_token_of_probability_zero() -> None:
    p_BV = torch.zeros(6, 2 * WIDE)
    p_BV[:, 5], p_BV[:, BLOCK + 3], p_BV[:, BLOCK + 9] = 0.25, 0.25, 0.5
    draws = torch.tensor([0.0, 0.24999, 0.25, 0.49999, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(p_BV, draws[:, None]).squeeze(1).tolist() == [5, 5, BLOCK + 3, BLOCK + 3, BLOCK + 9, BLOCK + 9]


@pytest.mark.parametrize("width", [30, 2 * WIDE])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}])
def test_nan_logits_give_nan_log_probs_in_their_own_row_only(width: int, settings: dict[str, float]) -> None:
    logits = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    broken = logits.clone()
    broken[1, 7] = torch.nan
    draws = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    token, logp = draw_tokens(broken, draws, Sampling(**settings))  # type: ignore[arg-type]
    assert torch.isnan(logp).tolist() == [False, True, False] and 0 <= int(token[1]) < width
    sound = draw_tokens(logits, draws, Sampling(**settings))  # type: ignore[arg-type]
    assert [token[0], token[2]] == [sound[0][0], sound[0][2]]
