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

from headwater.losses.output_head import Head, LinearHead, logp_dtype
from headwater.losses.token_losses import LOWEST


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
class Exact:
    """Exact distributions stored as log-probs (N, V)."""

    logp_NV: Tensor

    def __len__(self) -> int:
        return self.logp_NV.shape[0]

    @property
    def device(self) -> torch.device:
        return self.logp_NV.device

    def rows(self, start: int, stop: int) -> Exact:
        return Exact(self.logp_NV[start:stop])

    def materialize(self) -> Exact:
        return self

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
class ExactGain:
    """Log-probs (N, V) of a teacher, and of the model that its gain is measured over."""

    teacher: Exact
    base: Exact

    def __len__(self) -> int:
        return len(self.teacher)

    @property
    def device(self) -> torch.device:
        return self.teacher.device

    def rows(self, start: int, stop: int) -> ExactGain:
        return ExactGain(self.teacher.rows(start, stop), self.base.rows(start, stop))

    def materialize(self) -> ExactGain:
        return self

    def align(self, student_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the student and of its target over the same events, both (N, E)."""
        return student_logp_NV, self.target(student_logp_NV)

    @torch.no_grad()
    def target(self, student_logp_NV: Tensor) -> Tensor:
        """Log-probs (N, V) of T̂ ∝ S · exp(g): the student's distribution S moved by the gated gain g, without gradient.

        With A^Δ = log T − log T₀ and A = log T − log S, each minus its mean under S, g is A^Δ where both have the same sign and 0
        elsewhere. The gradient of KL(S ‖ T̂) at a constant T̂ is p_S(j) · (Σ_v p_S(v) g(v) − g(j)): the expectation over S of the
        policy gradient with advantage g, without sampling noise (OPD², 2607.15161; there the mean is over the top 1,024 tokens).

        Example: S = (½, ½), T = (¾, ¼), T₀ = (¼, ¾) give A^Δ = ±1.0986 and A = ±0.5493, so T̂ ∝ (½ · 3, ½ / 3) = (0.9, 0.1).
        """
        student_NV, teacher_NV, base_NV = (
            logp_NV.to(student_logp_NV).clamp_min(LOWEST)
            for logp_NV in (student_logp_NV, self.teacher.logp_NV, self.base.logp_NV)
        )
        p_NV = student_NV.exp()
        gain_NV, distance_NV = (
            ratio_NV - torch.linalg.vecdot(p_NV, ratio_NV)[:, None]
            for ratio_NV in (teacher_NV - base_NV, teacher_NV - student_NV)
        )
        gated_NV = torch.where(gain_NV * distance_NV > 0.0, gain_NV, torch.zeros_like(gain_NV))
        return torch.log_softmax(student_NV + gated_NV, dim=-1)

    def token_logp(self, targets_N: Tensor) -> Tensor:
        """The teacher's log-prob of each target token (N,)."""
        return self.teacher.token_logp(targets_N)


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens, and one further event, the tail, for all others.

    A divergence over these k+1 events is that of the two distributions after merging the tail: never more than the exact
    one, zero when they are equal, and its gradient is exact, with no term dropped (the bias of 2605.11182 comes from a sum
    over the k tokens alone).
    """

    ids_NK: Tensor
    logp_NK: Tensor

    def __len__(self) -> int:
        return self.ids_NK.shape[0]

    @property
    def device(self) -> torch.device:
        return self.ids_NK.device

    def rows(self, start: int, stop: int) -> TopK:
        return TopK(self.ids_NK[start:stop], self.logp_NK[start:stop])

    def materialize(self) -> TopK:
        return self

    def align(self, student_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        return self.align_kept(student_logp_NV.gather(1, self.ids_NK.long()))

    def align_kept(self, student_logp_NK: Tensor) -> tuple[Tensor, Tensor]:
        """As `align`, from the student's log-probs of the kept tokens."""
        return _with_tail(student_logp_NK), _with_tail(self.logp_NK.to(student_logp_NK))

    def token_logp(self, targets_N: Tensor) -> Tensor:
        """Raises ValueError for a token outside the kept ones: only its tail is known."""
        matches_NK = self.ids_NK == targets_N[:, None]
        if not bool(matches_NK.any(dim=1).all()):
            raise ValueError("a token outside the teacher's kept top-k has no log-prob of its own")
        return self.logp_NK.float()[matches_NK]


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


Known = Exact | TopK | ExactGain
"""The forms that hold log-probs."""


def truncate_to_top_k(distributions: Distributions, k: int) -> TopK:
    """The k most likely tokens and the tail, if the distributions hold more. Raises ValueError for a gain, which needs both models."""
    known = distributions.materialize()
    if isinstance(known, ExactGain):
        raise ValueError("a gain needs whole distributions")
    return known if isinstance(known, TopK) else known.top_k(k)


TAIL_FLOOR = 1e-7
"""float32 cannot tell a smaller tail from rounding; both sides get the same floor, so equality still gives zero."""


def _with_tail(logp_NK: Tensor) -> Tensor:
    tail_N1 = (1.0 - logp_NK.exp().sum(dim=-1, keepdim=True)).clamp_min(TAIL_FLOOR).log()
    return torch.cat([logp_NK, tail_N1], dim=-1)


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
    if any(isinstance(part, Concatenated) for part in parts) or not _share_head(parts):
        return Concatenated(tuple(parts))
    if isinstance(first, FromHidden):
        hidden_NH = torch.cat([part.hidden_NH for part in parts if isinstance(part, FromHidden)])
        return FromHidden(hidden_NH.to(device), first.head, first.temperature)
    if isinstance(first, Exact):
        return Exact(torch.cat([part.logp_NV for part in parts if isinstance(part, Exact)]).to(device))
    kept = [part for part in parts if isinstance(part, TopK)]
    ids_NK, logp_NK = torch.cat([part.ids_NK for part in kept]), torch.cat([part.logp_NK for part in kept])
    return TopK(ids_NK.to(device), logp_NK.to(device))


def _share_head(parts: Sequence[Distributions]) -> bool:
    """Whether all parts that are stored as hidden states use the same head weights."""
    heads = [part.head for part in parts if isinstance(part, FromHidden)]
    weights = [head.weight_VH if isinstance(head, LinearHead) else getattr(head, "__self__", head) for head in heads]
    return len({id(weight) for weight in weights}) < 2
