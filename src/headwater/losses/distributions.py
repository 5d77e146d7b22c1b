"""Teacher distributions over the next token, for N tokens, in the forms in which they are stored.

Every form can be sliced, materialized, and then aligned with a student's log-probs: both come back as log-probs over the same E
events, so that every divergence in `token_losses` works on every form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headwater.losses.materialized import Exact, ExactGain, Known, Sorted, SpanLogp, TopK
from headwater.losses.output_head import Head, LinearHead, logp_dtype


class Distributions(Protocol):
    def __len__(self) -> int: ...
    def rows(self, start: int, stop: int) -> Distributions: ...
    def materialize(self) -> Known:
        """The form that holds log-probs; hidden states and logits are turned into it here."""
        ...


@dataclass(frozen=True)
class FromHidden:
    """Exact distributions stored as hidden states and a head: H numbers per token instead of V."""

    hidden_NH: Tensor
    head: Head
    temperature: float

    def __len__(self) -> int:
        return self.hidden_NH.shape[0]

    def rows(self, start: int, stop: int) -> FromHidden:
        return FromHidden(self.hidden_NH[start:stop], self.head, self.temperature)

    def materialize(self) -> Exact:
        return self.with_logits().materialize()

    def buffer(self, tokens: int) -> Tensor | None:
        """Memory for logits that one chunk after the other can reuse; None for a head that is not linear."""
        return self.head.buffer(tokens) if isinstance(self.head, LinearHead) else None

    @torch.no_grad()
    def with_logits(self, buffer_CV: Tensor | None = None) -> FromLogits:
        """Compute the logits, in `buffer_CV` if there is one."""
        if buffer_CV is None or not isinstance(self.head, LinearHead):
            return FromLogits(self.head(self.hidden_NH), self.temperature)
        hidden_NH, weight_VH = self.hidden_NH.to(self.head.dtype), self.head.weight_VH.to(self.head.dtype)
        return FromLogits(self.head.logits_into(buffer_CV[: len(self)], hidden_NH, weight_VH), self.temperature)


@dataclass(frozen=True)
class FromLogits:
    """Exact distributions stored as logits (N, V)."""

    logits_NV: Tensor
    temperature: float

    def __len__(self) -> int:
        return self.logits_NV.shape[0]

    def rows(self, start: int, stop: int) -> FromLogits:
        return FromLogits(self.logits_NV[start:stop], self.temperature)

    def materialize(self) -> Exact:
        wide_NV = self.logits_NV.to(logp_dtype(self.logits_NV.dtype))
        return Exact(torch.log_softmax(wide_NV if self.temperature == 1.0 else wide_NV / self.temperature, dim=-1))


@dataclass(frozen=True)
class Composed:
    """softmax(Σ_m c_m · log π_m) of exact distributions π_m: their weighted product Π π_m^{c_m}, normalized.

    Every reward that is a weighted difference of log-probs is the reverse KL to such a distribution: where Σ c_m = 1,
    Σ_v S(v) (log S(v) − Σ_m c_m log π_m(v)) = KL(S ‖ composed) − log Z, and log Z does not depend on the student S. So
    c = (λ, 1−λ) over the trained teacher and a reference is ExOPD (2602.12125), and (1, α, −α) over the student's start, the
    trained teacher and the teacher before training is weak-to-strong distillation (2607.05394, 2607.26246).

    Example: π_1 = (½, ½), π_2 = (¼, ¾) and c = (2, −1) give (½² / ¼, ½² / ¾) = (1, ⅓), normalized (¾, ¼).
    """

    parts: tuple[Distributions, ...]
    """All over one vocabulary, and those stored as hidden states in one dtype."""
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def rows(self, start: int, stop: int) -> Composed:
        return Composed(tuple(part.rows(start, stop) for part in self.parts), self.weights)

    def materialize(self) -> Exact:
        return self.with_logits().materialize()

    def buffer(self, tokens: int) -> Tensor | None:
        """Memory for one part's logits, which all parts and chunks reuse; None where no part has a linear head."""
        buffers = (part.buffer(tokens) for part in self.parts if isinstance(part, FromHidden))
        return next((buffer_CV for buffer_CV in buffers if buffer_CV is not None), None)

    @torch.no_grad()
    def with_logits(self, buffer_CV: Tensor | None = None) -> FromLogits:
        """The weighted sum of the parts' logits in float32 or wider, at temperature 1; `buffer_CV` holds one part's at a time."""
        total_CV: Tensor | None = None
        for part, weight in zip(self.parts, self.weights, strict=True):
            logits_CV, temperature = _logits(part, buffer_CV)
            if total_CV is None:
                total_CV = torch.zeros_like(logits_CV, dtype=logp_dtype(logits_CV.dtype))
            total_CV.add_(logits_CV.to(total_CV.device), alpha=weight / temperature)
        assert total_CV is not None
        return FromLogits(total_CV, 1.0)


@dataclass(frozen=True)
class Gain:
    """The gain of one exact distribution over another, which a student follows where that also brings it closer to the first.

    It materializes to `ExactGain`, whose target is the student's own distribution, moved (OPD², 2607.15161).
    """

    parts: tuple[Distributions, Distributions]
    """(the teacher, the model that it is compared with), over one vocabulary."""

    def __len__(self) -> int:
        return len(self.parts[0])

    def rows(self, start: int, stop: int) -> Gain:
        return Gain((self.parts[0].rows(start, stop), self.parts[1].rows(start, stop)))

    def materialize(self) -> ExactGain:
        teacher, base = (part.materialize() for part in self.parts)
        if not (isinstance(teacher, Exact) and isinstance(base, Exact)):
            raise ValueError("a gain needs whole distributions, and a part holds only its top-k tokens")
        return ExactGain(teacher, base)

    def buffer(self, tokens: int) -> Tensor | None:
        """Memory for the teacher's logits; those of the other model get their own."""
        return self.parts[0].buffer(tokens) if isinstance(self.parts[0], FromHidden) else None

    @torch.no_grad()
    def with_logits(self, buffer_CV: Tensor | None = None) -> Gain:
        """Compute the logits of both models."""
        buffers = (buffer_CV, None)
        teacher, base = (
            part.with_logits(buffer) if isinstance(part, FromHidden) else part
            for part, buffer in zip(self.parts, buffers, strict=True)
        )
        return Gain((teacher, base))


def _logits(distributions: Distributions, buffer_CV: Tensor | None) -> tuple[Tensor, float]:
    """(logits, their temperature) of exact distributions. Raises ValueError for top-k ones: the product of tails is unknown."""
    if isinstance(distributions, FromHidden):
        distributions = distributions.with_logits(buffer_CV)
    if isinstance(distributions, FromLogits):
        return distributions.logits_NV, distributions.temperature
    known = distributions.materialize()
    if not isinstance(known, Exact):
        raise ValueError("a composed teacher needs whole distributions, and a part holds only its top-k tokens")
    return known.logp_NV, 1.0


@dataclass(frozen=True)
class SharedTokens:
    """Tokens of two vocabularies that stand for the same bytes: student_K[i] and teacher_K[i]. `student_of_V` is -1 for the others."""

    student_K: Tensor
    teacher_K: Tensor
    student_of_V: Tensor

    @staticmethod
    def of(student_ids: Sequence[int], teacher_ids: Sequence[int], width: int, device: torch.device) -> SharedTokens:
        """width  of the teacher's output layer"""
        student_K, teacher_K = torch.tensor(student_ids, device=device), torch.tensor(teacher_ids, device=device)
        student_of_V = torch.full((width,), -1, dtype=torch.long, device=device)
        student_of_V[teacher_K] = student_K
        return SharedTokens(student_K, teacher_K, student_of_V)


@dataclass(frozen=True)
class Aligned:
    """Distributions of a teacher with another tokenizer, at the student's tokens that begin a common span.

    With shared tokens it becomes a `TopK` over them, in the student's ids: every token that the two vocabularies do not share is
    in the tail, on both sides. Without, it becomes the `Sorted` probabilities (ULD, 2402.12030), which need no common vocabulary.

    base    at each of the student's tokens, in the teacher's own ids; any row where `size_N` is not positive
    size_N  tokens of the span that begins at this token of the student; 0 within a span, -1 where the texts do not agree
    """

    base: Distributions
    shared: SharedTokens | None
    size_N: Tensor

    def __len__(self) -> int:
        return len(self.size_N)

    def rows(self, start: int, stop: int) -> Aligned:
        return Aligned(self.base.rows(start, stop), self.shared, self.size_N[start:stop])

    def buffer(self, tokens: int) -> Tensor | None:
        """Memory for the teacher's logits of some tokens, if they are computed from hidden states."""
        return self.base.buffer(tokens) if isinstance(self.base, FromHidden) else None

    def with_logits(self, buffer_CV: Tensor | None = None) -> Aligned:
        """Compute the logits, where the base holds hidden states."""
        if not isinstance(self.base, FromHidden):
            return self
        return Aligned(self.base.with_logits(buffer_CV), self.shared, self.size_N)

    def materialize(self) -> TopK | Sorted:
        known, compared_N = self.base.materialize(), self.size_N > 0
        if self.shared is None:
            if not isinstance(known, Exact):
                raise ValueError(
                    "sorted probabilities need whole distributions, and this one holds only its top-k tokens"
                )
            return Sorted(known.logp_NV.sort(dim=-1, descending=True).values, compared_N)
        if isinstance(known, Exact):
            ids_NK = self.shared.student_K.expand(len(self), -1)
            logp_NK = known.logp_NV.index_select(1, self.shared.teacher_K)
            return TopK(ids_NK, logp_NK, compared_N * ids_NK.shape[1])
        assert isinstance(known, TopK)
        ids_NK = self.shared.student_of_V[known.ids_NK.long()]
        shared_NK = (ids_NK >= 0) & compared_N[:, None]
        order_NK = shared_NK.argsort(dim=-1, descending=True, stable=True)
        return TopK(ids_NK.clamp_min(0).gather(1, order_NK), known.logp_NK.gather(1, order_NK), shared_NK.sum(dim=-1))


def select_rows(distributions: Distributions, index_N: Tensor) -> Distributions:
    """Rows of a teacher's distributions by index, repeated or left out."""
    if isinstance(distributions, FromHidden):
        return FromHidden(distributions.hidden_NH[index_N], distributions.head, distributions.temperature)
    known = distributions.materialize()
    if isinstance(known, TopK):
        return TopK(known.ids_NK[index_N], known.logp_NK[index_N])
    assert isinstance(known, Exact)
    return Exact(known.logp_NV[index_N])


@dataclass(frozen=True)
class Concatenated:
    """Distributions of several teachers in one sequence. All parts materialize to one form."""

    parts: tuple[Distributions, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def rows(self, start: int, stop: int) -> Concatenated:
        chosen, offset = [], 0
        for part in self.parts:
            first, last = max(0, start - offset), min(len(part), stop - offset)
            if first < last:
                chosen.append(part.rows(first, last))
            offset += len(part)
        return Concatenated(tuple(chosen))

    def materialize(self) -> Known:
        parts = [part.materialize() for part in self.parts]
        whole = concatenate(parts, parts[0].device)
        assert isinstance(whole, Known)
        return whole


def truncate_to_top_k(distributions: Distributions, k: int) -> TopK:
    """The k most likely tokens and the tail, if the distributions hold more. Raises ValueError for forms that are no list of tokens."""
    known = distributions.materialize()
    if not isinstance(known, (Exact, TopK)):
        raise ValueError(f"{type(known).__name__} distributions have no top k tokens")
    return known if isinstance(known, TopK) and known.ids_NK.shape[1] <= k else known.top_k(k)


def concatenate(parts: Sequence[Distributions], device: torch.device) -> Distributions:
    """Concatenate on a device: as one value if all parts share form and head, else as `Concatenated`."""
    first = parts[0]
    if isinstance(first, (Composed, Gain)):
        by_model = zip(*(part.parts for part in parts if isinstance(part, (Composed, Gain))), strict=True)
        models = tuple(concatenate(model, device) for model in by_model)
        return Composed(models, first.weights) if isinstance(first, Composed) else Gain((models[0], models[1]))
    if isinstance(first, ExactGain):
        gains = [part for part in parts if isinstance(part, ExactGain)]
        teacher, base = (concatenate([getattr(part, name) for part in gains], device) for name in ("teacher", "base"))
        assert isinstance(teacher, Exact) and isinstance(base, Exact)
        return ExactGain(teacher, base)
    if isinstance(first, Aligned):
        aligned = [part for part in parts if isinstance(part, Aligned)]
        size_N = torch.cat([part.size_N for part in aligned]).to(device)
        return Aligned(concatenate([part.base for part in aligned], device), first.shared, size_N)
    if any(isinstance(part, Concatenated) for part in parts) or not _share_head(parts):
        return Concatenated(tuple(parts))
    if isinstance(first, FromHidden):
        hidden_NH = torch.cat([part.hidden_NH for part in parts if isinstance(part, FromHidden)])
        return FromHidden(hidden_NH.to(device), first.head, first.temperature)
    if isinstance(first, Exact):
        return Exact(torch.cat([part.logp_NV for part in parts if isinstance(part, Exact)]).to(device))
    if isinstance(first, (Sorted, SpanLogp)):
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return type(first)(*(torch.cat(column).to(device) for column in columns))
    kept = [part for part in parts if isinstance(part, TopK)]
    ids_NK, logp_NK = torch.cat([part.ids_NK for part in kept]), torch.cat([part.logp_NK for part in kept])
    counts = [part.count_N for part in kept if part.count_N is not None]
    return TopK(ids_NK.to(device), logp_NK.to(device), torch.cat(counts).to(device) if counts else None)


def _share_head(parts: Sequence[Distributions]) -> bool:
    """Whether all parts that are stored as hidden states use the same head weights."""
    heads = [part.head for part in parts if isinstance(part, FromHidden)]
    weights = [head.weight_VH if isinstance(head, LinearHead) else getattr(head, "__self__", head) for head in heads]
    return len({id(weight) for weight in weights}) < 2
