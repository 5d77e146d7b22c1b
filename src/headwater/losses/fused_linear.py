"""Fused loss of a linear head: loss, statistics and gradients from hidden states, each matrix product done once.

The loss of a token depends on its logits through two numbers (its log-prob and its divergence from the teacher), so the gradient
with respect to the logits is known in closed form as soon as the logits are. Each chunk's logits are computed once, overwritten
with their own gradient, and used for the two products that carry it to hidden states and head: three products for the student
and one for the teacher, the minimum for any method. Memory is two chunks and the gradients, for any number of tokens.

    C  tokens of a chunk (sized for the matrix products)      R  tokens of a block (sized for the processor's cache)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwater.kernels import Kernels, kernels
from headwater.losses import token_losses
from headwater.losses.comparison import Comparison, Student
from headwater.losses.distributions import FromLogits, logits_buffer, with_logits
from headwater.losses.output_head import LinearHead, log_probs, logp_dtype
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
        weight_VH = head.weight_VH.detach().to(head.dtype)
        count, vocabulary = len(hidden_NH), len(weight_VH)
        size = max(1, min(count, fused.chunk_elements // vocabulary))
        step = max(1, fused.block_elements // vocabulary)
        buffer_CV = head.buffer(size)
        teacher_buffer_CV = logits_buffer(fused.inputs.teacher, size)
        fast = kernels() if buffer_CV.device.type == "cpu" and buffer_CV.dtype == torch.float32 else None
        parts: list[TokenStats] = []
        loss = torch.zeros((), dtype=logp_dtype(head.dtype), device=hidden_NH.device)
        for start in range(0, count, size):
            stop = min(count, start + size)
            hidden_CH = hidden_NH[start:stop].to(head.dtype)
            logits_CV = head.logits_into(buffer_CV[: stop - start], hidden_CH, weight_VH)
            chunk = fused.inputs.rows(start, stop)
            if chunk.teacher is not None:
                chunk = replace(chunk, teacher=with_logits(chunk.teacher, teacher_buffer_CV))
            for first in range(0, stop - start, step):
                last = min(stop - start, first + step)
                block = _Block(chunk.rows(first, last), slice(start + first, start + last), fused.token_loss, fast)
                stats, block_loss = block.run(logits_CV[first:last], gradients is not None)
                parts.append(stats)
                if block_loss is not None:
                    loss += block_loss
            if gradients is not None:
                gradients.add(slice(start, stop), logits_CV, hidden_CH, weight_VH)
    return loss, parts[0].concatenate(parts[1:], None)


@dataclass(frozen=True)
class _Block:
    """R tokens of one elementwise pass; `rows` are theirs among the N."""

    inputs: TokenInputs
    rows: slice
    token_loss: TokenLoss | None
    fast: Kernels | None

    def run(self, logits_RV: Tensor, train: bool) -> tuple[TokenStats, Tensor | None]:
        """Statistics of the tokens and the sum of their losses. With `train`, the logits are overwritten with their gradient."""
        if self.fast is not None and _fits_kernels(self.inputs):
            return self._run_kernels(self.fast, logits_RV, train)
        inputs = self.inputs
        logp_RV = log_probs(logits_RV, inputs.temperature)
        p_RV, targets_R1 = logp_RV.exp(), inputs.targets_N[:, None]
        logp_R = logp_RV.gather(1, targets_R1).squeeze(1)
        compared = inputs.compare(Student(logp_RV, logp_R, p_RV), gradient=train)
        stats = TokenStats.of(logp_R, -torch.linalg.vecdot(p_RV, logp_RV), compared)
        if self.token_loss is None:
            return stats, None
        loss_R, by_logp_R, by_divergence_R = self._loss_derivatives(stats, self.token_loss)
        if train:
            gradient_RV = None
            if by_divergence_R is not None and compared.gradient is not None:
                gradient_RV = compared.gradient(by_divergence_R[:, None])
            if by_logp_R is not None:
                logp_gradient_RV = p_RV.mul_(-by_logp_R[:, None])
                logp_gradient_RV.scatter_add_(1, targets_R1, by_logp_R[:, None])
                gradient_RV = logp_gradient_RV if gradient_RV is None else gradient_RV.add_(logp_gradient_RV)
            if gradient_RV is None:
                logits_RV.zero_()
            else:
                logits_RV.copy_(gradient_RV if inputs.temperature == 1.0 else gradient_RV.div_(inputs.temperature))
        return stats, loss_R.sum()

    def _run_kernels(self, fast: Kernels, logits_RV: Tensor, train: bool) -> tuple[TokenStats, Tensor | None]:
        """As `run`, in two passes over the logits."""
        inputs = self.inputs
        teacher_RV = inputs.teacher.logits_NV if isinstance(inputs.teacher, FromLogits) else None
        reverse = inputs.divergence is token_losses.REVERSE
        measured = fast.loss_stats(logits_RV, teacher_RV, inputs.targets_N)
        compared = Comparison()
        if teacher_RV is not None:
            kls = measured.kl_student_teacher_R, measured.kl_teacher_student_R
            divergence_R = None if inputs.divergence is None else kls[0 if reverse else 1]
            compared = Comparison(divergence_R, *kls, measured.teacher_logp_R if inputs.teacher_tokens else None)
        stats = TokenStats.of(measured.logp_R, measured.entropy_R, compared)
        if self.token_loss is None:
            return stats, None
        loss_R, by_logp_R, by_divergence_R = self._loss_derivatives(stats, self.token_loss)
        if train:
            grad_R3 = logits_RV.new_zeros(len(logits_RV), 3)
            if by_logp_R is not None:
                grad_R3[:, 0] = by_logp_R
            if by_divergence_R is not None:
                grad_R3[:, 1 if reverse else 2] = by_divergence_R
            fast.loss_gradient(logits_RV, teacher_RV, inputs.targets_N, measured, grad_R3)
        return stats, loss_R.sum()

    def _loss_derivatives(
        self, stats: TokenStats, token_loss: TokenLoss
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Token losses and their derivatives by log-prob and by divergence, by autograd on the loss itself."""
        with torch.enable_grad():
            logp_R = stats.logp_N.detach().requires_grad_()
            divergence_R = None if stats.divergence_N is None else stats.divergence_N.detach().requires_grad_()
            leaves = [logp_R] if divergence_R is None else [logp_R, divergence_R]
            loss_R = token_loss(replace(stats, logp_N=logp_R, divergence_N=divergence_R), self.rows)
            if not loss_R.requires_grad:
                return loss_R, None, None
            gradients = torch.autograd.grad(loss_R.sum(), leaves, allow_unused=True)
        return loss_R.detach(), gradients[0], None if divergence_R is None else gradients[1]


def _fits_kernels(inputs: TokenInputs) -> bool:
    """Whether the kernels cover the case: temperature 1, logits of both models, no divergence but the two KLs."""
    if inputs.temperature != 1.0 or inputs.divergence not in (None, token_losses.REVERSE, token_losses.FORWARD):
        return False
    if inputs.teacher is None:
        return inputs.divergence is None
    if not isinstance(inputs.teacher, FromLogits) or inputs.teacher.temperature != 1.0:
        return False
    logits_RV = inputs.teacher.logits_NV
    return logits_RV.dtype == torch.float32 and logits_RV.device.type == "cpu" and logits_RV.is_contiguous()
