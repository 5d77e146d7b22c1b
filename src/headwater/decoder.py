"""One decoding step at a time, behind one small protocol: a general decoder for any causal LM, and a fast one for plain
Qwen3 and Llama, which does the same arithmetic on the same weights with a preallocated cache and fewer, larger operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from headwater.model import Policy

FUSED_PARAMETERS = 64_000_000
"""Up to this size projections are joined into one weight for the call; past it a copy would cost more than it saves."""
CACHE_STEP = 64
"""Columns by which a full cache grows at first; it doubles after."""


class Decoder(Protocol):
    """Rows of left-padded sequences, extended by one token at a time."""

    def prefill(self, ids_PT: Tensor, mask_PT: Tensor, rows_B: Tensor) -> Tensor:
        """Run P distinct prompts once and lay out B sequences, sequence b continuing prompt rows_B[b]: hidden (B, H)."""
        ...

    def step(self, token_A: Tensor) -> Tensor:
        """Append one token to each of the A sequences still there: hidden (A, H) that predicts the next."""
        ...

    def keep(self, rows_K: Tensor) -> None:
        """Drop all sequences but these (indices into the present ones)."""
        ...


def decoder_for(policy: Policy) -> Decoder:
    """The fast decoder where the model is of a kind whose every operation it knows, else the general one."""
    return FastDecoder(policy) if is_plain(policy) else CacheDecoder(policy)


def is_plain(policy: Policy) -> bool:
    held = policy.model.config
    rope = getattr(held, "rope_parameters", None) or {}
    return (
        held.model_type in ("qwen3", "llama")
        and policy.body is policy.model.base_model
        and getattr(held, "hidden_act", "") == "silu"
        and not getattr(held, "use_sliding_window", False)
        and rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
        and not hasattr(policy.model, "peft_config")
    )


class CacheDecoder:
    """Any causal LM, through transformers' own forward pass and cache."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.cache: Any = None
        self.mask_AT = torch.empty(0)

    def prefill(self, ids_PT: Tensor, mask_PT: Tensor, rows_B: Tensor) -> Tensor:
        hidden_PH = self._forward(ids_PT, mask_PT, (mask_PT.cumsum(dim=1) - 1).clamp_min(0))
        self.cache.batch_select_indices(rows_B)
        self.mask_AT = mask_PT[rows_B]
        return hidden_PH[rows_B]

    def step(self, token_A: Tensor) -> Tensor:
        self.mask_AT = torch.cat([self.mask_AT, self.mask_AT.new_ones(len(token_A), 1)], dim=1)
        return self._forward(token_A[:, None], self.mask_AT, self.mask_AT.sum(dim=1, keepdim=True) - 1)

    def keep(self, rows_K: Tensor) -> None:
        self.mask_AT = self.mask_AT[rows_K]
        self.cache.batch_select_indices(rows_K)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        with self.policy.autocast():
            out = self.policy.body(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
            )
        self.cache = out.past_key_values
        hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
        return hidden[:, -1]


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b for several projections of the same input at once."""

    weight: Tensor
    bias: Tensor | None
    sizes: tuple[int, ...]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return functional.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)


@dataclass(frozen=True)
class Layer:
    qkv: tuple[Linear, ...]
    out: Linear
    gate_up: tuple[Linear, ...]
    down: Linear
    before_attention: Tensor
    before_mlp: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


class FastDecoder:
    """Plain Qwen3 and Llama: joined projections, a preallocated cache, one attention call a layer.

    It reads the policy's weights as they are now; make a new one after an update. RoPE tables come from the model's own
    module, so every fixed scaling of it is right.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        held, body = policy.model.config, policy.model.base_model
        self.rope = body.rotary_emb
        self.heads, self.kv_heads = held.num_attention_heads, held.num_key_value_heads
        self.width = getattr(held, "head_dim", None) or held.hidden_size // self.heads
        self.eps = held.rms_norm_eps
        join = sum(parameter.numel() for parameter in policy.model.parameters()) <= FUSED_PARAMETERS
        self.layers = [self._layer(layer, join) for layer in body.layers]
        self.embedding = self._cast(body.embed_tokens.weight)
        self.last_norm = self._cast(body.norm.weight)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.used = 0
        self.bias_A11T = torch.empty(0)
        self.position_A = torch.empty(0)

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.policy.compute)

    def _linears(self, join: bool, *modules: Any) -> tuple[Linear, ...]:
        if join and all(module.bias is None for module in modules):
            weight = torch.cat([self._cast(module.weight) for module in modules])
            return (Linear(weight, None, tuple(module.weight.shape[0] for module in modules)),)
        return tuple(
            Linear(self._cast(one.weight), None if one.bias is None else self._cast(one.bias), (one.weight.shape[0],))
            for one in modules
        )

    def _layer(self, layer: Any, join: bool) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return Layer(
            qkv=self._linears(join, attention.q_proj, attention.k_proj, attention.v_proj),
            out=self._linears(False, attention.o_proj)[0],
            gate_up=self._linears(join, mlp.gate_proj, mlp.up_proj),
            down=self._linears(False, mlp.down_proj)[0],
            before_attention=self._cast(layer.input_layernorm.weight),
            before_mlp=self._cast(layer.post_attention_layernorm.weight),
            q_norm=self._cast(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
            k_norm=self._cast(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
        )

    def prefill(self, ids_PT: Tensor, mask_PT: Tensor, rows_B: Tensor) -> Tensor:
        prompts, width = ids_PT.shape
        shape = (prompts, self.kv_heads, width + CACHE_STEP, self.width)
        self.keys = [self.embedding.new_empty(shape) for _ in self.layers]
        self.values = [self.embedding.new_empty(shape) for _ in self.layers]
        self.used = 0
        hidden = torch.full((), -torch.inf, dtype=self.embedding.dtype, device=ids_PT.device)
        causal_TT = torch.ones(width, width, dtype=torch.bool, device=ids_PT.device).tril()
        # A padding row sees itself: a row without any key would come out as NaN. No one reads it.
        seen_P1TT = causal_TT & mask_PT[:, None, None, :].bool() | torch.eye(
            width, dtype=torch.bool, device=ids_PT.device
        )
        bias_P1TT = torch.where(seen_P1TT, torch.zeros_like(hidden), hidden)
        last_PH = self._forward(ids_PT, (mask_PT.cumsum(dim=1) - 1).clamp_min(0), bias_P1TT)[:, -1]
        self.keys = [key[rows_B] for key in self.keys]
        self.values = [value[rows_B] for value in self.values]
        pad_P = torch.where(mask_PT.bool(), torch.zeros_like(hidden), hidden)
        self.bias_A11T = torch.cat([pad_P, pad_P.new_zeros(prompts, CACHE_STEP)], dim=1)[rows_B][:, None, None, :]
        self.position_A = mask_PT.sum(dim=1)[rows_B]
        return last_PH[rows_B]

    def step(self, token_A: Tensor) -> Tensor:
        if self.used == self.keys[0].shape[2]:
            self._grow()
        hidden_A1H = self._forward(token_A[:, None], self.position_A[:, None], self.bias_A11T[..., : self.used + 1])
        self.position_A = self.position_A + 1
        return hidden_A1H[:, 0]

    def keep(self, rows_K: Tensor) -> None:
        self.keys = [key[rows_K] for key in self.keys]
        self.values = [value[rows_K] for value in self.values]
        self.bias_A11T, self.position_A = self.bias_A11T[rows_K], self.position_A[rows_K]

    def _grow(self) -> None:
        more = self.used
        self.keys = [torch.cat([key, torch.empty_like(key)], dim=2) for key in self.keys]
        self.values = [torch.cat([value, torch.empty_like(value)], dim=2) for value in self.values]
        self.bias_A11T = functional.pad(self.bias_A11T, (0, more))

    def _forward(self, ids_AL: Tensor, positions_AL: Tensor, bias: Tensor) -> Tensor:
        """L new columns of every row, written into the cache from column `used` on: hidden (A, L, H) after the last norm."""
        rows, length = ids_AL.shape
        x = functional.embedding(ids_AL, self.embedding)
        cos, sin = self.rope(x, positions_AL)
        cos, sin = cos[:, None], sin[:, None]
        end = self.used + length
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            q, k, v = (part for linear in layer.qkv for part in linear(self._norm(x, layer.before_attention)))
            q, k, v = (part.view(rows, length, -1, self.width) for part in (q, k, v))
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            keys[:, :, self.used : end] = rotated(k, cos, sin)
            values[:, :, self.used : end] = v
            attended = functional.scaled_dot_product_attention(
                rotated(q, cos, sin), keys[:, :, :end], values[:, :, :end], attn_mask=bias, enable_gqa=True
            )
            x = x + layer.out(attended.transpose(1, 2).reshape(rows, length, -1))[0]
            gate, up = (part for linear in layer.gate_up for part in linear(self._norm(x, layer.before_mlp)))
            x = x + layer.down(functional.silu(gate) * up)[0]
        self.used = end
        return self._norm(x, self.last_norm)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return functional.rms_norm(x, weight.shape, weight, self.eps)
        return weight * functional.rms_norm(x.float(), weight.shape, None, self.eps).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the two halves of each head (2104.09864, in the half-split order of Llama and Qwen)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
