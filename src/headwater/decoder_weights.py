"""A plain Qwen3's or Llama's weights as the fast decoder wants them: joined, folded and laid out for few, large operations.

They are read from the policy as they are now; after an update they are read again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headwater.model import Policy

FUSED_PARAMETERS = 64_000_000
"""Up to this size weights are copied into joined ones for the call; past it a copy would cost more than it saves."""
PACKED_VOCABULARY = 4096
"""From this width on the head's weights are packed on a CPU: few rows times a wide matrix is MKL's weak side there."""


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def added_to(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y Wᵀ + b; in float32, where the order of roundings is harmless, in one operation and in the place of x."""
        if self.bias is not None or x.dtype != torch.float32:
            return x + self(y)
        return x.addmm_(y, self.weight.t())


@dataclass(frozen=True)
class Layer:
    """One decoder layer. The norms' weights are None where they are folded into the projections that follow.

    qkv          one joined projection, or three
    gate_up      one joined projection, or two
    heads_norm   (heads + kv_heads, head_dim): of q and k, None where the model has none
    """

    qkv: tuple[Linear, ...]
    out: Linear
    gate_up: tuple[Linear, ...]
    down: Linear
    before_attention: Tensor | None
    before_mlp: Tensor | None
    heads_norm: Tensor | None


@dataclass(frozen=True)
class Weights:
    """interleaved: q and k come with the two halves of each head in turns (0, D/2, 1, …): RoPE is then one complex product."""

    layers: tuple[Layer, ...]
    embedding: Tensor
    last_norm: Tensor
    head: Callable[[Tensor], Tensor]
    interleaved: bool

    @staticmethod
    def of(policy: Policy, heads: int, kv_heads: int, width: int) -> Weights:
        body = policy.model.base_model
        reader = Reader(
            dtype=policy.compute,
            small=sum(parameter.numel() for parameter in policy.model.parameters()) <= FUSED_PARAMETERS,
            heads=heads,
            kv_heads=kv_heads,
            width=width,
        )
        return Weights(
            layers=tuple(reader.layer(layer) for layer in body.layers),
            embedding=reader.cast(body.embed_tokens.weight),
            last_norm=reader.cast(body.norm.weight),
            head=reader.head(policy.head),
            interleaved=reader.folds,
        )


@dataclass(frozen=True)
class Reader:
    """small: whether the model is small enough for copies of its weights."""

    dtype: torch.dtype
    small: bool
    heads: int
    kv_heads: int
    width: int

    @property
    def folds(self) -> bool:
        """Whether norms are folded and heads interleaved: in float32 that only reorders roundings of 1e-7."""
        return self.small and self.dtype == torch.float32

    def cast(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)

    def layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        before_attention, before_mlp = (
            self.cast(one.weight) for one in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        heads_norm = None
        if hasattr(attention, "q_norm"):
            q, k = (self.turns(self.cast(one.weight)) for one in (attention.q_norm, attention.k_norm))
            heads_norm = torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)])
        qk = (attention.q_proj, attention.k_proj)
        return Layer(
            qkv=self.joined([*(self.read(one, before_attention, True) for one in qk), self.read(attention.v_proj, before_attention)]),
            out=self.read(attention.o_proj),
            gate_up=self.joined([self.read(mlp.gate_proj, before_mlp), self.read(mlp.up_proj, before_mlp)]),
            down=self.read(mlp.down_proj),
            before_attention=None if self.folds else before_attention,
            before_mlp=None if self.folds else before_mlp,
            heads_norm=heads_norm,
        )  # fmt: skip

    def read(self, module: Any, norm: Tensor | None = None, turned: bool = False) -> Linear:
        """`norm` scales the weight's input, `turned` interleaves its output's heads, where folding is on."""
        weight, bias = self.cast(module.weight), None if module.bias is None else self.cast(module.bias)
        if self.folds and norm is not None:
            weight = weight * norm
        if turned:
            weight, bias = self.turns(weight.t()).t(), None if bias is None else self.turns(bias)
        return Linear(weight, bias)

    def turns(self, x: Tensor) -> Tensor:
        """(…, heads · D): the two halves of each head in turns, where folding is on."""
        if not self.folds:
            return x
        return x.unflatten(-1, (-1, 2, self.width // 2)).transpose(-1, -2).flatten(-3)

    def joined(self, parts: list[Linear]) -> tuple[Linear, ...]:
        if self.small and all(part.bias is None for part in parts):
            return (Linear(torch.cat([part.weight for part in parts]), None),)
        return tuple(parts)

    def head(self, module: Any) -> Callable[[Tensor], Tensor]:
        plain = self.read(module)
        wide = plain.weight.device.type == "cpu" and len(plain.weight) >= PACKED_VOCABULARY
        return packed(plain) if wide and self.folds and torch.backends.mkldnn.is_available() else plain


def packed(plain: Linear) -> Callable[[Tensor], Tensor]:
    """The same product by oneDNN, on a copy of the weight in its own layout."""
    weight, bias = torch.ops.mkldnn._reorder_linear_weight(plain.weight, 16), plain.bias
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
