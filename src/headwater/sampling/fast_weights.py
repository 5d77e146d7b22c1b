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

from headwater.kernels import Kernels, kernels, packed
from headwater.models import lora
from headwater.models.policy import Policy

FUSED_PARAMETERS = 64_000_000
"""Up to this size weights are copied into joined ones for the call; past it a copy would cost more than it saves."""


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b, and + x downᵀ upᵀ where an adapter is kept apart."""

    weight: Tensor
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        if self.adapter is None:
            return y
        down, up = self.adapter
        return y + functional.linear(functional.linear(x, down), up)

    def added_to(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y Wᵀ + b; in float32, where the order of roundings is harmless, in one operation and in the place of x."""
        if self.bias is not None or self.adapter is not None or x.dtype != torch.float32:
            return x + self(y)
        return x.addmm_(y, self.weight.t())


@dataclass(frozen=True)
class Packed:
    """The same by the kernels, on a copy of the weight in their own layout: few rows times a matrix is BLAS's weak side."""

    kernels: Kernels
    weight: Tensor
    bias: Tensor | None
    columns: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias, self.columns)

    def added_to(self, x: Tensor, y: Tensor) -> Tensor:
        self.kernels.add_linear(x, y, self.weight, self.bias)
        return x


Projection = Linear | Packed


@dataclass(frozen=True)
class Layer:
    """One decoder layer. The norms' weights are None where they are folded into the projections that follow.

    qkv          one joined projection, or three
    gate_up      one joined projection, or two
    heads_norm   (heads + kv_heads, head_dim): of q and k, None where the model has none
    """

    qkv: tuple[Projection, ...]
    out: Projection
    gate_up: tuple[Projection, ...]
    down: Projection
    before_attention: Tensor | None
    before_mlp: Tensor | None
    heads_norm: Tensor | None


@dataclass(frozen=True)
class Weights:
    """interleaved: q and k come with the two halves of each head in turns (0, D/2, 1, …): RoPE is then one complex product.
    kernels: what else there is to do with them, where a CPU has kernels for it"""

    layers: tuple[Layer, ...]
    embedding: Tensor
    last_norm: Tensor
    head: Callable[[Tensor], Tensor]
    interleaved: bool
    kernels: Kernels | None

    @staticmethod
    def of(policy: Policy, heads: int, kv_heads: int, width: int) -> Weights:
        body = policy.model.base_model
        reader = Reader(
            dtype=policy.compute_dtype,
            small=sum(parameter.numel() for parameter in policy.model.parameters()) <= FUSED_PARAMETERS,
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            device=policy.device,
        )
        return Weights(
            layers=tuple(reader.layer(layer) for layer in body.layers),
            embedding=reader.cast(body.embed_tokens.weight),
            last_norm=reader.cast(body.norm.weight),
            head=reader.made(reader.read(policy.head)),
            interleaved=reader.folds,
            kernels=reader.kernels,
        )


@dataclass(frozen=True)
class Reader:
    """small: whether the model is small enough for copies of its weights."""

    dtype: torch.dtype
    small: bool
    heads: int
    kv_heads: int
    width: int
    device: torch.device

    @property
    def folds(self) -> bool:
        """Whether norms are folded and heads interleaved: in float32 that only reorders roundings of 1e-7."""
        return self.small and self.dtype == torch.float32

    @property
    def kernels(self) -> Kernels | None:
        return kernels() if self.folds and self.device.type == "cpu" else None

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
            out=self.made(self.read(attention.o_proj)),
            gate_up=self.joined([self.read(mlp.gate_proj, before_mlp), self.read(mlp.up_proj, before_mlp)]),
            down=self.made(self.read(mlp.down_proj)),
            before_attention=None if self.folds else before_attention,
            before_mlp=None if self.folds else before_mlp,
            heads_norm=heads_norm,
        )  # fmt: skip

    def read(self, module: Any, norm: Tensor | None = None, turned: bool = False) -> Linear:
        """`norm` scales the weight's input, `turned` interleaves its output's heads, where folding is on."""
        adapter = None
        if hasattr(module, "lora_A"):
            # Folded in where weights are copied anyway; apart, where a copy would cost much or round a small change away.
            adapter, module = lora.low_rank_pair(module), module.base_layer
        weight, bias = self.cast(module.weight), None if module.bias is None else self.cast(module.bias)
        if adapter is not None and self.folds:
            weight, adapter = weight + adapter[1] @ adapter[0], None
        if self.folds and norm is not None:
            weight = weight * norm
        if turned:
            weight, bias = self.turns(weight.t()).t(), None if bias is None else self.turns(bias)
        return Linear(weight, bias, None if adapter is None else (self.cast(adapter[0]), self.cast(adapter[1])))

    def turns(self, x: Tensor) -> Tensor:
        """(…, heads · D): the two halves of each head in turns, where folding is on."""
        if not self.folds:
            return x
        return x.unflatten(-1, (-1, 2, self.width // 2)).transpose(-1, -2).flatten(-3)

    def joined(self, parts: list[Linear]) -> tuple[Projection, ...]:
        if not self.small or any(part.adapter is not None for part in parts):
            return tuple(parts)
        biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
        bias = None if all(part.bias is None for part in parts) else torch.cat(biases)
        return (self.made(Linear(torch.cat([part.weight for part in parts]), bias)),)

    def made(self, plain: Linear) -> Projection:
        if self.kernels is None:
            return plain
        return Packed(self.kernels, packed(plain.weight), plain.bias, len(plain.weight))
