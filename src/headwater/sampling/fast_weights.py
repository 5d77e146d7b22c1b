"""Weights of a model for the fast decoder: projections concatenated, norms folded in, CPU kernels' layout.

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
from headwater.sampling.fast_architectures import DecoderSpec

FUSED_PARAMETERS = 64_000_000
"""Models up to this size have their weights copied and concatenated; for larger ones a copy costs more than it saves."""


Transform = Callable[[Tensor], Tensor]
"""A map of rows (N, H) -> (N, H)."""


@dataclass(frozen=True)
class RmsNorm:
    """RMS norm over the last dimension (1910.07467).

    weight  None where it is folded into the projections that follow
    eps_1   (1,): eps, float32, on the weights' device
    """

    weight: Tensor | None
    eps: float
    eps_1: Tensor
    kernels: Kernels | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.by_torch(x) if self.kernels is None else self.kernels.rms_norm(x, self.weight, self.eps)

    def by_torch(self, x: Tensor) -> Tensor:
        """In float32 as four operations, where torch's own takes seven on a CPU; else the product has the weight's type."""
        if x.dtype != torch.float32:
            normed = functional.rms_norm(x.float(), x.shape[-1:], None, self.eps)
            return (normed if self.weight is None else self.weight * normed.to(self.weight.dtype)).to(x.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        normed = x * torch.addcmul(self.eps_1, length, length, value=1.0 / x.shape[-1]).rsqrt_()
        return normed if self.weight is None else normed.mul_(self.weight)


def identity(x: Tensor) -> Tensor:
    """The norm of an architecture that has none in this place."""
    return x


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


@dataclass(frozen=True)
class NormedLinear:
    """y = norm(x Wᵀ + b), for architectures that normalize what a layer adds."""

    linear: Linear | PackedLinear
    norm: RmsNorm

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))

    def add_to(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self(y)


Projection = Linear | PackedLinear | NormedLinear


@dataclass(frozen=True)
class WholeNorm:
    """QK norm over all heads at once (OLMo 2), on concatenated q, k and v projections."""

    q: RmsNorm
    k: RmsNorm

    def __call__(self, qkv_ND: Tensor) -> Tensor:
        assert self.q.weight is not None and self.k.weight is not None
        widths = [len(self.q.weight), len(self.k.weight)]
        q, k, v = qkv_ND.split([*widths, qkv_ND.shape[1] - sum(widths)], dim=-1)
        return torch.cat([self.q.by_torch(q), self.k.by_torch(k), v], dim=-1)


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    qkv         one concatenated projection, or three
    qkv_norm    of the concatenated projections
    gate_up     one concatenated projection, or two
    heads_norm  weight (heads + kv_heads, head_dim): QK norm of each head; None if the model has none
    """

    qkv: tuple[Projection, ...]
    qkv_norm: Transform
    out: Projection
    gate_up: tuple[Projection, ...]
    down: Projection
    attention_norm: Transform
    mlp_norm: Transform
    heads_norm: RmsNorm | None


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a model.

    embedding_scale  factor of the embeddings, None for 1
    interleaved      the rotary halves of each q and k head alternate (0, D/2, 1, …), so that RoPE is one complex product
    kernels          the CPU kernels, if they are used
    """

    layers: tuple[Layer, ...]
    embedding: Tensor
    embedding_scale: Tensor | None
    last_norm: RmsNorm
    head: Callable[[Tensor], Tensor]
    interleaved: bool
    kernels: Kernels | None

    @staticmethod
    def read(policy: Policy, spec: DecoderSpec) -> DecoderWeights:
        body = policy.model.base_model
        reader = WeightReader(
            dtype=policy.compute_dtype,
            small=sum(parameter.numel() for parameter in policy.model.parameters()) <= FUSED_PARAMETERS,
            spec=spec,
            device=policy.device,
        )
        scale = getattr(body.embed_tokens, "embed_scale", None)
        return DecoderWeights(
            layers=tuple(reader.layer(layer) for layer in body.layers),
            embedding=reader.cast(body.embed_tokens.weight),
            embedding_scale=None if scale is None else reader.cast(scale),
            last_norm=reader.norm(reader.norm_weight(body.norm)),
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
    spec: DecoderSpec
    device: torch.device

    @property
    def fold(self) -> bool:
        """Whether to fold norms and interleave heads: only in float32, where that reorders rounding errors of 1e-7."""
        return self.small and self.dtype == torch.float32

    @property
    def kernels(self) -> Kernels | None:
        """The CPU kernels, which know neither other devices nor sliding windows."""
        return kernels() if self.fold and self.device.type == "cpu" and not any(self.spec.windows) else None

    def cast(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)

    def norm_weight(self, module: Any) -> Tensor:
        weight, architecture = module.weight.detach(), self.spec.architecture
        offset = weight.float() + architecture.norm_offset if architecture.norm_offset else weight
        return offset.float() if architecture.float32_norms else self.cast(offset)

    def norm(self, weight: Tensor | None) -> RmsNorm:
        eps_1 = torch.full((1,), self.spec.eps, dtype=torch.float32, device=self.device)
        return RmsNorm(weight, self.spec.eps, eps_1, self.kernels)

    def layer(self, layer: Any) -> Layer:
        attention, mlp, names = layer.self_attn, layer.mlp, self.spec.architecture
        attention_norm, mlp_norm = (
            None if name is None else self.norm_weight(getattr(layer, name))
            for name in (names.attention_norm, names.mlp_norm)
        )
        heads_norm, qkv_norm = self.qk_norms(attention)
        return Layer(
            qkv=self.concatenate(self.read_qkv(attention, attention_norm)),
            qkv_norm=qkv_norm,
            out=self.output(attention.o_proj, layer, names.attention_out_norm),
            gate_up=self.concatenate(self.read_gate_up(mlp, mlp_norm)),
            down=self.output(mlp.down_proj, layer, names.mlp_out_norm),
            attention_norm=self.input_norm(attention_norm),
            mlp_norm=self.input_norm(mlp_norm),
            heads_norm=heads_norm,
        )

    def input_norm(self, weight: Tensor | None) -> Transform:
        if weight is None:
            return identity
        return self.norm(None if self.fold else weight)

    def output(self, module: Any, layer: Any, norm: str | None) -> Projection:
        linear = self.projection(self.read(module))
        return linear if norm is None else NormedLinear(linear, self.norm(self.norm_weight(getattr(layer, norm))))

    def qk_norms(self, attention: Any) -> tuple[RmsNorm | None, Transform]:
        """(QK norm of each head, QK norm over all heads); at most one of them is not empty."""
        if not hasattr(attention, "q_norm"):
            return None, identity
        q, k = (self.interleave(self.norm_weight(norm)) for norm in (attention.q_norm, attention.k_norm))
        if self.spec.query_scale != 1.0:
            q = q * self.spec.query_scale
        if len(q) != self.spec.width:
            return None, WholeNorm(self.norm(q), self.norm(k))
        return self.norm(torch.cat([q.expand(self.spec.heads, -1), k.expand(self.spec.kv_heads, -1)])), identity

    def read_qkv(self, attention: Any, norm: Tensor | None) -> list[Linear]:
        if not hasattr(attention, "qkv_proj"):
            q, k, v = (self.read(module, norm) for module in (attention.q_proj, attention.k_proj, attention.v_proj))
            return [self.interleave_outputs(q), self.interleave_outputs(k), v]
        qkv, width = self.read(attention.qkv_proj, norm), self.spec.width
        if not self.fold:
            return [qkv]
        qk, v = split_outputs(qkv, (self.spec.heads + self.spec.kv_heads) * width)
        return [self.interleave_outputs(qk), v]

    def read_gate_up(self, mlp: Any, norm: Tensor | None) -> list[Linear]:
        modules = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        return [self.read(module, norm) for module in modules]

    def read(self, module: Any, norm: Tensor | None = None) -> Linear:
        """One projection. With folding on, `norm` scales its input."""
        adapter = None
        if hasattr(module, "lora_A"):
            # Folded in if weights are copied anyway; kept apart where a copy costs much or rounding would lose a small update.
            adapter, module = lora.low_rank_pair(module), module.base_layer
        weight, bias = self.cast(module.weight), None if module.bias is None else self.cast(module.bias)
        if adapter is not None and self.fold:
            weight, adapter = weight + adapter[1] @ adapter[0], None
        if self.fold and norm is not None:
            weight = weight * norm
        return Linear(weight, bias, None if adapter is None else (self.cast(adapter[0]), self.cast(adapter[1])))

    def interleave_outputs(self, linear: Linear) -> Linear:
        """The projection with its output heads interleaved, if folding is on; adapters are folded in then."""
        if not self.fold:
            return linear
        bias = None if linear.bias is None else self.interleave(linear.bias)
        return Linear(self.interleave(linear.weight.t()).t(), bias)

    def interleave(self, x: Tensor) -> Tensor:
        """(…, heads · D) with the two halves of each head's rotary part alternating, if folding is on."""
        if not self.fold:
            return x
        heads, rotary = x.unflatten(-1, (-1, self.spec.width)), self.spec.rotary_width
        turned = heads[..., :rotary].unflatten(-1, (2, rotary // 2)).transpose(-1, -2).flatten(-2)
        return torch.cat([turned, heads[..., rotary:]], dim=-1).flatten(-2)

    def concatenate(self, parts: list[Linear]) -> tuple[Projection, ...]:
        """One projection with all outputs; the parts themselves for a large model or with adapters."""
        if not self.small or any(part.adapter is not None for part in parts):
            return tuple(parts)
        biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
        bias = None if all(part.bias is None for part in parts) else torch.cat(biases)
        return (self.projection(Linear(torch.cat([part.weight for part in parts]), bias)),)

    def projection(self, linear: Linear) -> Linear | PackedLinear:
        """The same projection by the CPU kernels, if they are used."""
        if self.kernels is None:
            return linear
        return PackedLinear(self.kernels, pack_weight(linear.weight), linear.bias, len(linear.weight))


def split_outputs(linear: Linear, outputs: int) -> tuple[Linear, Linear]:
    """The first `outputs` outputs of a projection without adapter, and the rest."""
    biases = (None, None) if linear.bias is None else linear.bias.tensor_split([outputs])
    first, rest = (Linear(*pair) for pair in zip(linear.weight.tensor_split([outputs]), biases, strict=True))
    return first, rest
