"""Distributions as log-probs: over the whole vocabulary, the top k and a tail, sorted, or of common spans alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from headwater.losses import per_token
from headwater.losses.alignment import Spans
from headwater.losses.comparison import Comparison, Student, by_autograd, compare_events
from headwater.losses.token_losses import LOWEST, Divergence, Pair


@dataclass(frozen=True)
class Exact:
    """Exact distributions stored as log-probs (N, V)."""

    logp_NV: Tensor

    __len__ = per_token.length
    rows = per_token.rows
    concatenate = per_token.concatenate

    def materialize(self) -> Exact:
        """With `LOWEST` instead of −inf, where a cached model excludes events."""
        return Exact(self.logp_NV.clamp_min(LOWEST))

    def compare(self, student: Student, divergence: Divergence | None, gradient: bool) -> Comparison:
        student_NV, teacher_NV = self.align(student.logp_NV)
        if student.p_NV is None:
            return compare_events(student_NV, teacher_NV, divergence)
        pair = Pair.of(student_NV, student.p_NV, teacher_NV)
        compared = Comparison(None, pair.reverse_N, pair.forward_N)
        if divergence is None:
            return compared
        if not gradient:
            return replace(compared, divergence_N=divergence(student_NV, teacher_NV))
        divergence_N, by_logits = divergence.closed_form(pair)
        return replace(compared, divergence_N=divergence_N, gradient=by_logits)

    def align(self, student_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of student and teacher over the same events, both (N, E); the student's keep their gradient."""
        return student_logp_NV, self.logp_NV.to(student_logp_NV)

    def top_k(self, k: int) -> TopK:
        """Keep the k most probable tokens and merge the others into the tail."""
        kept = self.logp_NV.topk(min(k, self.logp_NV.shape[-1]), dim=-1)
        return TopK(kept.indices, kept.values)

    def token_logp(self, targets_N: Tensor) -> Tensor:
        """The teacher's log-prob of each target token (N,)."""
        return self.logp_NV.gather(1, targets_N[:, None]).squeeze(1).float()


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens, and one further event, the tail, for all others.

    A divergence over these k+1 events is that of the two distributions after merging the tail: never more than the exact
    one, zero when they are equal, and its gradient is exact, with no term dropped (the bias of 2605.11182 comes from a sum
    over the k tokens alone).

    count_N  number of kept tokens in each row, which come first; None: all k. A row without any is one event, whose divergence is 0
    group_V  the ids are groups of tokens, and this is the group of each of the student's tokens; None: the ids are tokens
    """

    ids_NK: Tensor
    logp_NK: Tensor
    count_N: Tensor | None = None
    group_V: Tensor | None = None

    __len__ = per_token.length
    rows = per_token.rows
    concatenate = per_token.concatenate
    materialize = per_token.itself

    def compare(self, student: Student, divergence: Divergence | None, gradient: bool) -> Comparison:
        if self.group_V is not None or divergence is None or not gradient:
            return by_autograd(lambda logp_NV: compare_events(*self.align(logp_NV), divergence), student, gradient)
        # The few kept tokens, rather than the vocabulary, are the leaves.
        p_NV, ids_NK = student.p_NV, self.ids_NK.long()
        assert p_NV is not None
        with torch.enable_grad():
            kept_NK = student.logp_NV.gather(1, ids_NK).requires_grad_()
            compared = compare_events(*self.align_kept(kept_NK), divergence)
            assert compared.divergence_N is not None
            by_kept_NK = torch.autograd.grad(compared.divergence_N.sum(), kept_NK)[0]

        def by_logits(outer_N1: Tensor) -> Tensor:
            weighted_NK = by_kept_NK * outer_N1
            return (p_NV * -weighted_NK.sum(dim=-1, keepdim=True)).scatter_add_(1, ids_NK, weighted_NK)

        return replace(compared, divergence_N=compared.divergence_N.detach(), gradient=by_logits)

    def align(self, student_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        if self.group_V is not None:
            groups = int(torch.maximum(self.group_V.max(), self.ids_NK.max())) + 1
            student_logp_NV = group_logp(student_logp_NV, self.group_V, groups)
        return self.align_kept(student_logp_NV.gather(1, self.ids_NK.long()))

    def align_kept(self, student_logp_NK: Tensor) -> tuple[Tensor, Tensor]:
        """As `align`, from the student's log-probs of the kept tokens."""
        teacher_logp_NK = self.logp_NK.to(student_logp_NK)
        if self.count_N is not None:
            absent_NK = self._absent(self.count_N)
            student_logp_NK = student_logp_NK.masked_fill(absent_NK, LOWEST)
            teacher_logp_NK = teacher_logp_NK.masked_fill(absent_NK, LOWEST)
        return _with_tail(student_logp_NK), _with_tail(teacher_logp_NK)

    def top_k(self, k: int) -> TopK:
        """Keep the k most probable of the kept tokens and merge the others into the tail."""
        logp_NK = self.logp_NK if self.count_N is None else self.logp_NK.masked_fill(self._absent(self.count_N), LOWEST)
        kept = logp_NK.topk(min(k, logp_NK.shape[-1]), dim=-1)
        count_N = None if self.count_N is None else self.count_N.clamp_max(kept.values.shape[-1])
        return TopK(self.ids_NK.gather(1, kept.indices), kept.values, count_N, self.group_V)

    def _absent(self, count_N: Tensor) -> Tensor:
        return torch.arange(self.ids_NK.shape[1], device=self.ids_NK.device) >= count_N[:, None]

    def token_logp(self, targets_N: Tensor) -> Tensor:
        """Raises ValueError for a token outside the kept ones: only its tail is known."""
        matches_NK = self.ids_NK == targets_N[:, None]
        if self.count_N is not None:
            matches_NK &= ~self._absent(self.count_N)
        if not bool(matches_NK.any(dim=1).all()):
            raise ValueError("a token outside the teacher's kept top-k has no log-prob of its own")
        return self.logp_NK.float()[matches_NK]


@dataclass(frozen=True)
class Sorted:
    """A distribution's probabilities from the largest to the smallest, without the tokens that they belong to.

    logp_NV     log-probs, descending
    compared_N  whether the row is compared; the divergence of the others is 0
    """

    logp_NV: Tensor
    compared_N: Tensor

    __len__ = per_token.length
    rows = per_token.rows
    concatenate = per_token.concatenate
    materialize = per_token.itself

    def compare(self, student: Student, divergence: Divergence | None, gradient: bool) -> Comparison:
        """The divergence alone: a KL between ranks is none between tokens."""
        if divergence is None:
            return Comparison()
        return by_autograd(lambda logp_NV: Comparison(divergence(*self.align(logp_NV))), student, gradient)

    def align(self, student_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Events are ranks; the smaller vocabulary has probability 0 at the ranks that it lacks."""
        student_logp_NV = student_logp_NV.sort(dim=-1, descending=True, stable=True).values
        ranks, skipped_N1 = max(student_logp_NV.shape[1], self.logp_NV.shape[1]), ~self.compared_N[:, None]
        student_NE, teacher_NE = (
            functional.pad(logp_NV, (0, ranks - logp_NV.shape[1]), value=LOWEST).masked_fill(skipped_N1, LOWEST)
            for logp_NV in (student_logp_NV, self.logp_NV.to(student_logp_NV))
        )
        return student_NE, teacher_NE


@dataclass(frozen=True)
class Grouped:
    """Probabilities of groups of tokens that divide the vocabularies of a student and of its teacher.

    logp_NE     the teacher's log-prob of each group
    group_V     group of each of the student's tokens
    compared_N  whether the row is compared; the divergence of the others is 0
    """

    logp_NE: Tensor
    group_V: Tensor
    compared_N: Tensor

    __len__ = per_token.length
    rows = per_token.rows
    concatenate = per_token.concatenate
    materialize = per_token.itself

    def compare(self, student: Student, divergence: Divergence | None, gradient: bool) -> Comparison:
        return by_autograd(lambda logp_NV: compare_events(*self.align(logp_NV), divergence), student, gradient)

    def align(self, student_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        student_NE = group_logp(student_logp_NV, self.group_V, self.logp_NE.shape[1])
        skipped_N1 = ~self.compared_N[:, None]
        return student_NE.masked_fill(skipped_N1, LOWEST), self.logp_NE.to(student_NE).masked_fill(skipped_N1, LOWEST)

    def top_k(self, k: int) -> TopK:
        """Keep the k most probable groups and merge the others into the tail."""
        kept = self.logp_NE.topk(min(k, self.logp_NE.shape[1]), dim=-1)
        return TopK(kept.indices, kept.values, self.compared_N * kept.values.shape[1], self.group_V)


@dataclass(frozen=True)
class SpanLogp:
    """A teacher's log-prob of each common span of two tokenizations, at every token of the student in that span.

    For a token t of span c the number is log p_T(c) − Σ_{s ∈ c, s ≠ t} log p_S(s), with the student's log-probs when it sampled. So
    its difference to log p_S(t) is log p_T(c) − log p_S(c), the span's log-ratio, and a span of one token has the teacher's log-prob
    of that token.

    logp_N  natural log, at the sampling temperature
    size_N  number of the student's tokens in the token's span; -1 where the tokenizations do not agree, which is not compared
    """

    logp_N: Tensor
    size_N: Tensor

    @staticmethod
    def of(spans: Spans, student_logp_N: Tensor, teacher_logp_M: Tensor) -> SpanLogp:
        """From the log-probs of the N tokens of the student and of the M tokens of the teacher.

        Example: one span of the student's tokens a, b with log-probs -1, -2 and the teacher's token ab with -0.5: (1.5, 0.5).
        """
        pairs, device = spans.pairs(), student_logp_N.device
        own_C = torch.tensor([len(own) for own, _ in pairs], dtype=torch.long, device=device)
        other_C = torch.tensor([len(other) for _, other in pairs], dtype=torch.long, device=device)
        span_C, read = torch.arange(len(pairs), device=device), spans.first_read
        own_span_R, other_span_R = span_C.repeat_interleave(own_C), span_C.repeat_interleave(other_C)
        own_logp_R = student_logp_N[:read]
        own_logp_C = own_logp_R.new_zeros(len(pairs)).index_add_(0, own_span_R, own_logp_R)
        teacher_logp_C = own_logp_R.new_zeros(len(pairs)).index_add_(
            0, other_span_R, teacher_logp_M[: len(other_span_R)].to(own_logp_R)
        )
        logp_N, size_N = torch.zeros_like(student_logp_N), torch.full_like(student_logp_N, -1, dtype=torch.long)
        # In a span of one token the bracket is exactly 0, so it has the teacher's number to the bit.
        logp_N[:read] = teacher_logp_C[own_span_R] - (own_logp_C[own_span_R] - own_logp_R)
        size_N[:read] = own_C[own_span_R]
        return SpanLogp(logp_N, size_N)

    __len__ = per_token.length
    rows = per_token.rows
    concatenate = per_token.concatenate
    materialize = per_token.itself

    def compare(self, student: Student, divergence: Divergence | None, gradient: bool) -> Comparison:
        """Sampled reverse KL, and the teacher's log-prob as `token_losses.sampled_reverse_kl` reads it, without gradient.

        The first sums to log p_S(c) − log p_T(c) over a span. The second is the student's own where nothing is compared.
        """
        student_logp_N, compared_N = student.logp_N.detach(), self.size_N > 0
        teacher_logp_N = torch.where(compared_N, self.logp_N.to(student_logp_N), student_logp_N)
        kl_N = (student_logp_N - teacher_logp_N) / self.size_N.clamp_min(1)
        return Comparison(kl_student_teacher_N=kl_N, teacher_logp_N=teacher_logp_N)


TAIL_FLOOR = 1e-7
"""float32 cannot tell a smaller tail from rounding; both sides get the same floor, so equality still gives zero."""
GROUP_FLOOR = 1e-30
"""Least probability of a group: a group is a sum, which rounds relative to itself."""


def group_logp(logp_NV: Tensor, group_V: Tensor, groups: int) -> Tensor:
    """Log of the summed probabilities of each group: (N, V), (V,) -> (N, groups), at least log GROUP_FLOOR."""
    p_NE = logp_NV.new_zeros(len(logp_NV), groups).index_add(1, group_V, logp_NV.exp())
    return p_NE.clamp_min(GROUP_FLOOR).log()


def _with_tail(logp_NK: Tensor) -> Tensor:
    tail_N1 = (1.0 - logp_NK.exp().sum(dim=-1, keepdim=True)).clamp_min(TAIL_FLOOR).log()
    return torch.cat([logp_NK, tail_N1], dim=-1)
