"""Weights of a plain Qwen3 or Llama for the fast decoder: projections concatenated, norms folded in, CPU kernels' layout.

They are a snapshot of the policy: read them again after an update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headwater.kernels import Kernels, kernels, pack_weight
from headwater.models import lora
from headwater.models.policy import Policy

FUSED_PARAMETERS = 64_000_000
"""Models up to this size have their weights copied and concatenated; for larger ones a copy costs more than it saves."""


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b (+ x downᵀ upᵀ for an adapter that is not folded in)."""

    weight: Tensor
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        if self.adapter is None:
            return y
        down, up = self.adapter
        return y + functional.linear(functional.linear(x, down), up)

    def add_to(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y Wᵀ + b; in float32, where the order of rounding is harmless, as one in-place operation."""
        if self.bias is not None or self.adapter is not None or x.dtype != torch.float32:
            return x + self(y)
        return x.addmm_(y, self.weight.t())


@dataclass(frozen=True)
class PackedLinear:
    """y = x Wᵀ + b by the CPU kernels, on a copy of W in their layout; BLAS is slow for products with few rows."""

    kernels: Kernels
    weight: Tensor
    bias: Tensor | None
    columns: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias, self.columns)

    def add_to(self, x: Tensor, y: Tensor) -> Tensor:
        self.kernels.add_linear(x, y, self.weight, self.bias)
        return x


Projection = Linear | PackedLinear


@dataclass(frozen=True)
class Layer:
    """One decoder layer. A norm's weight is None if it is folded into the projections that follow.

    qkv         one concatenated projection, or three
    gate_up     one concatenated projection, or two
    heads_norm  (heads + kv_heads, head_dim): QK norm; None if the model has none
    """

    qkv: tuple[Projection, ...]
    out: Projection
    gate_up: tuple[Projection, ...]
    down: Projection
    attention_norm: Tensor | None
    mlp_norm: Tensor | None
    heads_norm: Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a model.

    interleaved  the two halves of each q and k head alternate (0, D/2, 1, …), so that RoPE is one complex product
    kernels      the CPU kernels, if they are used
    """

    layers: tuple[Layer, ...]
    embedding: Tensor
    last_norm: Tensor
    head: Callable[[Tensor], Tensor]
    interleaved: bool
    kernels: Kernels | None

    @staticmethod
    def read(policy: Policy, heads: int, kv_heads: int, width: int) -> DecoderWeights:
        body = policy.model.base_model
        reader = WeightReader(
            dtype=policy.compute_dtype,
            small=sum(parameter.numel() for parameter in policy.model.parameters()) <= FUSED_PARAMETERS,
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            device=policy.device,
        )
        return DecoderWeights(
            layers=tuple(reader.layer(layer) for layer in body.layers),
            embedding=reader.cast(body.embed_tokens.weight),
            last_norm=reader.cast(body.norm.weight),
            head=reader.projection(reader.read(policy.head)),
            interleaved=reader.fold,
            kernels=reader.kernels,
        )


@dataclass(frozen=True)
class WeightReader:
    """Reads a model's layers.

    small  the model is small enough to copy its weights
    """

    dtype: torch.dtype
    small: bool
    heads: int
    kv_heads: int
    width: int
    device: torch.device

    @property
    def fold(self) -> bool:
        """Whether to fold norms and interleave heads: only in float32, where that reorders rounding errors of 1e-7."""
        return self.small and self.dtype == torch.float32

    @property
    def kernels(self) -> Kernels | None:
        return kernels() if self.fold and self.device.type == "cpu" else None

    def cast(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)

    def layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        attention_norm, mlp_norm = (
            self.cast(layer.input_layernorm.weight),
            self.cast(layer.post_attention_layernorm.weight),
        )
        heads_norm = None
        if hasattr(attention, "q_norm"):
            q, k = (self.interleave(self.cast(norm.weight)) for norm in (attention.q_norm, attention.k_norm))
            heads_norm = torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)])
        qk = [self.read(module, attention_norm, interleaved=True) for module in (attention.q_proj, attention.k_proj)]
        return Layer(
            qkv=self.concatenate([*qk, self.read(attention.v_proj, attention_norm)]),
            out=self.projection(self.read(attention.o_proj)),
            gate_up=self.concatenate([self.read(mlp.gate_proj, mlp_norm), self.read(mlp.up_proj, mlp_norm)]),
            down=self.projection(self.read(mlp.down_proj)),
            attention_norm=None if self.fold else attention_norm,
            mlp_norm=None if self.fold else mlp_norm,
            heads_norm=heads_norm,
        )

    def read(self, module: Any, norm: Tensor | None = None, interleaved: bool = False) -> Linear:
        """One projection. With folding on, `norm` scales its input and `interleaved` reorders its output heads."""
        adapter = None
        if hasattr(module, "lora_A"):
            # Folded in if weights are copied anyway; kept apart where a copy costs much or rounding would lose a small update.
            adapter, module = lora.low_rank_pair(module), module.base_layer
        weight, bias = self.cast(module.weight), None if module.bias is None else self.cast(module.bias)
        if adapter is not None and self.fold:
            weight, adapter = weight + adapter[1] @ adapter[0], None
        if self.fold and norm is not None:
            weight = weight * norm
        if interleaved:
            weight, bias = self.interleave(weight.t()).t(), None if bias is None else self.interleave(bias)
        return Linear(weight, bias, None if adapter is None else (self.cast(adapter[0]), self.cast(adapter[1])))

    def interleave(self, x: Tensor) -> Tensor:
        """(…, heads · D) with the two halves of each head alternating, if folding is on."""
        if not self.fold:
            return x
        return x.unflatten(-1, (-1, 2, self.width // 2)).transpose(-1, -2).flatten(-3)

    def concatenate(self, parts: list[Linear]) -> tuple[Projection, ...]:
        """One projection with all outputs; the parts themselves for a large model or with adapters."""
        if not self.small or any(part.adapter is not None for part in parts):
            return tuple(parts)
        biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
        bias = None if all(part.bias is None for part in parts) else torch.cat(biases)
        return (self.projection(Linear(torch.cat([part.weight for part in parts]), bias)),)

    def projection(self, linear: Linear) -> Projection:
        """The same projection by the CPU kernels, if they are used."""
        if self.kernels is None:
            return linear
        return PackedLinear(self.kernels, pack_weight(linear.weight), linear.bias, len(linear.weight))
