"""The loss stage of a linear head: hidden states -> loss, its measurements and its gradients, every matrix product once.

The loss of a token depends on its logits through a few numbers (its log-prob, its divergence from the teacher), so the gradient by
the logits is known in closed form as soon as the logits are there. Each chunk's logits are therefore made once, turned into
their own gradient in place, and used for the two products that carry it to hidden states and head: three products for the
student and one for the teacher, which is the least that any method needs. Memory is two chunks and the gradients,
however many tokens there are.

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
from headwater.losses.distributions import Distributions, Exact, FromHidden, FromLogits, LinearHead, TopK, widened
from headwater.losses.token_losses import Divergence, Pair
from headwater.losses.token_stats import TokenStats

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Logits alive at once, of the student and as many of the teacher."""
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Numbers that one elementwise pass goes over; on a CPU a few of these must fit its second-level cache."""

TokenLoss = Callable[[TokenStats, slice], Tensor]
"""(what the policy says of some of the tokens, which of the N they are) -> their loss, weighted, unreduced."""


@dataclass(frozen=True)
class Work:
    """All that the stage needs beside hidden states and head; what is written back is in `stats`."""

    targets_N: Tensor
    temperature: float
    teacher: Distributions | None
    divergence: Divergence | None
    teacher_tokens: bool
    token_loss: TokenLoss | None
    chunk: int
    block: int


def loss_and_stats(hidden_NH: Tensor, head: LinearHead, work: Work) -> tuple[Tensor, TokenStats]:
    """The summed loss, which carries gradients to hidden states and head, and the measurements, which carry none.

    The gradients are made here and handed over by the backward pass, which can run once.
    """
    held: list[TokenStats] = []
    loss = _Stage.apply(hidden_NH, head.weight_VH, head.bias_V, head, work, held)
    return loss, held[0]


def stats_only(hidden_NH: Tensor, head: LinearHead, work: Work) -> TokenStats:
    return _run(hidden_NH.detach(), head, work, None)[1]


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: LinearHead,
        work: Work,
        held: list[TokenStats],
    ) -> Tensor:
        wanted = Gradients.wanted(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
        loss, stats = _run(hidden_NH, head, work, wanted)
        held.append(stats)
        ctx.gradients = wanted
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.gradients = ctx.gradients.all(), None  # handed over: a copy of the head's would be large
        for one in found:
            if one is not None:
                one.mul_(outer[0])
        return (*found, None, None, None)


@dataclass(frozen=True)
class Gradients:
    """Where the gradients gather: in the type of what they belong to, the head's in float32 or wider."""

    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @staticmethod
    def wanted(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, needs: Sequence[bool]) -> Gradients:
        return Gradients(
            torch.empty_like(hidden_NH) if needs[0] else None,
            torch.zeros_like(weight_VH) if needs[1] else None,
            torch.zeros_like(bias_V) if bias_V is not None and needs[2] else None,
        )

    def all(self) -> tuple[Tensor | None, ...]:
        return self.hidden_NH, self.weight_VH, self.bias_V

    def add(self, rows: slice, slope_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
        """One chunk's share, from the gradient by its logits."""
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = slope_CV @ weight_VH
        if self.weight_VH is not None:
            if slope_CV.dtype == self.weight_VH.dtype:
                self.weight_VH.addmm_(slope_CV.T, hidden_CH)
            else:
                self.weight_VH.add_(slope_CV.T @ hidden_CH)
        if self.bias_V is not None:
            self.bias_V.add_(slope_CV.sum(dim=0, dtype=self.bias_V.dtype))


@torch.no_grad()
def _run(hidden_NH: Tensor, head: LinearHead, work: Work, gradients: Gradients | None) -> tuple[Tensor, TokenStats]:
    with torch.autocast(hidden_NH.device.type, enabled=False):  # the types below are meant
        weight_VH = head.weight_VH.detach().to(head.dtype)
        count, vocabulary = len(hidden_NH), len(weight_VH)
        size = max(1, min(count, work.chunk // vocabulary))
        room_CV = head.buffer(size)
        taught_CV = work.teacher.room(size) if isinstance(work.teacher, FromHidden) else None
        parts: list[TokenStats] = []
        loss = torch.zeros((), dtype=widened(head.dtype), device=hidden_NH.device)
        step = max(1, work.block // vocabulary)
        fast = kernels() if room_CV.device.type == "cpu" and room_CV.dtype == torch.float32 else None
        for start in range(0, count, size):
            stop = min(count, start + size)
            hidden_CH = hidden_NH[start:stop].to(head.dtype)
            logits_CV = head.into(room_CV[: stop - start], hidden_CH, weight_VH)
            known = None if work.teacher is None else work.teacher.rows(start, stop)
            if isinstance(known, FromHidden):
                known = known.with_logits(taught_CV)
            for first in range(0, stop - start, step):
                block = slice(first, min(stop - start, first + step))
                rows = slice(start + block.start, start + block.stop)
                one, share = _block(logits_CV[block], rows, known, block, work, gradients is not None, fast)
                parts.append(one)
                if share is not None:
                    loss += share
            if gradients is not None:
                gradients.add(slice(start, stop), logits_CV, hidden_CH, weight_VH)
    return loss, TokenStats.joined(parts)


def _block(
    logits_RV: Tensor,
    rows: slice,
    known: Distributions | None,
    block: slice,
    work: Work,
    train: bool,
    fast: Kernels | None,
) -> tuple[TokenStats, Tensor | None]:
    """What is measured of R tokens and the sum of their losses; with `train` their logits become their own gradient."""
    if fast is not None and _is_plain(known, work):
        theirs = None if known is None else known.rows(block.start, block.stop)
        return _by_kernels(fast, logits_RV, rows, theirs, work, train)
    wide_RV = logits_RV.to(widened(logits_RV.dtype))
    logp_RV = torch.log_softmax(wide_RV / work.temperature if work.temperature != 1.0 else wide_RV, dim=-1)
    p_RV = logp_RV.exp()
    targets_R1 = work.targets_N[rows, None]
    values: dict[str, Tensor | None] = {
        "logp_N": logp_RV.gather(1, targets_R1).squeeze(1),
        "entropy_N": -torch.linalg.vecdot(p_RV, logp_RV),
    }
    slope_RV: Callable[[Tensor], Tensor] | None = None
    if known is not None:
        told = known.rows(block.start, block.stop).ready()
        if isinstance(told, TopK):
            found, slope_RV = _top_k(told, logp_RV, p_RV, work.divergence if train else None)
        else:
            theirs_RV = told.logp_NV.to(logp_RV)
            if isinstance(known, Exact):  # kept from a model that may exclude events: −inf
                theirs_RV = theirs_RV.clamp_min(token_losses.LOWEST)
            pair = Pair.of(logp_RV, p_RV, theirs_RV)
            found = {"kl_student_teacher_N": pair.reverse_N, "kl_teacher_student_N": pair.forward_N}
            if work.divergence is not None and train:
                found["divergence_N"], slope_RV = work.divergence.closed(pair)
        if work.divergence is not None and "divergence_N" not in found:
            found["divergence_N"] = work.divergence(*told.align(logp_RV))
        values |= found
        if work.teacher_tokens:
            values["teacher_logp_N"] = told.token_logp(work.targets_N[rows])
    stats = TokenStats(**values)  # type: ignore[arg-type]
    if work.token_loss is None:
        return stats, None
    loss_R, by_logp_R, by_divergence_R = _slopes(stats, rows, work.token_loss)
    if train:
        gradient_RV = None
        if by_divergence_R is not None and slope_RV is not None:
            gradient_RV = slope_RV(by_divergence_R[:, None])
        if by_logp_R is not None:
            pull_RV = p_RV.mul_(-by_logp_R[:, None])
            pull_RV.scatter_add_(1, targets_R1, by_logp_R[:, None])
            gradient_RV = pull_RV if gradient_RV is None else gradient_RV.add_(pull_RV)
        if gradient_RV is None:
            logits_RV.zero_()
        else:
            logits_RV.copy_(gradient_RV if work.temperature == 1.0 else gradient_RV.div_(work.temperature))
    return stats, loss_R.sum()


def _is_plain(known: Distributions | None, work: Work) -> TypeGuard[FromLogits | None]:
    """Whether the kernels know it: logits of both, as they are, and no divergence but the two KL."""
    if work.temperature != 1.0 or work.divergence not in (None, token_losses.REVERSE, token_losses.FORWARD):
        return False
    if known is None:
        return work.divergence is None
    if not isinstance(known, FromLogits) or known.temperature != 1.0:
        return False
    theirs = known.logits_NV
    return theirs.dtype == torch.float32 and theirs.device.type == "cpu" and theirs.is_contiguous()


def _by_kernels(
    fast: Kernels, logits_RV: Tensor, rows: slice, known: FromLogits | None, work: Work, train: bool
) -> tuple[TokenStats, Tensor | None]:
    """As `_block`, in two passes over the logits."""
    targets_R, theirs_RV = work.targets_N[rows], None if known is None else known.logits_NV
    found = fast.measure(logits_RV, theirs_RV, targets_R)
    stats = TokenStats(logp_N=found.logp_R, entropy_N=found.entropy_R)
    if known is not None:
        stats = replace(
            stats, kl_student_teacher_N=found.student_teacher_R, kl_teacher_student_N=found.teacher_student_R
        )
        if work.divergence is not None:
            reverse = work.divergence is token_losses.REVERSE
            stats = replace(stats, divergence_N=found.student_teacher_R if reverse else found.teacher_student_R)
        if work.teacher_tokens:
            stats = replace(stats, teacher_logp_N=found.teacher_logp_R)
    if work.token_loss is None:
        return stats, None
    loss_R, by_logp_R, by_divergence_R = _slopes(stats, rows, work.token_loss)
    if train:
        by_R3 = logits_RV.new_zeros(len(logits_RV), 3)
        if by_logp_R is not None:
            by_R3[:, 0] = by_logp_R
        if by_divergence_R is not None:
            by_R3[:, 1 if work.divergence is token_losses.REVERSE else 2] = by_divergence_R
        fast.slope(logits_RV, theirs_RV, targets_R, found, by_R3)
    return stats, loss_R.sum()


def _slopes(stats: TokenStats, rows: slice, token_loss: TokenLoss) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The losses of some tokens and their derivatives by log-prob and by divergence, from the loss itself."""
    with torch.enable_grad():
        logp_R = stats.logp_N.detach().requires_grad_()
        divergence_R = None if stats.divergence_N is None else stats.divergence_N.detach().requires_grad_()
        leaves = [logp_R] if divergence_R is None else [logp_R, divergence_R]
        loss_R = token_loss(stats.led_by(logp_R, divergence_R), rows)
        if not loss_R.requires_grad:
            return loss_R, None, None
        found = torch.autograd.grad(loss_R.sum(), leaves, allow_unused=True)
    return loss_R.detach(), found[0], None if divergence_R is None else found[1]


def _top_k(
    told: TopK, logp_RV: Tensor, p_RV: Tensor, divergence: Divergence | None
) -> tuple[dict[str, Tensor | None], Callable[[Tensor], Tensor] | None]:
    """As `Pair`, over the k kept tokens and the tail: few enough events that their gradient is left to autograd."""
    with torch.enable_grad():
        student_NK = logp_RV.gather(1, told.ids_NK.long()).requires_grad_()
        student_NE, teacher_NE = told.events(student_NK)
        value_N = None if divergence is None else divergence(student_NE, teacher_NE)
        by_kept_NK = None if value_N is None else torch.autograd.grad(value_N.sum(), student_NK, retain_graph=True)[0]
    with torch.no_grad():
        found: dict[str, Tensor | None] = {
            "kl_student_teacher_N": token_losses.reverse_kl(student_NE, teacher_NE).detach(),
            "kl_teacher_student_N": token_losses.forward_kl(student_NE, teacher_NE).detach(),
        }
    if value_N is None or by_kept_NK is None:
        return found, None
    found["divergence_N"] = value_N.detach()

    def slope(outer_N1: Tensor) -> Tensor:
        weighed_NK = by_kept_NK * outer_N1
        gradient_RV = p_RV * -weighed_NK.sum(dim=-1, keepdim=True)
        return gradient_RV.scatter_add_(1, told.ids_NK.long(), weighed_NK)

    return found, slope
