"""Fused linear loss: equal to the plain form, each matrix product once, never (N, V) in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from headwater.losses import token_losses
from headwater.losses.distributions import Composed, Distributions, FromHidden, Gain
from headwater.losses.logprobs import loss_and_stats, token_stats
from headwater.losses.materialized import Exact, TopK
from headwater.losses.output_head import LinearHead
from headwater.losses.token_stats import TokenInputs, TokenStats

N, H, HT, V = 9, 4, 5, 11
DIVERGENCES = {
    "reverse": token_losses.REVERSE,
    "forward": token_losses.FORWARD,
    "jsd": token_losses.jensen_shannon(0.5),
    "jsd tenth": token_losses.jensen_shannon(0.1),
    "skewed": token_losses.skewed(0.9),
    "entropy aware": token_losses.entropy_aware(1.2),
}
FORMS = ("hidden", "exact", "top", "composed", "gain")
CASES = [("none", "reverse"), *((form, name) for form in FORMS for name in DIVERGENCES)]
"""A teacher's form and the divergence from it; without a teacher there is no divergence."""


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def head_of(width: int, seed: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> LinearHead:
    return LinearHead(
        random(V, width, seed=seed, dtype=dtype), random(V, seed=seed + 1, dtype=dtype) if bias else None, dtype
    )


def teacher_of(form: str, dtype: torch.dtype = torch.float64, temperature: float = 0.7) -> Distributions:
    from_hidden = FromHidden(random(N, HT, seed=5, dtype=dtype), head_of(HT, 6, dtype), temperature)
    logp = from_hidden.materialize().logp_NV
    kept = logp.topk(4, dim=-1)
    other = FromHidden(random(N, HT + 1, seed=15, dtype=dtype), head_of(HT + 1, 16, dtype), temperature)
    composed = Composed((from_hidden, other, Exact(logp)), (1.25, -0.5, 0.25))
    forms: dict[str, Distributions] = {
        "hidden": from_hidden,
        "exact": Exact(logp),
        "top": TopK(kept.indices, kept.values),
        "composed": composed,
        "gain": Gain((from_hidden, other)),
    }
    return forms[form]


def targets() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(9))


def weighted_loss(stats: TokenStats, rows: slice) -> Tensor:
    """A loss, not linear in the log-prob, that depends on log-prob and divergence with weights per token."""
    weight = torch.linspace(-1.0, 1.0, N, dtype=torch.float64)[rows]
    loss = weight * torch.exp(0.5 * stats.logp_N)
    if stats.divergence_N is not None:
        loss = loss + (weight.square() + 0.1) * stats.divergence_N
    return loss


def plain(head: LinearHead) -> Callable[[Tensor], Tensor]:
    """The same head as a plain callable, which `fused_linear` does not handle."""
    return lambda hidden: head(hidden)


@pytest.mark.parametrize(
    ("form", "name"), [case for case in CASES if case[0] != "gain"]
)  # its target moves with the student
def test_fused_loss_passes_gradcheck_for_hidden_states_weight_and_bias(form: str, name: str) -> None:
    options: dict[str, Any] = {}
    if form != "none":
        options = {"teacher": teacher_of(form), "divergence": DIVERGENCES[name]}
    hidden = random(N, H, seed=1).requires_grad_()
    weight, bias = (leaf.requires_grad_() for leaf in (random(V, H, seed=2), random(V, seed=3)))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = LinearHead(weight, bias, torch.float64)
        return loss_and_stats(
            hidden, head, TokenInputs(targets(), 0.7, **options), weighted_loss, chunk_elements=4 * V
        )[0]

    class Repeatable(torch.autograd.Function):
        """gradcheck runs the backward pass many times; the fused loss hands its gradients over once."""

        @staticmethod
        def forward(ctx: Any, *leaves: Tensor) -> Tensor:
            with torch.enable_grad():
                copies = [leaf.detach().requires_grad_() for leaf in leaves]
                value = loss(*copies)
            ctx.save_for_backward(*torch.autograd.grad(value, copies))
            return value.detach()

        @staticmethod
        def backward(ctx: Any, *outer: Tensor) -> Any:
            return tuple(outer[0] * gradient for gradient in ctx.saved_tensors)

    # Along random directions, which every entry contributes to; the next test compares the entries.
    assert gradcheck(Repeatable.apply, (hidden, weight, bias), fast_mode=True)


@pytest.mark.parametrize(("form", "name"), CASES)
@pytest.mark.parametrize("chunk", [1, 3 * V, N * V, 99 * V])
def test_fused_loss_equals_plain_form_in_statistics_and_gradients(form: str, name: str, chunk: int) -> None:
    options: dict[str, Any] = {}
    if form != "none":
        options = {"teacher": teacher_of(form), "divergence": DIVERGENCES[name], "teacher_tokens": form != "top"}
    result = []
    for path in ("fused", "plain"):
        head = head_of(H, 2)
        leaves = [random(N, H, seed=1), head.weight_VH, head.bias_V]
        assert leaves[2] is not None
        for leaf in leaves:
            leaf.requires_grad_()
        used = head if path == "fused" else plain(head)
        loss, stats = loss_and_stats(
            leaves[0], used, TokenInputs(targets(), 0.7, **options), weighted_loss, chunk_elements=chunk
        )
        result.append((loss.detach(), stats, torch.autograd.grad(3.0 * loss, leaves)))
    (ours, our_stats, our_gradients), (plain_loss, their_stats, their_gradients) = result
    torch.testing.assert_close(ours, plain_loss, rtol=1e-10, atol=1e-12)
    for field, expected in vars(their_stats).items():
        actual = vars(our_stats)[field]
        assert (actual is None) == (expected is None), field
        if expected is not None:
            assert not actual.requires_grad
            torch.testing.assert_close(actual, expected.detach(), rtol=1e-8, atol=1e-10)
    for actual, expected in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", ["none", *FORMS])
def test_fused_statistics_without_loss_equal_those_with_loss(form: str) -> None:
    options: dict[str, Any] = (
        {} if form == "none" else {"teacher": teacher_of(form), "divergence": token_losses.REVERSE}
    )
    head, hidden = head_of(H, 2), random(N, H, seed=1)
    with torch.no_grad():
        alone = token_stats(hidden, head, TokenInputs(targets(), 0.7, **options), chunk_elements=5 * V)
    trained = loss_and_stats(hidden, head, TokenInputs(targets(), 0.7, **options), weighted_loss)[1]
    for field, expected in vars(trained).items():
        actual = vars(alone)[field]
        assert (actual is None) == (expected is None), field
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_fused_loss_independent_of_statistics_has_zero_gradient() -> None:
    hidden, head = random(N, H, seed=1).requires_grad_(), head_of(H, 2)

    def constant(stats: TokenStats, rows: slice) -> Tensor:
        return torch.ones_like(stats.logp_N)

    loss, _ = loss_and_stats(hidden, head, TokenInputs(targets(), 1.0), constant)
    loss.backward()
    assert loss.item() == N and hidden.grad is not None and hidden.grad.abs().max().item() == 0.0
    assert head.weight_VH.grad is None  # it does not require a gradient


@pytest.mark.parametrize("name", DIVERGENCES)
def test_fused_divergence_of_equal_models_is_zero_with_zero_gradient(name: str) -> None:
    head, hidden = head_of(H, 2, torch.float32), random(N, H, seed=1, dtype=torch.float32).requires_grad_()

    def divergence(stats: TokenStats, rows: slice) -> Tensor:
        assert stats.divergence_N is not None
        return stats.divergence_N

    itself = FromHidden(hidden.detach(), head, 1.0)
    loss, stats = loss_and_stats(hidden, head, TokenInputs(targets(), 1.0, itself, DIVERGENCES[name]), divergence)
    loss.backward()
    assert stats.divergence_N is not None and stats.divergence_N.abs().max().item() < 1e-6
    assert hidden.grad is not None and hidden.grad.abs().max().item() < 1e-5


@pytest.mark.parametrize("name", ["forward", "jsd"])
def test_fused_loss_accepts_events_of_probability_zero_in_cached_teacher(name: str) -> None:
    logp = teacher_of("exact").materialize().logp_NV.clone()  # type: ignore[union-attr]
    logp[:, 3] = -math.inf
    teacher = Exact(torch.log_softmax(logp, dim=-1))
    result = []
    for head in (head_of(H, 2), plain(head_of(H, 2))):
        hidden = random(N, H, seed=1).requires_grad_()
        loss, stats = loss_and_stats(
            hidden, head, TokenInputs(targets(), 0.7, teacher, DIVERGENCES[name]), weighted_loss
        )
        result.append((stats, *torch.autograd.grad(loss, hidden)))
    assert result[0][0].divergence_N is not None and result[1][0].divergence_N is not None
    torch.testing.assert_close(result[0][0].divergence_N, result[1][0].divergence_N.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(result[0][1], result[1][1], rtol=1e-5, atol=1e-6)


def test_fused_loss_in_bfloat16_stays_within_rounding_of_float64() -> None:
    """The products are in bfloat16 (8 bits: 0.4 % a number); everything between them is in float32."""
    result = {}
    for dtype in (torch.float64, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(256, 64, generator=generator).bfloat16().to(dtype).requires_grad_()
        weight = (0.2 * torch.randn(500, 64, generator=generator)).bfloat16().to(dtype).requires_grad_()
        teacher_weight = (0.2 * torch.randn(500, 64, generator=generator)).bfloat16().to(dtype)
        teacher = FromHidden(hidden.detach(), LinearHead(teacher_weight, None, dtype), 1.0)
        target_ids = torch.randint(0, 500, (256,), generator=generator)

        def loss_of(stats: TokenStats, part: slice) -> Tensor:
            assert stats.divergence_N is not None
            return stats.divergence_N / 256

        loss, stats = loss_and_stats(
            hidden,
            LinearHead(weight, None, dtype),
            TokenInputs(target_ids, 1.0, teacher, token_losses.REVERSE),
            loss_of,
            chunk_elements=1 << 14,
        )
        loss.backward()
        result[dtype] = loss.detach(), stats, hidden.grad, weight.grad
        if dtype == torch.bfloat16:
            assert stats.logp_N.dtype == torch.float32 == loss.dtype
    truth, rough = result[torch.float64], result[torch.bfloat16]
    assert rough[0].item() == pytest.approx(truth[0].item(), rel=5e-3)
    # A logit of size 5 is rounded by up to 0.016.
    assert (rough[1].logp_N - truth[1].logp_N).abs().max().item() < 0.04
    for ours, expected in zip(rough[2:], truth[2:], strict=True):
        assert ours is not None and expected is not None
        relative_error = (ours.double() - expected).norm() / expected.norm()
        assert 0.0 < relative_error.item() < 0.02


def test_fused_loss_computes_every_matrix_product_once() -> None:
    head, hidden = head_of(H, 2), random(N, H, seed=1).requires_grad_()
    head.weight_VH.requires_grad_()
    options: dict[str, Any] = {"teacher": teacher_of("hidden"), "divergence": token_losses.REVERSE}
    with watched() as log:
        loss, _ = loss_and_stats(
            hidden, head, TokenInputs(targets(), 1.0, **options), weighted_loss, chunk_elements=4 * V
        )
        loss.backward()
    # Forward, by hidden states and by weights for the student; forward alone for the teacher.
    assert log.products == 3 * N * V * H + N * V * HT


class OperationLog(TorchDispatchMode):
    """Records the largest tensor that an operation creates, and the multiplications of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
        return out


@contextmanager
def watched() -> Iterator[OperationLog]:
    mode = OperationLog()
    with mode:
        yield mode


@pytest.mark.parametrize("form", ["hidden", "top", "composed", "gain"])
def test_fused_loss_never_allocates_logits_of_all_tokens(form: str) -> None:
    count, chunk = 4000, 16 * V
    hidden = random(count, H, seed=1).requires_grad_()
    head = head_of(H, 2)
    head.weight_VH.requires_grad_()
    from_hidden = FromHidden(random(count, HT, seed=5), head_of(HT, 6), 1.0)
    kept = from_hidden.materialize().logp_NV.topk(4, dim=-1)
    teacher = {
        "hidden": from_hidden,
        "top": TopK(kept.indices, kept.values),
        "composed": Composed((from_hidden, from_hidden), (1.25, -0.25)),
        "gain": Gain((from_hidden, from_hidden)),
    }[form]
    with watched() as log:
        loss, _ = loss_and_stats(
            hidden, head, TokenInputs(torch.zeros(count, dtype=torch.long), 1.0, teacher, token_losses.REVERSE),
            lambda stats, rows: stats.divergence_N, chunk_elements=chunk,  # type: ignore[arg-type,return-value]
        )  # fmt: skip
        loss.backward()
    assert log.numel == hidden.numel() < count * V  # its own gradient is the largest
