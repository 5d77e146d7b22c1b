"""Fused loss of a linear head: loss, statistics and gradients from hidden states, each matrix product done once.

The loss of a token depends on its logits through two numbers (its log-prob and its divergence from the teacher), so the gradient
with respect to the logits is known in closed form as soon as the logits are. Each chunk's logits are computed once, overwritten
with their own gradient, and used for the two products that carry it to hidden states and head: three products for the student
and one for the teacher, the minimum for any method. Memory is two chunks and the gradients, whatever the number of tokens.

    C  tokens of a chunk (sized for the matrix products)      R  tokens of a block (sized for the processor's cache)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from headwater.kernels import Kernels, kernels
from headwater.losses import token_losses
from headwater.losses.distributions import (
    Aligned,
    Composed,
    Distributions,
    FromHidden,
    FromLogits,
    Gain,
)
from headwater.losses.materialized import Exact, ExactGain, Grouped, Sorted, SpanLogp, TopK
from headwater.losses.output_head import LinearHead, logp_dtype
from headwater.losses.token_losses import Divergence, LogitGradient, Pair
from headwater.losses.token_stats import TokenInputs, TokenStats

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Logits in memory at once, for the student and again for the teacher."""
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Numbers in one elementwise pass; on a CPU a few such blocks must fit the second-level cache."""

TokenLoss = Callable[[TokenStats, slice], Tensor]
"""(statistics of some tokens, their slice of the N) -> their losses, weighted and unreduced."""


@dataclass(frozen=True)
class FusedPass:
    """What a pass over the tokens computes, and in which sizes. `token_loss` None measures only."""

    inputs: TokenInputs
    token_loss: TokenLoss | None
    chunk_elements: int
    block_elements: int


def loss_and_stats(hidden_NH: Tensor, head: LinearHead, fused: FusedPass) -> tuple[Tensor, TokenStats]:
    """The summed loss, with gradients to hidden states and head, and the statistics, without gradients.

    The gradients are computed here and handed over by the backward pass, which can run only once.
    """
    stats: list[TokenStats] = []
    loss = _FusedLoss.apply(hidden_NH, head.weight_VH, head.bias_V, head, fused, stats)
    return loss, stats[0]


def stats_only(hidden_NH: Tensor, head: LinearHead, fused: FusedPass) -> TokenStats:
    return _run(hidden_NH.detach(), head, fused, None)[1]


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: LinearHead,
        fused: FusedPass,
        stats_out: list[TokenStats],
    ) -> Tensor:
        gradients = Gradients.allocate(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
        loss, stats = _run(hidden_NH, head, fused, gradients)
        stats_out.append(stats)
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Gradients
        gradients, ctx.gradients = ctx.gradients, None  # handed over, not copied: the head's is large
        returned = gradients.hidden_NH, gradients.weight_VH, gradients.bias_V
        for gradient in returned:
            if gradient is not None:
                gradient.mul_(outer[0])
        return (*returned, None, None, None)


@dataclass(frozen=True)
class Gradients:
    """Accumulators of the gradients that are needed, each in the dtype of its tensor."""

    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @staticmethod
    def allocate(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, needs: Sequence[bool]) -> Gradients:
        return Gradients(
            torch.empty_like(hidden_NH) if needs[0] else None,
            torch.zeros_like(weight_VH) if needs[1] else None,
            torch.zeros_like(bias_V) if bias_V is not None and needs[2] else None,
        )

    def add(self, rows: slice, gradient_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
        """Accumulate one chunk, from the gradient with respect to its logits."""
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = gradient_CV @ weight_VH
        if self.weight_VH is not None:
            if gradient_CV.dtype == self.weight_VH.dtype:
                self.weight_VH.addmm_(gradient_CV.T, hidden_CH)
            else:
                self.weight_VH.add_(gradient_CV.T @ hidden_CH)
        if self.bias_V is not None:
            self.bias_V.add_(gradient_CV.sum(dim=0, dtype=self.bias_V.dtype))


@torch.no_grad()
def _run(
    hidden_NH: Tensor, head: LinearHead, fused: FusedPass, gradients: Gradients | None
) -> tuple[Tensor, TokenStats]:
    with torch.autocast(hidden_NH.device.type, enabled=False):  # dtypes are chosen explicitly below
        teacher = fused.inputs.teacher
        weight_VH = head.weight_VH.detach().to(head.dtype)
        count, vocabulary = len(hidden_NH), len(weight_VH)
        size = max(1, min(count, fused.chunk_elements // vocabulary))
        step = max(1, fused.block_elements // vocabulary)
        buffer_CV = head.buffer(size)
        teacher_buffer_CV = teacher.buffer(size) if isinstance(teacher, (FromHidden, Composed, Gain, Aligned)) else None
        fast = kernels() if buffer_CV.device.type == "cpu" and buffer_CV.dtype == torch.float32 else None
        parts: list[TokenStats] = []
        loss = torch.zeros((), dtype=logp_dtype(head.dtype), device=hidden_NH.device)
        for start in range(0, count, size):
            stop = min(count, start + size)
            hidden_CH = hidden_NH[start:stop].to(head.dtype)
            logits_CV = head.logits_into(buffer_CV[: stop - start], hidden_CH, weight_VH)
            chunk_teacher = None if teacher is None else teacher.rows(start, stop)
            if isinstance(chunk_teacher, (FromHidden, Composed, Gain, Aligned)):
                chunk_teacher = chunk_teacher.with_logits(teacher_buffer_CV)
            for first in range(0, stop - start, step):
                last = min(stop - start, first + step)
                block_teacher = None if chunk_teacher is None else chunk_teacher.rows(first, last)
                rows = slice(start + first, start + last)
                stats, block_loss = _block(
                    logits_CV[first:last], rows, block_teacher, fused, gradients is not None, fast
                )
                parts.append(stats)
                if block_loss is not None:
                    loss += block_loss
            if gradients is not None:
                gradients.add(slice(start, stop), logits_CV, hidden_CH, weight_VH)
    return loss, TokenStats.concatenate(parts)


def _block(
    logits_RV: Tensor,
    rows: slice,
    teacher: Distributions | None,
    fused: FusedPass,
    train: bool,
    fast: Kernels | None,
) -> tuple[TokenStats, Tensor | None]:
    """Statistics of R tokens and the sum of their losses. With `train`, the logits are overwritten with their gradient."""
    if fast is not None and _fits_kernels(teacher, fused.inputs):
        return _block_by_kernels(fast, logits_RV, rows, teacher, fused, train)
    inputs = fused.inputs
    wide_RV = logits_RV.to(logp_dtype(logits_RV.dtype))
    logp_RV = torch.log_softmax(wide_RV / inputs.temperature if inputs.temperature != 1.0 else wide_RV, dim=-1)
    p_RV = logp_RV.exp()
    targets_R1 = inputs.targets_N[rows, None]
    logp_R = logp_RV.gather(1, targets_R1).squeeze(1)
    values: dict[str, Tensor | None] = {
        "logp_N": logp_R,
        "entropy_N": -torch.linalg.vecdot(p_RV, logp_RV),
    }
    divergence_gradient: LogitGradient | None = None
    if teacher is not None:
        known = teacher.materialize()
        compared: dict[str, Tensor | None]
        if isinstance(known, SpanLogp):
            compared = dict(zip(("kl_student_teacher_N", "teacher_logp_N"), known.compare(logp_R), strict=True))
        elif isinstance(known, TopK) and known.group_V is None:
            compared, divergence_gradient = _compare_top_k(known, logp_RV, p_RV, inputs.divergence if train else None)
        elif isinstance(known, (TopK, Grouped, Sorted)):
            compared, divergence_gradient = _compare_by_autograd(
                known, logp_RV, p_RV, inputs.divergence if train else None
            )
        else:
            exact = known.teacher if isinstance(known, ExactGain) else known
            teacher_logp_RV = exact.logp_NV.to(logp_RV)
            if isinstance(teacher, Exact):  # cached from a model that may exclude events: −inf
                teacher_logp_RV = teacher_logp_RV.clamp_min(token_losses.LOWEST)
            pair = Pair.of(logp_RV, p_RV, teacher_logp_RV)
            compared = {"kl_student_teacher_N": pair.reverse_N, "kl_teacher_student_N": pair.forward_N}
            if inputs.divergence is not None and train:
                if isinstance(known, ExactGain):
                    pair = Pair.of(logp_RV, p_RV, known.target(logp_RV))
                compared["divergence_N"], divergence_gradient = inputs.divergence.closed_form(pair)
        if inputs.divergence is not None and "divergence_N" not in compared and not isinstance(known, SpanLogp):
            compared["divergence_N"] = inputs.divergence(*known.align(logp_RV))
        values |= compared
        if inputs.teacher_tokens and not isinstance(known, (SpanLogp, Sorted, Grouped)):
            values["teacher_logp_N"] = known.token_logp(inputs.targets_N[rows])
    stats = TokenStats(**values)  # type: ignore[arg-type]
    if fused.token_loss is None:
        return stats, None
    loss_R, by_logp_R, by_divergence_R = _loss_derivatives(stats, rows, fused.token_loss)
    if train:
        gradient_RV = None
        if by_divergence_R is not None and divergence_gradient is not None:
            gradient_RV = divergence_gradient(by_divergence_R[:, None])
        if by_logp_R is not None:
            logp_gradient_RV = p_RV.mul_(-by_logp_R[:, None])
            logp_gradient_RV.scatter_add_(1, targets_R1, by_logp_R[:, None])
            gradient_RV = logp_gradient_RV if gradient_RV is None else gradient_RV.add_(logp_gradient_RV)
        if gradient_RV is None:
            logits_RV.zero_()
        else:
            logits_RV.copy_(gradient_RV if inputs.temperature == 1.0 else gradient_RV.div_(inputs.temperature))
    return stats, loss_R.sum()


def _fits_kernels(teacher: Distributions | None, inputs: TokenInputs) -> TypeGuard[FromLogits | None]:
    """Whether the kernels cover the case: temperature 1, logits of both models, no divergence but the two KLs."""
    if inputs.temperature != 1.0 or inputs.divergence not in (None, token_losses.REVERSE, token_losses.FORWARD):
        return False
    if teacher is None:
        return inputs.divergence is None
    if not isinstance(teacher, FromLogits) or teacher.temperature != 1.0:
        return False
    logits_RV = teacher.logits_NV
    return logits_RV.dtype == torch.float32 and logits_RV.device.type == "cpu" and logits_RV.is_contiguous()


def _block_by_kernels(
    fast: Kernels, logits_RV: Tensor, rows: slice, teacher: FromLogits | None, fused: FusedPass, train: bool
) -> tuple[TokenStats, Tensor | None]:
    """As `_block`, in two passes over the logits."""
    inputs, teacher_RV = fused.inputs, None if teacher is None else teacher.logits_NV
    targets_R, reverse = inputs.targets_N[rows], inputs.divergence is token_losses.REVERSE
    measured = fast.loss_stats(logits_RV, teacher_RV, targets_R)
    compared: dict[str, Tensor] = {}
    if teacher is not None:
        compared["kl_student_teacher_N"] = measured.kl_student_teacher_R
        compared["kl_teacher_student_N"] = measured.kl_teacher_student_R
        if inputs.divergence is not None:
            compared["divergence_N"] = measured.kl_student_teacher_R if reverse else measured.kl_teacher_student_R
        if inputs.teacher_tokens:
            compared["teacher_logp_N"] = measured.teacher_logp_R
    stats = TokenStats(measured.logp_R, measured.entropy_R, **compared)
    if fused.token_loss is None:
        return stats, None
    loss_R, by_logp_R, by_divergence_R = _loss_derivatives(stats, rows, fused.token_loss)
    if train:
        grad_R3 = logits_RV.new_zeros(len(logits_RV), 3)
        if by_logp_R is not None:
            grad_R3[:, 0] = by_logp_R
        if by_divergence_R is not None:
            grad_R3[:, 1 if reverse else 2] = by_divergence_R
        fast.loss_gradient(logits_RV, teacher_RV, targets_R, measured, grad_R3)
    return stats, loss_R.sum()


def _loss_derivatives(
    stats: TokenStats, rows: slice, token_loss: TokenLoss
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Token losses and their derivatives by log-prob and by divergence, by autograd on the loss itself."""
    with torch.enable_grad():
        logp_R = stats.logp_N.detach().requires_grad_()
        divergence_R = None if stats.divergence_N is None else stats.divergence_N.detach().requires_grad_()
        leaves = [logp_R] if divergence_R is None else [logp_R, divergence_R]
        loss_R = token_loss(replace(stats, logp_N=logp_R, divergence_N=divergence_R), rows)
        if not loss_R.requires_grad:
            return loss_R, None, None
        gradients = torch.autograd.grad(loss_R.sum(), leaves, allow_unused=True)
    return loss_R.detach(), gradients[0], None if divergence_R is None else gradients[1]


def _compare_top_k(
    teacher: TopK, logp_RV: Tensor, p_RV: Tensor, divergence: Divergence | None
) -> tuple[dict[str, Tensor | None], LogitGradient | None]:
    """As `Pair`, over the k kept tokens and the tail: few enough events to leave their gradient to autograd."""
    with torch.enable_grad():
        student_NK = logp_RV.gather(1, teacher.ids_NK.long()).requires_grad_()
        student_NE, teacher_NE = teacher.align_kept(student_NK)
        value_N = None if divergence is None else divergence(student_NE, teacher_NE)
        by_kept_NK = None if value_N is None else torch.autograd.grad(value_N.sum(), student_NK, retain_graph=True)[0]
    compared = _kls(student_NE, teacher_NE)
    if value_N is None or by_kept_NK is None:
        return compared, None
    compared["divergence_N"] = value_N.detach()

    def gradient(outer_N1: Tensor) -> Tensor:
        weighted_NK = by_kept_NK * outer_N1
        gradient_RV = p_RV * -weighted_NK.sum(dim=-1, keepdim=True)
        return gradient_RV.scatter_add_(1, teacher.ids_NK.long(), weighted_NK)

    return compared, gradient


def _compare_by_autograd(
    teacher: TopK | Grouped | Sorted, logp_RV: Tensor, p_RV: Tensor, divergence: Divergence | None
) -> tuple[dict[str, Tensor | None], LogitGradient | None]:
    """As `_compare_top_k`, over events that are sums of tokens, or ranks."""
    with torch.enable_grad():
        leaf_RV = logp_RV.detach().requires_grad_()
        student_NE, teacher_NE = teacher.align(leaf_RV)
        value_N = None if divergence is None else divergence(student_NE, teacher_NE)
        by_logp_RV = None if value_N is None else torch.autograd.grad(value_N.sum(), leaf_RV)[0]
    # A KL between ranks is none between tokens.
    compared = {} if isinstance(teacher, Sorted) else _kls(student_NE.detach(), teacher_NE)
    if value_N is None or by_logp_RV is None:
        return compared, None
    compared["divergence_N"] = value_N.detach()
    # Through the softmax: d / d logit_j = g_j − p_j Σ_i g_i.
    by_logit_RV = by_logp_RV - p_RV * by_logp_RV.sum(dim=-1, keepdim=True)
    return compared, lambda outer_N1: by_logit_RV * outer_N1


@torch.no_grad()
def _kls(student_NE: Tensor, teacher_NE: Tensor) -> dict[str, Tensor | None]:
    return {
        "kl_student_teacher_N": token_losses.reverse_kl(student_NE, teacher_NE),
        "kl_teacher_student_N": token_losses.forward_kl(student_NE, teacher_NE),
    }
