"""Fast decoder for plain Qwen3 and Llama: the model's arithmetic in few, large operations on a preallocated KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from headwater.kernels import LANES, Kernels
from headwater.models.policy import Policy
from headwater.sampling.fast_weights import DecoderWeights, Projection
from headwater.sampling.kv_cache import KVCache, PrefilledPrompts

INITIAL_COLUMNS = 64
"""Cache columns allocated at first beyond the longest prompt."""
PREFILL_TOKENS = 2048
"""Tokens of one prefill pass, padding included: enough for full speed at little memory."""
REFILL_FRACTION = 8
"""New sequences are prefilled once 1/REFILL_FRACTION of the rows are free, which spreads the cost of a prefill over many."""
Attention = Callable[[int, Tensor], Tensor]
"""(layer, concatenated q, k and v projections (N, (heads + 2 · kv_heads) · D)) -> (N, heads · D)."""


class FastDecoder:
    """Decodes with the weights that the policy has when it is built: build a new one after an update.

    RoPE tables are computed by the model's own module, so all its static scaling rules apply.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        config = policy.model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.weights = DecoderWeights.read(policy, self.heads, self.kv_heads, self.width)
        self.kernels = self.weights.kernels
        self.eps_1 = torch.full((1,), self.eps, dtype=torch.float32, device=policy.device)
        self.logits = self.weights.head

    def begin(self, prompts: Sequence[tuple[int, ...]], max_rows: int, max_tokens: int) -> int:
        max_rows, device, dtype = min(max_rows, len(prompts)), self.policy.device, self.weights.embedding.dtype
        self.waiting = list(prompts)
        self.prefilled: PrefilledPrompts | None = None
        columns = max(map(len, prompts)) + INITIAL_COLUMNS
        lanes = LANES if self.kernels else 1
        heads = (self.kv_heads, self.width)
        self.cache = KVCache(len(self.weights.layers), max_rows, columns, max_tokens, heads, lanes, dtype, device)
        self.table = self._rope_table(max_tokens)
        return max(1, max_rows // REFILL_FRACTION)

    def prefill(self, count: int) -> Tensor:
        hidden = []
        while count:
            if self.prefilled is None:
                self.prefilled = self._prefill_next()
            prompts = self.prefilled.pending[:count]
            hidden.append(self.cache.insert(self.prefilled, prompts))
            del self.prefilled.pending[: len(prompts)]
            if not self.prefilled.pending:
                self.prefilled = None
            count -= len(prompts)
        return torch.cat(hidden)

    def decode_step(self, token_A: Tensor) -> Tensor:
        window = self.cache.reserve_column()
        attend = self._torch_attention(window) if self.kernels is None else self._kernel_attention(self.kernels)
        hidden_AH = self._forward(token_A[:, None], attend)
        self.cache.advance()
        return self._norm(hidden_AH, self.weights.last_norm)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.cache.select_rows(rows)

    def _prefill_next(self) -> PrefilledPrompts:
        """Run the next distinct prompts in one pass, right-padded, so that the causal mask is the only one needed."""
        prompts: dict[tuple[int, ...], int] = {}
        pending: list[int] = []
        width = 0
        for prompt in self.waiting:
            if prompt not in prompts:
                width = max(width, len(prompt))
                if prompts and width * (len(prompts) + 1) > PREFILL_TOKENS:
                    break
                prompts[prompt] = len(prompts)
            pending.append(prompts[prompt])
        del self.waiting[: len(pending)]
        lengths = list(map(len, prompts))
        width, device, pad_id = max(lengths), self.policy.device, self.policy.pad_id
        ids_PT = torch.tensor([(*prompt, *(pad_id,) * (width - len(prompt))) for prompt in prompts]).to(device)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        table_N = self.table.index_select(0, torch.arange(width, device=device).repeat(len(prompts)))

        def attend(layer: int, qkv_ND: Tensor) -> Tensor:
            q_NHD, k_NKD, v_NKD = self._split_heads(layer, qkv_ND, table_N)
            q_PHTD, k_PKTD, v_PKTD = (part.unflatten(0, (-1, width)).transpose(1, 2) for part in (q_NHD, k_NKD, v_NKD))
            keys.append(k_PKTD)
            values.append(v_PKTD)
            out_PHTD = functional.scaled_dot_product_attention(q_PHTD, k_PKTD, v_PKTD, is_causal=True, enable_gqa=True)
            return out_PHTD.transpose(1, 2).flatten(0, 1).flatten(1)

        x_NH = self._forward(ids_PT, attend)
        last = [row * width + length - 1 for row, length in enumerate(lengths)]
        hidden_PH = self._norm(x_NH.index_select(0, torch.tensor(last, device=device)), self.weights.last_norm)
        return PrefilledPrompts(keys, values, hidden_PH, lengths, pending)

    def _torch_attention(self, window: int) -> Attention:
        """Attention of one new token per row to the row's own columns, all within the first `window`."""
        cache, rows, group = self.cache, len(self.cache), self.heads // self.kv_heads
        cache.unmask_column()
        bias_AKT = cache.bias_SKT[:rows, :, :window]
        table_A = self.table.index_select(0, cache.position_A)

        def attend(layer: int, qkv_AD: Tensor) -> Tensor:
            q_AHD, k_AKD, v_AKD = self._split_heads(layer, qkv_AD, table_A)
            cache.write(layer, k_AKD, v_AKD)
            k_AKTD, v_AKTD = (
                cached[:rows, :, :window] for cached in (cache.keys[layer].squeeze(-1), cache.values[layer])
            )
            if q_AHD.dtype != torch.float32:  # keeps the attention scores in float32
                return functional.scaled_dot_product_attention(
                    q_AHD[:, :, None], k_AKTD, v_AKTD, attn_mask=bias_AKT[:, :1, None], enable_gqa=True
                ).flatten(1)
            # On a CPU two batched products over all rows and heads are faster than the fused operation, which loops over them.
            q_NGD = q_AHD.reshape(-1, group, self.width)
            k_NDT = k_AKTD.flatten(0, 1).transpose(1, 2)
            score_NGT = torch.baddbmm(bias_AKT.flatten(0, 1)[:, None], q_NGD, k_NDT, alpha=self.width**-0.5)
            return torch.bmm(torch.softmax(score_NGT, dim=-1), v_AKTD.flatten(0, 1)).view(rows, -1)

        return attend

    def _kernel_attention(self, kernels: Kernels) -> Attention:
        """The same by the CPU kernel, which reads each row's own columns only."""
        table_TD = torch.view_as_real(self.table).flatten(1)

        def attend(layer: int, qkv_AD: Tensor) -> Tensor:
            cache, heads_norm = self.cache, self.weights.layers[layer].heads_norm
            return kernels.decode_attention(
                qkv_AD, heads_norm, table_TD, cache.position_A, cache.keys[layer], cache.values[layer], self.eps
            )

        return attend

    def _forward(self, ids_AL: Tensor, attend: Attention) -> Tensor:
        """All layers on L new tokens of each of A rows, N = A · L: x (N, H) before the final norm."""
        x = functional.embedding(ids_AL.reshape(-1), self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            x = layer.out.add_to(x, attend(index, project(layer.qkv, self._norm(x, layer.attention_norm))))
            gate_up = project(layer.gate_up, self._norm(x, layer.mlp_norm))
            x = layer.down.add_to(x, swiglu(gate_up) if self.kernels is None else self.kernels.silu_gate(gate_up))
        return x

    def _split_heads(self, layer: int, qkv_ND: Tensor, table_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, heads, D) and k (N, kv_heads, D) after QK norm and RoPE, and v (N, kv_heads, D).

        table_N  RoPE table at each token's position
        """
        q_and_k, heads_norm = (self.heads + self.kv_heads) * self.width, self.weights.layers[layer].heads_norm
        qk = qkv_ND[:, :q_and_k].unflatten(1, (-1, self.width))
        if heads_norm is not None:
            qk = self._rms_norm(qk, heads_norm)
        q, k = (self._apply_rope(part, table_N) for part in (qk[:, : self.heads], qk[:, self.heads :]))
        return q, k, qkv_ND[:, q_and_k:].unflatten(1, (-1, self.width))

    def _norm(self, x_NH: Tensor, weight_H: Tensor | None) -> Tensor:
        return (
            self._rms_norm(x_NH, weight_H) if self.kernels is None else self.kernels.rms_norm(x_NH, weight_H, self.eps)
        )

    def _rms_norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """RMS norm over the last dimension; in float32 as four operations, where torch's own takes seven on a CPU."""
        if x.dtype != torch.float32:
            normed = functional.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)
            return normed if weight is None else weight * normed
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        normed = x * torch.addcmul(self.eps_1, length, length, value=1.0 / x.shape[-1]).rsqrt_()
        return normed if weight is None else normed.mul_(weight)

    def _rope_table(self, max_tokens: int) -> Tensor:
        """Complex (T, D/2) where heads are interleaved, else cos and sin (T, 2, D)."""
        position_1T = torch.arange(max_tokens, device=self.policy.device)[None]
        rotary = self.policy.model.base_model.rotary_emb
        cos, sin = (table[0] for table in rotary(self.weights.embedding[:1, None], position_1T))
        if self.weights.interleaved:
            half = self.width // 2
            return torch.complex(cos[:, :half].contiguous(), sin[:, :half].contiguous())
        return torch.stack([cos, sin], dim=1)

    def _apply_rope(self, x: Tensor, table_N: Tensor) -> Tensor:
        """RoPE on (N, heads, D) (2104.09864)."""
        if self.weights.interleaved:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * table_N[:, None]).flatten(-2)
        half = x.shape[-1] // 2
        cos, sin = table_N[:, :1], table_N[:, 1:]
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def project(linears: Sequence[Projection], x: Tensor) -> Tensor:
    """Outputs of several projections of x, concatenated."""
    parts = [linear(x) for linear in linears]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up; in float32 as three operations that a CPU vectorizes fully."""
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.dtype != torch.float32:
        return functional.silu(gate) * up
    return torch.sigmoid(gate).mul_(gate).mul_(up)
