"""Teacher distributions over the next token, for N tokens, in the forms in which they are stored.

Every form can be sliced, concatenated with its like, and materialized: turned into a form that holds log-probs and compares a student
with them (`Known`). The loss knows no form by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from headwater.losses import per_token, token_losses
from headwater.losses.comparison import Comparison, Student
from headwater.losses.materialized import GROUP_FLOOR, Exact, Grouped, Sorted, TopK
from headwater.losses.output_head import Head, LinearHead, log_probs, logp_dtype
from headwater.losses.token_losses import Divergence


class Distributions(Protocol):
    def __len__(self) -> int: ...
    def rows(self, start: int, stop: int) -> Distributions: ...
    def concatenate(self, others: Sequence[Self], device: torch.device | None) -> Distributions:
        """One value with the rows of this and of others of its class, on a device; None: on theirs."""
        ...

    def materialize(self) -> Known:
        """The form that holds log-probs; hidden states and logits are turned into it here."""
        ...


class Known(Distributions, Protocol):
    """A materialized form."""

    def concatenate(self, others: Sequence[Self], device: torch.device | None) -> Known: ...
    def compare(self, student: Student, divergence: Divergence | None, gradient: bool) -> Comparison:
        """Compare a student with these distributions. `gradient` asks for that of the divergence by the student's logits."""
        ...


@runtime_checkable
class HoldsTokens(Protocol):
    """A materialized form that holds log-probs of single tokens."""

    def token_logp(self, targets_N: Tensor) -> Tensor:
        """The teacher's log-prob of each target token (N,)."""
        ...


@runtime_checkable
class ComputesLogits(Protocol):
    """A form whose logits are computed, chunk by chunk, in memory that the chunks share."""

    def buffer(self, tokens: int) -> Tensor | None:
        """Memory for the logits of a chunk, which its parts can share; None if none can be shared."""
        ...

    def with_logits(self, buffer_CV: Tensor | None = None) -> Distributions:
        """Compute the logits, in `buffer_CV` if there is one."""
        ...


def logits_buffer(distributions: Distributions | None, tokens: int) -> Tensor | None:
    """Memory for the logits of a chunk, for forms that compute them."""
    return distributions.buffer(tokens) if isinstance(distributions, ComputesLogits) else None


def with_logits(distributions: Distributions, buffer_CV: Tensor | None) -> Distributions:
    """Compute the logits of forms that are stored without them."""
    return distributions.with_logits(buffer_CV) if isinstance(distributions, ComputesLogits) else distributions


@dataclass(frozen=True)
class FromHidden:
    """Exact distributions stored as hidden states and a head: H numbers per token instead of V."""

    hidden_NH: Tensor
    head: Head
    temperature: float

    __len__ = per_token.length
    rows = per_token.rows

    def concatenate(self, others: Sequence[FromHidden], device: torch.device | None) -> FromHidden | Concatenated:
        parts = (self, *others)
        if len({id(_weights(part.head)) for part in parts}) > 1:
            return Concatenated(parts)
        return per_token.concatenate(self, others, device)

    def materialize(self) -> Exact:
        return self.with_logits().materialize()

    def buffer(self, tokens: int) -> Tensor | None:
        """None for a head that is not linear."""
        return self.head.buffer(tokens) if isinstance(self.head, LinearHead) else None

    @torch.no_grad()
    def with_logits(self, buffer_CV: Tensor | None = None) -> FromLogits:
        if buffer_CV is None or not isinstance(self.head, LinearHead):
            return FromLogits(self.head(self.hidden_NH), self.temperature)
        hidden_NH, weight_VH = self.hidden_NH.to(self.head.dtype), self.head.weight_VH.to(self.head.dtype)
        return FromLogits(self.head.logits_into(buffer_CV[: len(self)], hidden_NH, weight_VH), self.temperature)


@dataclass(frozen=True)
class FromLogits:
    """Exact distributions stored as logits (N, V)."""

    logits_NV: Tensor
    temperature: float

    __len__ = per_token.length
    rows = per_token.rows
    concatenate = per_token.concatenate

    def materialize(self) -> Exact:
        return Exact(log_probs(self.logits_NV, self.temperature))


P = TypeVar("P", bound="Composed | Gain")


def _length(form: Composed | Gain) -> int:
    return len(form.parts[0])


def _rows(form: P, start: int, stop: int) -> P:
    return replace(form, parts=tuple(part.rows(start, stop) for part in form.parts))


def _concatenate(form: P, others: Sequence[P], device: torch.device | None) -> P:
    by_model = zip(form.parts, *(other.parts for other in others), strict=True)
    return replace(form, parts=tuple(concatenate(model, device) for model in by_model))


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

    __len__ = _length
    rows = _rows
    concatenate = _concatenate

    def materialize(self) -> Exact:
        return self.with_logits().materialize()

    def buffer(self, tokens: int) -> Tensor | None:
        """Of one part's logits, which all parts reuse; None where no part has a linear head."""
        buffers = (logits_buffer(part, tokens) for part in self.parts)
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

    The loss compares the student with a target: its own distribution, moved (OPD², 2607.15161).
    """

    parts: tuple[Distributions, ...]
    """Two: (the teacher, the model that it is compared with), over one vocabulary."""

    __len__ = _length
    rows = _rows
    concatenate = _concatenate

    def materialize(self) -> Gain:
        teacher, base = (part.materialize() for part in self.parts)
        if not (isinstance(teacher, Exact) and isinstance(base, Exact)):
            raise ValueError("a gain needs whole distributions, and a part holds only its top-k tokens")
        return Gain((teacher, base))

    def buffer(self, tokens: int) -> Tensor | None:
        """Of the teacher's logits; those of the other model get their own."""
        return logits_buffer(self.parts[0], tokens)

    @torch.no_grad()
    def with_logits(self, buffer_CV: Tensor | None = None) -> Gain:
        return Gain((with_logits(self.parts[0], buffer_CV), with_logits(self.parts[1], None)))

    @property
    def teacher(self) -> Exact:
        """The teacher's part of a materialized gain."""
        assert isinstance(self.parts[0], Exact)
        return self.parts[0]

    def compare(self, student: Student, divergence: Divergence | None, gradient: bool) -> Comparison:
        """The divergence is that from the target; the KLs are those to the teacher."""
        compared = self.teacher.compare(student, None, gradient)
        if divergence is None:
            return compared
        moved = Exact(self.target(student.logp_NV)).compare(student, divergence, gradient)
        return replace(compared, divergence_N=moved.divergence_N, gradient=moved.gradient)

    def target(self, student_logp_NV: Tensor) -> Tensor:
        """Log-probs (N, V) of `token_losses.gain_target`."""
        teacher, base = self.parts
        assert isinstance(teacher, Exact) and isinstance(base, Exact)
        return token_losses.gain_target(student_logp_NV, teacher.logp_NV, base.logp_NV)

    def token_logp(self, targets_N: Tensor) -> Tensor:
        """The teacher's log-prob of each target token (N,)."""
        return self.teacher.token_logp(targets_N)


def _logits(distributions: Distributions, buffer_CV: Tensor | None) -> tuple[Tensor, float]:
    """(logits, their temperature) of exact distributions. Raises ValueError for top-k ones: the product of tails is unknown."""
    distributions = with_logits(distributions, buffer_CV)
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

    def concatenate(self, others: Sequence[Aligned], device: torch.device | None) -> Aligned:
        parts = (self, *others)
        return replace(
            self,
            base=concatenate([part.base for part in parts], device),
            tokens_N=tuple(tokens for part in parts for tokens in part.tokens_N),
            state_N=torch.cat([part.state_N for part in parts]).to(device),
        )

    def buffer(self, tokens: int) -> Tensor | None:
        return logits_buffer(self.base, tokens)

    def with_logits(self, buffer_CV: Tensor | None = None) -> Aligned:
        return replace(self, base=with_logits(self.base, buffer_CV))

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
        rows: dict[int, tuple[TokenGroups, list[int]]] = {}
        for row, tokens in enumerate(self.tokens_N):
            if tokens is not None:
                rows.setdefault(id(tokens), (tokens, []))[1].append(row)
        return [(tokens, torch.tensor(chosen, device=self.state_N.device)) for tokens, chosen in rows.values()]


def select_rows(distributions: Distributions, index_N: Tensor) -> Distributions:
    """Rows of a teacher's distributions by index, repeated or left out."""
    chosen = distributions if isinstance(distributions, FromHidden) else distributions.materialize()
    assert isinstance(chosen, (FromHidden, TopK, Exact))
    return per_token.select_rows(chosen, index_N)


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

    def concatenate(self, others: Sequence[Concatenated], device: torch.device | None) -> Concatenated:
        return Concatenated(tuple(part for some in (self, *others) for part in some.parts))

    def materialize(self) -> Known:
        first, *others = (part.materialize() for part in self.parts)
        return first.concatenate(others, None)


def truncate_to_top_k(distributions: Distributions, k: int) -> TopK:
    """The k most likely tokens and the tail, if the distributions hold more. Raises ValueError for forms that are no list of tokens."""
    known = distributions.materialize()
    if not isinstance(known, (Exact, TopK, Grouped)):
        raise ValueError(f"{type(known).__name__} distributions have no top k tokens")
    return known if isinstance(known, TopK) and known.ids_NK.shape[1] <= k else known.top_k(k)


def concatenate(parts: Sequence[Distributions], device: torch.device | None) -> Distributions:
    """Concatenate on a device: as one value if all parts share form and head, else as `Concatenated`."""
    first, *others = parts
    if any(type(part) is not type(first) for part in others):
        return Concatenated(tuple(parts))
    return first.concatenate(others, device)


def _weights(head: Head) -> object:
    """What two heads share if they are one."""
    return head.weight_VH if isinstance(head, LinearHead) else getattr(head, "__self__", head)
