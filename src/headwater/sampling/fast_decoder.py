"""The fast decoder: plain Qwen3 and Llama, the same arithmetic on the same weights with few, large operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from headwater.kernels import LANES, Kernels
from headwater.models.policy import Policy
from headwater.sampling.fast_weights import Projection, Weights
from headwater.sampling.kv_cache import Cache, Held

CACHE_STEP = 64
"""Columns that a cache has at first beyond the longest prompt."""
PREFILL_TOKENS = 2048
"""Prompts are run together up to so many tokens, padding included: enough for full speed, little enough to hold."""
SHARE = 8
"""New rows enter when at least 1/SHARE of the rows are free, so that the cost of an entry is spread over many."""
Attend = Callable[[int, Tensor], Tensor]
"""(layer, q, k and v as projected, joined (N, (heads + 2 · kv_heads) · D)) -> (N, heads · D)."""


class FastDecoder:
    """It reads the policy's weights as they are now; make a new one after an update. RoPE tables come from the model's own
    module, so every fixed scaling of it is right.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        held = policy.model.config
        self.heads, self.kv_heads = held.num_attention_heads, held.num_key_value_heads
        self.width = getattr(held, "head_dim", None) or held.hidden_size // self.heads
        self.eps = held.rms_norm_eps
        self.weights = Weights.of(policy, self.heads, self.kv_heads, self.width)
        self.kernels = self.weights.kernels
        self.eps_1 = torch.full((1,), self.eps, dtype=torch.float32, device=policy.device)
        self.logits = self.weights.head

    def begin(self, prompts: Sequence[tuple[int, ...]], rows: int, longest: int) -> int:
        rows, device, dtype = min(rows, len(prompts)), self.policy.device, self.weights.embedding.dtype
        self.waiting = list(prompts)
        self.held: Held | None = None
        columns = max(map(len, prompts)) + CACHE_STEP
        lanes = LANES if self.kernels else 1
        heads = (self.kv_heads, self.width)
        self.cache = Cache(len(self.weights.layers), rows, columns, longest, heads, lanes, dtype, device)
        self.table = self._rope_table(longest)
        return max(1, rows // SHARE)

    def enter(self, count: int) -> Tensor:
        parts = []
        while count:
            if self.held is None:
                self.held = self._prefilled()
            taken = self.held.rows[:count]
            parts.append(self.cache.enter(self.held, taken))
            del self.held.rows[: len(taken)]
            if not self.held.rows:
                self.held = None
            count -= len(taken)
        return torch.cat(parts)

    def step(self, token_A: Tensor) -> Tensor:
        window = self.cache.open()
        attend = self._attention(window) if self.kernels is None else self._by(self.kernels)
        hidden_AH = self._forward(token_A[:, None], attend)
        self.cache.close()
        return self._norm(hidden_AH, self.weights.last_norm)

    def keep(self, rows: Sequence[int]) -> None:
        self.cache.keep(rows)

    def _prefilled(self) -> Held:
        """Run the next distinct prompts, padded on the right, where no mask but the causal one is needed."""
        prompts: dict[tuple[int, ...], int] = {}
        rows: list[int] = []
        width = 0
        for prompt in self.waiting:
            if prompt not in prompts:
                width = max(width, len(prompt))
                if prompts and width * (len(prompts) + 1) > PREFILL_TOKENS:
                    break
                prompts[prompt] = len(prompts)
            rows.append(prompts[prompt])
        del self.waiting[: len(rows)]
        lengths = list(map(len, prompts))
        width, device = max(lengths), self.policy.device
        ids_PT = torch.tensor([(*prompt, *(self.policy.pad_id,) * (width - len(prompt))) for prompt in prompts]).to(
            device
        )
        keys: list[Tensor] = []
        values: list[Tensor] = []

        table_N = self.table.index_select(0, torch.arange(width, device=device).repeat(len(prompts)))

        def attend(layer: int, qkv_ND: Tensor) -> Tensor:
            q_NHD, k_NKD, v_NKD = self._heads(layer, qkv_ND, table_N)
            q_PHTD, k_PKTD, v_PKTD = (part.unflatten(0, (-1, width)).transpose(1, 2) for part in (q_NHD, k_NKD, v_NKD))
            keys.append(k_PKTD)
            values.append(v_PKTD)
            found = functional.scaled_dot_product_attention(q_PHTD, k_PKTD, v_PKTD, is_causal=True, enable_gqa=True)
            return found.transpose(1, 2).flatten(0, 1).flatten(1)

        x_NH = self._forward(ids_PT, attend)
        last = [row * width + length - 1 for row, length in enumerate(lengths)]
        hidden_PH = self._norm(x_NH.index_select(0, torch.tensor(last, device=device)), self.weights.last_norm)
        return Held(keys, values, hidden_PH, lengths, rows)

    def _attention(self, window: int) -> Attend:
        """One new token of each row attends to the row's own columns among the first `window`."""
        cache, rows, group = self.cache, len(self.cache), self.heads // self.kv_heads
        cache.show()
        bias_AKT = cache.bias_SKT[:rows, :, :window]
        table_A = self.table.index_select(0, cache.position_A)

        def attend(layer: int, qkv_AD: Tensor) -> Tensor:
            q_AHD, k_AKD, v_AKD = self._heads(layer, qkv_AD, table_A)
            cache.write(layer, k_AKD, v_AKD)
            k_AKTD, v_AKTD = (one[:rows, :, :window] for one in (cache.keys[layer].squeeze(-1), cache.values[layer]))
            if q_AHD.dtype != torch.float32:  # rounded scores would be too coarse; this keeps them in float32
                return functional.scaled_dot_product_attention(
                    q_AHD[:, :, None], k_AKTD, v_AKTD, attn_mask=bias_AKT[:, :1, None], enable_gqa=True
                ).flatten(1)
            # On a CPU two products over all rows and heads are faster than the fused operation, which works one by one.
            q_NGD = q_AHD.reshape(-1, group, self.width)
            k_NDT = k_AKTD.flatten(0, 1).transpose(1, 2)
            score_NGT = torch.baddbmm(bias_AKT.flatten(0, 1)[:, None], q_NGD, k_NDT, alpha=self.width**-0.5)
            return torch.bmm(torch.softmax(score_NGT, dim=-1), v_AKTD.flatten(0, 1)).view(rows, -1)

        return attend

    def _by(self, kernels: Kernels) -> Attend:
        """The same in one pass over each row's own columns."""
        turns_TD = torch.view_as_real(self.table).flatten(1)

        def attend(layer: int, qkv_AD: Tensor) -> Tensor:
            cache, heads_norm = self.cache, self.weights.layers[layer].heads_norm
            return kernels.decode_attention(
                qkv_AD, heads_norm, turns_TD, cache.position_A, cache.keys[layer], cache.values[layer], self.eps
            )

        return attend

    def _forward(self, ids_AL: Tensor, attend: Attend) -> Tensor:
        """L new tokens of each of A rows, N = A · L in all: x (N, H) before the last norm."""
        x = functional.embedding(ids_AL.reshape(-1), self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            x = layer.out.added_to(x, attend(index, joined(layer.qkv, self._norm(x, layer.before_attention))))
            gate_up = joined(layer.gate_up, self._norm(x, layer.before_mlp))
            x = layer.down.added_to(x, gated(gate_up) if self.kernels is None else self.kernels.silu_gate(gate_up))
        return x

    def _heads(self, layer: int, qkv_ND: Tensor, table_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, heads, D) and k (N, kv_heads, D), normed and turned, and v (N, kv_heads, D).

        table_N  the RoPE table at each token's position
        """
        q_and_k, heads_norm = (self.heads + self.kv_heads) * self.width, self.weights.layers[layer].heads_norm
        qk = qkv_ND[:, :q_and_k].unflatten(1, (-1, self.width))
        if heads_norm is not None:
            qk = self._normed(qk, heads_norm)
        q, k = (self._turned(part, table_N) for part in (qk[:, : self.heads], qk[:, self.heads :]))
        return q, k, qkv_ND[:, q_and_k:].unflatten(1, (-1, self.width))

    def _norm(self, x_NH: Tensor, weight_H: Tensor | None) -> Tensor:
        return self._normed(x_NH, weight_H) if self.kernels is None else self.kernels.rms_norm(x_NH, weight_H, self.eps)

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """RMS norm over the last dimension. In float32 written out in four operations; the library's takes seven on a CPU."""
        if x.dtype != torch.float32:
            normed = functional.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)
            return normed if weight is None else weight * normed
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        normed = x * torch.addcmul(self.eps_1, length, length, value=1.0 / x.shape[-1]).rsqrt_()
        return normed if weight is None else normed.mul_(weight)

    def _rope_table(self, longest: int) -> Tensor:
        """Complex (T, D/2) where heads are interleaved, else cos and sin (T, 2, D)."""
        position_1T = torch.arange(longest, device=self.policy.device)[None]
        cos, sin = (
            one[0] for one in self.policy.model.base_model.rotary_emb(self.weights.embedding[:1, None], position_1T)
        )
        if self.weights.interleaved:
            half = self.width // 2
            return torch.complex(cos[:, :half].contiguous(), sin[:, :half].contiguous())
        return torch.stack([cos, sin], dim=1)

    def _turned(self, x: Tensor, table_N: Tensor) -> Tensor:
        """RoPE on (N, heads, D) (2104.09864)."""
        if self.weights.interleaved:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * table_N[:, None]).flatten(-2)
        half = x.shape[-1] // 2
        cos, sin = table_N[:, :1], table_N[:, 1:]
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def joined(linears: Sequence[Projection], x: Tensor) -> Tensor:
    parts = [linear(x) for linear in linears]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) · up; in float32 as three operations, each of which a CPU does at full width."""
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.dtype != torch.float32:
        return functional.silu(gate) * up
    return torch.sigmoid(gate).mul_(gate).mul_(up)
