"""Fast decoder for common architectures: the model's arithmetic in few, large operations on a preallocated KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from headwater.devices import to_device
from headwater.kernels import LANES, Kernels
from headwater.losses.batch import pad_right
from headwater.models.policy import Policy
from headwater.sampling.fast_architectures import DecoderSpec
from headwater.sampling.fast_weights import DecoderWeights, Projection
from headwater.sampling.kv_cache import KVCache, PrefilledPrompts
from headwater.sampling.step_graphs import StepGraphs

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

    def __init__(self, policy: Policy, spec: DecoderSpec) -> None:
        self.policy, self.spec = policy, spec
        self.heads, self.kv_heads, self.width = spec.heads, spec.kv_heads, spec.width
        self.weights = DecoderWeights.read(policy, spec)
        self.kernels = self.weights.kernels
        self.logits = self.weights.head
        self.gate: Callable[[Tensor], Tensor] = swiglu if spec.activation == "silu" else geglu
        if self.kernels is not None and spec.activation == "silu":
            self.gate = self.kernels.silu_gate

    def begin(self, prompts: Sequence[tuple[int, ...]], max_rows: int, max_tokens: int) -> int:
        max_rows, device, dtype = min(max_rows, len(prompts)), self.policy.device, self.weights.embedding.dtype
        self.waiting = list(prompts)
        self.prefilled: PrefilledPrompts | None = None
        columns = max(map(len, prompts)) + INITIAL_COLUMNS
        lanes = LANES if self.kernels else 1
        heads = (self.kv_heads, self.width)
        self.cache = KVCache(len(self.weights.layers), max_rows, columns, max_tokens, heads, lanes, dtype, device)
        self.tables = {rope: self._rope_table(rope, max_tokens) for rope in dict.fromkeys(self.spec.ropes)}
        self.rows = 0
        self.graphs = StepGraphs(self._step, max_rows, device) if device.type == "cuda" else None
        return max(1, max_rows // REFILL_FRACTION)

    def prefill(self, count: int) -> Tensor:
        hidden = []
        self.cache.resize(self.rows)
        self.rows += count
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
        allocated = self.cache.columns
        window = self.cache.reserve_column()
        if self.graphs is None:
            hidden_AH = self._step(token_A, window)
        else:
            if self.cache.columns != allocated:
                self.graphs.clear()
            self.cache.resize(self.graphs.padded_rows(self.rows))
            hidden_AH = self.graphs.run(token_A, window, self.cache.columns)
            self.cache.resize(self.graphs.padded_rows(self.rows))  # where the first capture has just failed
        self.cache.advance()
        return hidden_AH

    def _step(self, token_A: Tensor, window: int) -> Tensor:
        """One token of each row, whose attention reads the first `window` columns. Positions do not advance."""
        attend = self._torch_attention(window) if self.kernels is None else self._kernel_attention(self.kernels)
        return self.weights.last_norm(self._forward(token_A[:, None], attend))

    def select_rows(self, rows: Sequence[int]) -> None:
        self.cache.select_rows(rows)
        self.rows = len(rows)

    def _prefill_next(self) -> PrefilledPrompts:
        """Run the next distinct prompts in one pass, right-padded, so that only causality and sliding windows mask."""
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
        width, device = max(lengths), self.policy.device
        ids_PT = to_device(pad_right(list(prompts), self.policy.pad_id)[0], device)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        position_N = torch.arange(width, device=device).repeat(len(prompts))
        tables = {rope: table.index_select(0, position_N) for rope, table in self.tables.items()}
        masks = {window: window_mask(width, window, device) for window in set(self.spec.windows)}

        def attend(layer: int, qkv_ND: Tensor) -> Tensor:
            q_NHD, k_NKD, v_NKD = self._split_heads(layer, qkv_ND, tables[self.spec.ropes[layer]])
            q_PHTD, k_PKTD, v_PKTD = (part.unflatten(0, (-1, width)).transpose(1, 2) for part in (q_NHD, k_NKD, v_NKD))
            keys.append(k_PKTD)
            values.append(v_PKTD)
            mask_TT = masks[self.spec.windows[layer]]
            out_PHTD = functional.scaled_dot_product_attention(
                q_PHTD, k_PKTD, v_PKTD, attn_mask=mask_TT, is_causal=mask_TT is None, enable_gqa=True
            )
            return out_PHTD.transpose(1, 2).flatten(0, 1).flatten(1)

        x_NH = self._forward(ids_PT, attend)
        last = [row * width + length - 1 for row, length in enumerate(lengths)]
        hidden_PH = self.weights.last_norm(x_NH.index_select(0, to_device(torch.tensor(last), device)))
        return PrefilledPrompts(keys, values, hidden_PH, lengths, pending)

    def _torch_attention(self, window: int) -> Attention:
        """Attention of one new token per row to the row's own columns, all within the first `window`."""
        cache, rows, group = self.cache, len(self.cache), self.heads // self.kv_heads
        cache.unmask_column()
        biases = {size: cache.window_bias(window, size) for size in set(self.spec.windows)}
        tables = {rope: table.index_select(0, cache.position_A) for rope, table in self.tables.items()}

        def attend(layer: int, qkv_AD: Tensor) -> Tensor:
            bias_AKT = biases[self.spec.windows[layer]]
            q_AHD, k_AKD, v_AKD = self._split_heads(layer, qkv_AD, tables[self.spec.ropes[layer]])
            cache.write(layer, k_AKD, v_AKD)
            k_AKTD, v_AKTD = (
                cached[:rows, :, :window] for cached in (cache.keys[layer].squeeze(-1), cache.values[layer])
            )
            if q_AHD.dtype != torch.float32:  # keeps the attention scores in float32
                # The heads that share keys are the queries of one head: with `enable_gqa` a GPU would copy the keys for each of them.
                q_AKGD = q_AHD.unflatten(1, (self.kv_heads, group))
                return functional.scaled_dot_product_attention(
                    q_AKGD, k_AKTD, v_AKTD, attn_mask=bias_AKT[:, :1, None]
                ).flatten(1)
            # On a CPU two batched products over all rows and heads are faster than the fused operation, which loops over them.
            q_NGD = q_AHD.reshape(-1, group, self.width)
            k_NDT = k_AKTD.flatten(0, 1).transpose(1, 2)
            score_NGT = torch.baddbmm(bias_AKT.flatten(0, 1)[:, None], q_NGD, k_NDT, alpha=self.width**-0.5)
            return torch.bmm(torch.softmax(score_NGT, dim=-1), v_AKTD.flatten(0, 1)).view(rows, -1)

        return attend

    def _kernel_attention(self, kernels: Kernels) -> Attention:
        """The same by the CPU kernel, which reads each row's own columns only."""
        tables = {rope: torch.view_as_real(table).flatten(1) for rope, table in self.tables.items()}

        def attend(layer: int, qkv_AD: Tensor) -> Tensor:
            cache, heads_norm = self.cache, self.weights.layers[layer].heads_norm
            weight, table_TD = None if heads_norm is None else heads_norm.weight, tables[self.spec.ropes[layer]]
            return kernels.decode_attention(
                qkv_AD, weight, table_TD, cache.position_A, cache.keys[layer], cache.values[layer], self.spec.eps
            )

        return attend

    def _forward(self, ids_AL: Tensor, attend: Attention) -> Tensor:
        """All layers on L new tokens of each of A rows, N = A · L: x (N, H) before the final norm."""
        x = functional.embedding(ids_AL.reshape(-1), self.weights.embedding)
        if self.weights.embedding_scale is not None:
            x = x * self.weights.embedding_scale
        for index, layer in enumerate(self.weights.layers):
            qkv = layer.qkv_norm(project(layer.qkv, layer.attention_norm(x)))
            x = layer.out.add_to(x, attend(index, qkv))
            x = layer.down.add_to(x, self.gate(project(layer.gate_up, layer.mlp_norm(x))))
        return x

    def _split_heads(self, layer: int, qkv_ND: Tensor, table_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, heads, D) and k (N, kv_heads, D) after QK norm and RoPE, and v (N, kv_heads, D).

        table_N  RoPE table at each token's position
        """
        q_and_k, heads_norm = (self.heads + self.kv_heads) * self.width, self.weights.layers[layer].heads_norm
        qk = qkv_ND[:, :q_and_k].unflatten(1, (-1, self.width))
        if heads_norm is not None:
            qk = heads_norm.by_torch(qk)
        q, k = (self._apply_rope(part, table_N) for part in (qk[:, : self.heads], qk[:, self.heads :]))
        return q, k, qkv_ND[:, q_and_k:].unflatten(1, (-1, self.width))

    def _rope_table(self, rope: str | None, max_tokens: int) -> Tensor:
        """Complex (T, D/2) where heads are interleaved, else cos and sin (T, 2, D). Dimensions without RoPE: angle 0."""
        position_1T = torch.arange(max_tokens, device=self.policy.device)[None]
        rotary, kind = self.policy.model.base_model.rotary_emb, self.weights.embedding[:1, None]
        cos, sin = (table[0] for table in (rotary(kind, position_1T, rope) if rope else rotary(kind, position_1T)))
        if rope is None:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        half, rest = self.spec.rotary_width // 2, self.width - self.spec.rotary_width
        if self.weights.interleaved:
            cos, sin = (
                functional.pad(cos[:, :half], (0, rest // 2), value=1.0),
                functional.pad(sin[:, :half], (0, rest // 2)),
            )
            return torch.complex(cos.contiguous(), sin.contiguous())
        return torch.stack([functional.pad(cos, (0, rest), value=1.0), functional.pad(sin, (0, rest))], dim=1)

    def _apply_rope(self, x: Tensor, table_N: Tensor) -> Tensor:
        """RoPE on (N, heads, D) (2104.09864)."""
        if self.weights.interleaved:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * table_N[:, None]).flatten(-2)
        rotary = self.spec.rotary_width
        half = rotary // 2
        cos, sin = table_N[:, :1], table_N[:, 1:]
        turned = torch.cat([-x[..., half:rotary], x[..., :half], x[..., rotary:]], dim=-1)
        return (x * cos + turned * sin).to(x.dtype)  # OLMo 2 has its angles in float32


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


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up, with the tanh approximation of GELU."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def window_mask(tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool (T, T): which tokens each token attends to; None where causality says it all."""
    if window is None or window >= tokens:
        return None
    position_T = torch.arange(tokens, device=device)
    distance_TT = position_T[:, None] - position_T
    return (distance_TT >= 0) & (distance_TT < window)
