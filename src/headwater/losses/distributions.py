"""Teacher distributions over the next token, for N tokens, in the forms in which they are stored.

Every form can be sliced, materialized, and then aligned with a student's log-probs: both come back as log-probs over the same E
events, so that every divergence in `token_losses` works on every form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from headwater.losses.materialized import GROUP_FLOOR, Exact, ExactGain, Grouped, Known, Sorted, SpanLogp, TopK
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
class TokenGroups:
    """Groups of a teacher's tokens: those of ids_K are in group_K. `whole`: these are all of its tokens."""

    ids_K: Tensor
    group_K: Tensor
    whole: bool


@dataclass(frozen=True)
class Aligned:
    """Distributions of a teacher with another tokenizer, at a student's tokens.

    They become probabilities of groups of tokens that divide both vocabularies (`Grouped`; of a top-k teacher `TopK`). Within a token
    of the teacher, its tokens are those that begin with the bytes so far, and the distribution is conditioned on them. Without
    `group_V` they become `Sorted` (ULD, 2402.12030), which needs no common vocabulary.

    base      in the teacher's own ids: at each of the student's tokens, the distribution over the token that it lies in
    tokens_N  the teacher's tokens that can follow at each of the student's tokens, and their groups; None: not compared
    state_N   1 if compared, 0 if not, -1 where the texts do not agree
    group_V   group of each of the student's tokens
    groups    number of groups
    """

    base: Distributions
    tokens_N: tuple[TokenGroups | None, ...]
    state_N: Tensor
    group_V: Tensor | None
    groups: int

    def __len__(self) -> int:
        return len(self.state_N)

    def rows(self, start: int, stop: int) -> Aligned:
        rows = slice(start, stop)
        return replace(self, base=self.base.rows(start, stop), tokens_N=self.tokens_N[rows], state_N=self.state_N[rows])

    def buffer(self, tokens: int) -> Tensor | None:
        """Memory for the teacher's logits of some tokens, if they are computed from hidden states."""
        return self.base.buffer(tokens) if isinstance(self.base, FromHidden) else None

    def with_logits(self, buffer_CV: Tensor | None = None) -> Aligned:
        """Compute the logits, where the base holds hidden states."""
        return replace(self, base=self.base.with_logits(buffer_CV)) if isinstance(self.base, FromHidden) else self

    @torch.no_grad()
    def materialize(self) -> Grouped | TopK | Sorted:
        known = self.base.materialize()
        if self.group_V is None:
            if not isinstance(known, Exact):
                raise ValueError(f"sorted probabilities need whole distributions, not {type(known).__name__}")
            return Sorted(known.logp_NV.sort(dim=-1, descending=True).values, self.state_N > 0)
        if isinstance(known, Exact):
            p_NE = known.logp_NV.new_zeros(len(self), self.groups)
            for tokens, index_R in self._by_tokens():
                p_RK = known.logp_NV[index_R].index_select(1, tokens.ids_K).exp()
                p_NE[index_R] = p_NE.new_zeros(len(index_R), self.groups).index_add_(1, tokens.group_K, p_RK)
            mass_N1 = p_NE.sum(dim=-1, keepdim=True)
            logp_NE = (p_NE / mass_N1.clamp_min(GROUP_FLOOR)).clamp_min(GROUP_FLOOR).log()
            return Grouped(logp_NE, self.group_V, mass_N1.squeeze(1) > GROUP_FLOOR)
        assert isinstance(known, TopK)
        # Of the tokens that continue a begun one a server names too few to condition on them.
        p_NE = known.logp_NK.new_zeros(len(self), self.groups)
        for tokens, index_R in self._by_tokens():
            if tokens.whole:
                group_V = tokens.group_K.new_empty(len(tokens.ids_K)).index_copy_(0, tokens.ids_K, tokens.group_K)
                p_NE[index_R] = p_NE.new_zeros(len(index_R), self.groups).scatter_add_(
                    1, group_V[known.ids_NK[index_R].long()], known.logp_NK[index_R].exp()
                )
        kept = p_NE.topk(min(self.groups, known.ids_NK.shape[1]), dim=-1)
        return TopK(kept.indices, kept.values.clamp_min(GROUP_FLOOR).log(), (kept.values > 0).sum(dim=-1), self.group_V)

    def _by_tokens(self) -> list[tuple[TokenGroups, Tensor]]:
        """The rows of each set of tokens."""
        rows: dict[int, list[int]] = {}
        sets = {id(tokens): tokens for tokens in self.tokens_N if tokens is not None}
        for row, tokens in enumerate(self.tokens_N):
            if tokens is not None:
                rows.setdefault(id(tokens), []).append(row)
        return [(sets[key], torch.tensor(chosen, device=self.state_N.device)) for key, chosen in rows.items()]


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
    if not isinstance(known, (Exact, TopK, Grouped)):
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
        return replace(
            first,
            base=concatenate([part.base for part in aligned], device),
            tokens_N=tuple(tokens for part in aligned for tokens in part.tokens_N),
            state_N=torch.cat([part.state_N for part in aligned]).to(device),
        )
    if any(isinstance(part, Concatenated) for part in parts) or not _share_head(parts):
        return Concatenated(tuple(parts))
    if isinstance(first, FromHidden):
        hidden_NH = torch.cat([part.hidden_NH for part in parts if isinstance(part, FromHidden)])
        return FromHidden(hidden_NH.to(device), first.head, first.temperature)
    if isinstance(first, Exact):
        return Exact(torch.cat([part.logp_NV for part in parts if isinstance(part, Exact)]).to(device))
    if isinstance(first, Grouped):
        grouped = [part for part in parts if isinstance(part, Grouped)]
        logp_NE = torch.cat([part.logp_NE for part in grouped]).to(device)
        return Grouped(logp_NE, first.group_V.to(device), torch.cat([part.compared_N for part in grouped]).to(device))
    if isinstance(first, (Sorted, SpanLogp)):
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return type(first)(*(torch.cat(column).to(device) for column in columns))
    kept = [part for part in parts if isinstance(part, TopK)]
    ids_NK, logp_NK = torch.cat([part.ids_NK for part in kept]), torch.cat([part.logp_NK for part in kept])
    counts = [part.count_N for part in kept if part.count_N is not None]
    group_V = None if kept[0].group_V is None else kept[0].group_V.to(device)
    return TopK(ids_NK.to(device), logp_NK.to(device), torch.cat(counts).to(device) if counts else None, group_V)


def _share_head(parts: Sequence[Distributions]) -> bool:
    """Whether all parts that are stored as hidden states use the same head weights."""
    heads = [part.head for part in parts if isinstance(part, FromHidden)]
    weights = [head.weight_VH if isinstance(head, LinearHead) else getattr(head, "__self__", head) for head in heads]
    return len({id(weight) for weight in weights}) < 2
