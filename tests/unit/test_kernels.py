"""CPU kernels: equal to torch, and torch replaces them where they were not built."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch.nn import functional

from headwater import kernels
from headwater.config.stage import Sampling
from headwater.kernels import LANES, Kernels, pack_weight
from headwater.losses import fused_linear, token_losses
from headwater.losses.distributions import FromHidden
from headwater.losses.output_head import LinearHead
from headwater.losses.token_stats import TokenInputs
from headwater.sampling import fast_weights, token_draws
from headwater.sampling.base import requests_for
from headwater.sampling.decoder import decoder_for
from headwater.sampling.fast_decoder import FastDecoder
from headwater.sampling.token_draws import draw_tokens
from headwater.sampling.torch_sampler import TorchSampler
from tiny import PROMPTS, tiny_policy


@pytest.fixture
def fast() -> Kernels:
    result = kernels.kernels()
    if result is None:
        pytest.skip("NOT tested: the CPU kernels were not built here (no C compiler when headwater was installed)")
    return result


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 7, 64, 259])
def test_rms_norm_matches_torch(fast: Kernels, width: int) -> None:
    x, weight = random(5, width), random(width, seed=1)
    torch.testing.assert_close(fast.rms_norm(x, weight, 1e-6), functional.rms_norm(x, (width,), weight, 1e-6))
    torch.testing.assert_close(fast.rms_norm(x, None, 1e-2), functional.rms_norm(x, (width,), None, 1e-2))


def test_silu_gate_matches_torch_far_from_zero(fast: Kernels) -> None:
    gate = torch.cat([random(3, 37), torch.tensor([[-200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0] + [1.0] * 30])])
    up = random(4, 37, seed=1)
    torch.testing.assert_close(fast.silu_gate(torch.cat([gate, up], dim=1)), functional.silu(gate) * up)


@pytest.mark.parametrize(("rows", "width", "columns"), [(1, 3, 1), (5, 64, 30), (16, 32, 4099), (130, 48, 96)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_and_matmul_match_torch_for_odd_shapes(
    fast: Kernels, rows: int, width: int, columns: int, biased: bool
) -> None:
    x, weight = random(rows, width), random(columns, width, seed=1)
    bias = random(columns, seed=2) if biased else None
    expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    close = {"rtol": 0.0, "atol": 1e-6 * math.sqrt(width) * 8}
    torch.testing.assert_close(fast.linear(x, pack_weight(weight), bias, columns).double(), expected, **close)
    torch.testing.assert_close(fast.matmul(x, weight, bias, torch.empty(rows, columns)).double(), expected, **close)
    to = random(rows, columns, seed=3)
    expected += to.double()
    fast.add_linear(to, x, pack_weight(weight), bias)
    torch.testing.assert_close(to.double(), expected, **close)


def by_hand(q_AHD: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """Softmax attention of each row's heads over its own keys and values (kv_heads, t, D), in float64."""
    result = []
    for q_HD, k_KTD, v_KTD in zip(q_AHD, keys, values, strict=True):
        group = len(q_HD) // len(k_KTD)
        k, v = k_KTD.repeat_interleave(group, 0), v_KTD.repeat_interleave(group, 0)
        p = torch.softmax(torch.einsum("hd,htd->ht", q_HD, k) / math.sqrt(q_HD.shape[-1]), -1)
        result.append(torch.einsum("ht,htd->hd", p, v).flatten())
    return torch.stack(result)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (6, 2, 24), (2, 2, 64), (3, 1, 6)])
@pytest.mark.parametrize("normed", [True, False])
def test_decode_attention_matches_formula_for_rows_of_any_length(
    fast: Kernels, heads: int, kv_heads: int, width: int, normed: bool
) -> None:
    columns, ages = 3 * LANES, [0, 1, 15, 16, 17, 40, 47]
    rows = len(ages)
    qkv = random(rows, (heads + 2 * kv_heads) * width)
    weight = random(heads + kv_heads, width, seed=1) if normed else None
    angle = random(columns, width // 2, seed=2)
    rope = torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)
    keys, values = random(rows, kv_heads, columns, width, seed=3), random(rows, kv_heads, columns, width, seed=4)
    for row, age in enumerate(ages):  # cache slots past the end of a row may hold anything
        keys[row, :, age:], values[row, :, age:] = math.nan, math.nan
    cached_keys = keys.unflatten(2, (-1, LANES)).transpose(-1, -2).contiguous()
    cached_values = values.clone()
    out = fast.decode_attention(qkv, weight, rope, torch.tensor(ages), cached_keys, cached_values, 1e-6)

    parts = qkv.double().unflatten(1, (-1, width))
    qk, v = parts[:, : heads + kv_heads], parts[:, heads + kv_heads :]
    if weight is not None:
        qk = functional.rms_norm(qk, (width,), None, 1e-6) * weight
    pairs = torch.view_as_complex(qk.unflatten(-1, (-1, 2)).contiguous())
    qk = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[ages][:, None].to(pairs.dtype)).flatten(
        -2
    )
    q, k = qk[:, :heads], qk[:, heads:]
    all_keys = [torch.cat([keys[row, :, :age].double(), k[row, :, None]], 1) for row, age in enumerate(ages)]
    all_values = [torch.cat([values[row, :, :age].double(), v[row, :, None]], 1) for row, age in enumerate(ages)]
    torch.testing.assert_close(out.double(), by_hand(q, all_keys, all_values), rtol=1e-5, atol=1e-5)
    for row, age in enumerate(ages):
        written = cached_keys.transpose(-1, -2).flatten(2, 3)[row, :, age]
        torch.testing.assert_close(written.double(), k[row], rtol=1e-5, atol=1e-5)
        assert torch.equal(cached_values[row, :, age].double(), v[row])


@pytest.mark.parametrize("vocabulary", [1, 2, 30, 128, 129, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sample_inverts_cumulative_distribution(fast: Kernels, vocabulary: int, temperature: float) -> None:
    logits = 3 * random(200, vocabulary)
    logits[:, 1:][random(200, vocabulary - 1, seed=1) > 1.0] = -torch.inf  # those are never sampled
    uniform = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    uniform[:2] = torch.tensor([0.0, 1.0 - 2.0**-53])
    token, logp = fast.sample(logits, uniform, temperature)
    p = torch.softmax(logits.double() / temperature, -1)
    after = p.cumsum(-1).gather(1, token[:, None]).squeeze(1)
    own = p.gather(1, token[:, None]).squeeze(1)
    assert bool((own > 0).all())
    assert bool((after > uniform - 1e-6).all()) and bool((after - own <= uniform + 1e-6).all())
    torch.testing.assert_close(logp.double(), own.log(), rtol=0.0, atol=2e-6)


def test_sample_from_nan_logits_returns_some_token_with_logp_nan(fast: Kernels) -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3])
    token, logp = fast.sample(logits, torch.full((3,), 0.5, dtype=torch.float64), 1.0)
    assert bool(((token >= 0) & (token < 3)).all())
    assert bool(logp.isnan().all())


def test_kernels_do_not_depend_on_number_of_threads(fast: Kernels) -> None:
    x, weight = random(300, 64), pack_weight(random(384, 64, seed=1))
    result = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            y = fast.linear(x, weight, None, 384)
            result.append(
                (
                    y,
                    fast.silu_gate(y),
                    fast.rms_norm(y, None, 1e-6),
                    *fast.sample(y, torch.full((300,), 0.4).double(), 1.0),
                )
            )
        finally:
            torch.set_num_threads(1)
    for other in result[1:]:
        assert all(torch.equal(first, two) for first, two in zip(result[0], other, strict=True))


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_sampling_without_kernels_draws_same_tokens(fast: Kernels, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(name)
    requests = requests_for([(str(row), ids) for row, ids in enumerate(PROMPTS)], 4, "native")
    with_them = TorchSampler(policy, batch=5).sample(requests, Sampling(max_tokens=20))
    for module in (fast_weights, token_draws):
        monkeypatch.setattr(module, "kernels", lambda: None)
    decoder = decoder_for(policy)
    assert isinstance(decoder, FastDecoder) and decoder.kernels is None
    without = TorchSampler(policy, batch=5).sample(requests, Sampling(max_tokens=20))
    assert [rollout.completion_ids for rollout in with_them] == [rollout.completion_ids for rollout in without]
    for first, two in zip(with_them, without, strict=True):
        torch.testing.assert_close(
            torch.tensor(first.sampler_logp), torch.tensor(two.sampler_logp), rtol=0.0, atol=1e-5
        )


def test_sampling_with_top_k_or_top_p_bypasses_kernels(fast: Kernels) -> None:
    logits, uniform = random(50, 40), torch.rand(50, dtype=torch.float64)
    token, logp = draw_tokens(logits, uniform, Sampling(max_tokens=1, top_k=1))
    assert torch.equal(token, logits.argmax(-1)) and torch.equal(logp, torch.zeros(50))


@pytest.mark.parametrize("vocabulary", [2, 30, 129, 5000])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_loss_stats_and_gradient_match_autograd_in_float64(fast: Kernels, vocabulary: int, with_teacher: bool) -> None:
    logits, teacher = 4 * random(9, vocabulary), 4 * random(9, vocabulary, seed=1) if with_teacher else None
    targets = torch.arange(9) % vocabulary
    by = random(9, 3, seed=2)
    by[:, 1:] *= with_teacher
    by[:4, 2] = 0.0  # the shorter form, without the teacher's own probabilities
    exact = logits.double().requires_grad_()
    student_logp = exact.log_softmax(-1)
    logp, entropy = student_logp.gather(1, targets[:, None]).squeeze(1), -(student_logp.exp() * student_logp).sum(-1)
    expected = [logp, entropy]
    loss = (by[:, 0] * logp).sum()
    if teacher is not None:
        teacher_logp = teacher.double().log_softmax(-1)
        reverse = (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)
        forward = (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)
        expected += [reverse, forward, teacher_logp.gather(1, targets[:, None]).squeeze(1)]
        loss = loss + (by[:, 1] * reverse).sum() + (by[:, 2] * forward).sum()
    (gradient,) = torch.autograd.grad(loss, exact)

    result = fast.loss_stats(logits, teacher, targets)
    measured = [
        result.logp_R,
        result.entropy_R,
        result.kl_student_teacher_R,
        result.kl_teacher_student_R,
        result.teacher_logp_R,
    ]
    for actual, other in zip(measured, expected, strict=False):
        torch.testing.assert_close(actual.double(), other.detach(), rtol=1e-5, atol=1e-5)
    fast.loss_gradient(logits, teacher, targets, result, by)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", [None, token_losses.REVERSE, token_losses.FORWARD])
def test_fused_loss_is_equal_with_and_without_kernels(
    fast: Kernels, divergence: token_losses.Divergence | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, teacher_hidden, teacher_weight = (
        random(40, 12),
        random(300, 12, seed=1),
        random(40, 7, seed=2),
        random(300, 7, seed=3),
    )
    distributions = (
        None if divergence is None else FromHidden(teacher_hidden, LinearHead(teacher_weight, None, torch.float32), 1.0)
    )
    result = []
    for which in (lambda: fast, lambda: None):
        monkeypatch.setattr(fused_linear, "kernels", which)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        fused = fused_linear.FusedPass(
            TokenInputs(torch.arange(40), 1.0, distributions, divergence, teacher_tokens=divergence is not None),
            token_loss=lambda stats, rows: (
                -stats.logp_N if stats.divergence_N is None else stats.divergence_N + 0.1 * stats.logp_N
            ),
            chunk_elements=300 * 16,
            block_elements=300 * 5,
        )
        loss, stats = fused_linear.loss_and_stats(leaves[0], LinearHead(leaves[1], None, torch.float32), fused)
        loss.backward()
        numbers = [getattr(stats, field.name) for field in fields(stats)]
        result.append(
            [loss.detach(), *(leaf.grad for leaf in leaves), *(number for number in numbers if number is not None)]
        )
    assert len(result[0]) == len(result[1]) == (5 if divergence is None else 9)
    for actual, other in zip(*result, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-5)
