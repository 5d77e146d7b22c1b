"""A teacher's next-token distributions for N tokens, in the three forms that they come in.

Each form can be cut to rows, made `ready`, and then aligned with a student's log-probs: both sides come back as log-probs over the
same E events, so that every divergence in `losses` works on every form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from headwater.kernels import kernels

Head = Callable[[Tensor], Tensor]
"""Hidden states (…, H) -> logits (…, V)."""


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type that log-probs are made in: float32, or float64 where the logits are."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class LinearHead:
    """The usual head, logits = hidden · Wᵀ + b at the type it computes in, with its weights in reach of `fused`."""

    weight_VH: Tensor
    bias_V: Tensor | None
    dtype: torch.dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        bias_V = None if self.bias_V is None else self.bias_V.to(self.dtype)
        return functional.linear(hidden.to(self.dtype), self.weight_VH.to(self.dtype), bias_V)

    def buffer(self, tokens: int) -> Tensor:
        return self.weight_VH.new_empty((tokens, len(self.weight_VH)), dtype=self.dtype)

    def into(self, logits_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """Logits written where there is room already; `weight_VH` is the weight at the head's type."""
        bias_V = None if self.bias_V is None else self.bias_V.to(self.dtype)
        fast = kernels() if logits_CV.device.type == "cpu" and self.dtype == torch.float32 else None
        if fast is not None and fast.product_pays() and weight_VH.is_contiguous():
            return fast.product(hidden_CH.contiguous(), weight_VH, bias_V, logits_CV)
        if bias_V is None:
            return torch.mm(hidden_CH, weight_VH.T, out=logits_CV)
        return torch.addmm(bias_V, hidden_CH, weight_VH.T, out=logits_CV)


class Distributions(Protocol):
    def __len__(self) -> int: ...
    def rows(self, start: int, stop: int) -> Distributions: ...
    def ready(self) -> Exact | TopK:
        """The form with log-probs in hand; what is only recomputable (`FromHidden`) is computed here, for these rows."""
        ...


@dataclass(frozen=True)
class FromHidden:
    """Exact, held as hidden states and a head: H numbers a token in place of V. Logits are made when needed."""

    hidden_NH: Tensor
    head: Head
    temperature: float

    def __len__(self) -> int:
        return self.hidden_NH.shape[0]

    def rows(self, start: int, stop: int) -> FromHidden:
        return FromHidden(self.hidden_NH[start:stop], self.head, self.temperature)

    def ready(self) -> Exact:
        return self.with_logits().ready()

    def room(self, tokens: int) -> Tensor | None:
        """A place for the logits of so many tokens that one chunk after the other can use."""
        return self.head.buffer(tokens) if isinstance(self.head, LinearHead) else None

    @torch.no_grad()
    def with_logits(self, room_CV: Tensor | None = None) -> FromLogits:
        """The same with logits in hand, written into `room_CV` where there is one."""
        if room_CV is None or not isinstance(self.head, LinearHead):
            return FromLogits(self.head(self.hidden_NH), self.temperature)
        hidden_NH, weight_VH = self.hidden_NH.to(self.head.dtype), self.head.weight_VH.to(self.head.dtype)
        return FromLogits(self.head.into(room_CV[: len(self)], hidden_NH, weight_VH), self.temperature)


@dataclass(frozen=True)
class FromLogits:
    """Exact, held as logits (N, V)."""

    logits_NV: Tensor
    temperature: float

    def __len__(self) -> int:
        return self.logits_NV.shape[0]

    def rows(self, start: int, stop: int) -> FromLogits:
        return FromLogits(self.logits_NV[start:stop], self.temperature)

    def ready(self) -> Exact:
        wide_NV = self.logits_NV.to(widened(self.logits_NV.dtype))
        return Exact(torch.log_softmax(wide_NV if self.temperature == 1.0 else wide_NV / self.temperature, dim=-1))


@dataclass(frozen=True)
class Exact:
    """Exact, held as log-probs (N, V)."""

    logp_NV: Tensor

    def __len__(self) -> int:
        return self.logp_NV.shape[0]

    @property
    def device(self) -> torch.device:
        return self.logp_NV.device

    def rows(self, start: int, stop: int) -> Exact:
        return Exact(self.logp_NV[start:stop])

    def ready(self) -> Exact:
        return self

    def align(self, student_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(student (N, E), teacher (N, E)): log-probs of both over the same events; the first keeps its gradient."""
        return student_logp_NV, self.logp_NV.to(student_logp_NV)

    def likeliest(self, k: int) -> TopK:
        """The k likeliest tokens of each, and the tail."""
        kept = self.logp_NV.topk(min(k, self.logp_NV.shape[-1]), dim=-1)
        return TopK(kept.indices, kept.values)

    def token_logp(self, targets_N: Tensor) -> Tensor:
        """The teacher's log-prob of each target token (N,)."""
        return self.logp_NV.gather(1, targets_N[:, None]).squeeze(1).float()


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens and, as one further event, the tail that holds all others.

    A divergence over these k+1 events is that of the two distributions after merging the tail: never more than the exact
    one, zero when they are equal, and its gradient is its own, with no term dropped (the bias of 2605.11182 comes from a
    sum over the k tokens alone).
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

    def ready(self) -> TopK:
        return self

    def align(self, student_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        return self.events(student_logp_NV.gather(1, self.ids_NK.long()))

    def events(self, student_logp_NK: Tensor) -> tuple[Tensor, Tensor]:
        """As `align`, from the student's log-probs of the kept tokens."""
        return _with_tail(student_logp_NK), _with_tail(self.logp_NK.to(student_logp_NK))

    def token_logp(self, targets_N: Tensor) -> Tensor:
        """Raises ValueError for a token outside the kept ones: only its tail is known."""
        found_NK = self.ids_NK == targets_N[:, None]
        if not bool(found_NK.any(dim=1).all()):
            raise ValueError("a token outside the teacher's kept top-k has no log-prob of its own")
        return self.logp_NK.float()[found_NK]


@dataclass(frozen=True)
class Several:
    """Distributions of several teachers, one after the other; what they come to has one form."""

    parts: tuple[Distributions, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def rows(self, start: int, stop: int) -> Several:
        chosen, before = [], 0
        for part in self.parts:
            first, last = max(0, start - before), min(len(part), stop - before)
            if first < last:
                chosen.append(part.rows(first, last))
            before += len(part)
        return Several(tuple(chosen))

    def ready(self) -> Exact | TopK:
        made = [part.ready() for part in self.parts]
        whole = joined(made, made[0].device)
        assert isinstance(whole, (Exact, TopK))
        return whole


TAIL_FLOOR = 1e-7
"""float32 cannot tell a smaller tail from rounding; both sides get the same floor, so equality still gives zero."""


def _with_tail(logp_NK: Tensor) -> Tensor:
    tail_N1 = (1.0 - logp_NK.exp().sum(dim=-1, keepdim=True)).clamp_min(TAIL_FLOOR).log()
    return torch.cat([logp_NK, tail_N1], dim=-1)


def joined(parts: Sequence[Distributions], device: torch.device) -> Distributions:
    """One after the other, on a device; all of one form, or each to be made `ready` in one."""
    first = parts[0]
    if any(isinstance(part, Several) for part in parts) or not _one_head(parts):
        return Several(tuple(parts))
    if isinstance(first, FromHidden):
        hidden_NH = torch.cat([part.hidden_NH for part in parts if isinstance(part, FromHidden)])
        return FromHidden(hidden_NH.to(device), first.head, first.temperature)
    if isinstance(first, Exact):
        return Exact(torch.cat([part.logp_NV for part in parts if isinstance(part, Exact)]).to(device))
    top = [part for part in parts if isinstance(part, TopK)]
    return TopK(
        torch.cat([part.ids_NK for part in top]).to(device), torch.cat([part.logp_NK for part in top]).to(device)
    )


def _one_head(parts: Sequence[Distributions]) -> bool:
    """Whether all that are held as hidden states go through the same weights."""
    heads = [part.head for part in parts if isinstance(part, FromHidden)]
    return (
        len({id(one.weight_VH) if isinstance(one, LinearHead) else id(getattr(one, "__self__", one)) for one in heads})
        < 2
    )
