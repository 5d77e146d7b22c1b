"""Output layers: hidden states to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headwater.kernels import kernels

Head = Callable[[Tensor], Tensor]
"""Hidden states (…, H) -> logits (…, V)."""


def logp_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probs computed from logits: float32, or float64 where the logits are."""
    return torch.promote_types(dtype, torch.float32)


def log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Log-probs of logits at a temperature, in `logp_dtype`."""
    wide = logits.to(logp_dtype(logits.dtype))
    return torch.log_softmax(wide if temperature == 1.0 else wide / temperature, dim=-1)


@dataclass(frozen=True)
class LinearHead:
    """A linear head, logits = hidden · Wᵀ + b, computed in `dtype`. Its weights are exposed to `fused_linear`."""

    weight_VH: Tensor
    bias_V: Tensor | None
    dtype: torch.dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        bias_V = None if self.bias_V is None else self.bias_V.to(self.dtype)
        return functional.linear(hidden.to(self.dtype), self.weight_VH.to(self.dtype), bias_V)

    def buffer(self, tokens: int) -> Tensor:
        """Uninitialized memory for the logits of some tokens."""
        return self.weight_VH.new_empty((tokens, len(self.weight_VH)), dtype=self.dtype)

    def logits_into(self, logits_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """Write logits into a buffer; `weight_VH` is the weight in the head's dtype."""
        bias_V = None if self.bias_V is None else self.bias_V.to(self.dtype)
        fast = kernels() if logits_CV.device.type == "cpu" and self.dtype == torch.float32 else None
        if fast is not None and fast.matmul_is_faster() and weight_VH.is_contiguous():
            return fast.matmul(hidden_CH.contiguous(), weight_VH, bias_V, logits_CV)
        if bias_V is None:
            return torch.mm(hidden_CH, weight_VH.T, out=logits_CV)
        return torch.addmm(bias_V, hidden_CH, weight_VH.T, out=logits_CV)
