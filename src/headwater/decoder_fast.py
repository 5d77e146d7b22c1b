"""The fast decoder: plain Qwen3 and Llama, the same arithmetic on the same weights with few, large operations.

Every row is left-aligned in a preallocated cache: column t holds the keys and values of its token t, so rows of any age lie beside
one another, a new one may take the place of one that left, and a bias hides what lies past a row's own end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headwater.decoder_weights import Weights
from headwater.model import Policy

CACHE_STEP = 64
"""Columns that a cache has at first beyond the longest prompt; it doubles when they are full."""
PREFILL_TOKENS = 4096
"""Prompts are run together up to so many tokens, padding included: enough for full speed, little enough to hold."""
SHARE = 8
"""New rows enter when at least 1/SHARE of the rows are free, so that the cost of an entry is spread over many."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (N, heads, D), k (N, kv_heads, D), v (N, kv_heads, D)) -> (N, heads · D)."""


@dataclass(frozen=True)
class Held:
    """Prompts that have been run: keys and values of each layer, (P, kv_heads, T, D), and the hidden state after the last token.

    rows   for each request that is to enter from here, in order: its prompt's row
    """

    keys: list[Tensor]
    values: list[Tensor]
    hidden_PH: Tensor
    length_P: Tensor
    lengths: list[int]
    rows: list[int]


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
        self.eps_1 = torch.full((1,), self.eps, dtype=torch.float32, device=policy.device)
        self.logits = self.weights.head

    def begin(self, prompts: Sequence[tuple[int, ...]], rows: int, longest: int) -> int:
        device, dtype, layers = self.policy.device, self.weights.embedding.dtype, len(self.weights.layers)
        rows = min(rows, len(prompts))
        self.longest = longest
        self.columns = min(longest, max(map(len, prompts)) + CACHE_STEP)
        self.waiting = list(prompts)
        self.held: Held | None = None
        shape = (rows, self.kv_heads, self.columns, self.width)
        # Zeros, not whatever was in memory: a hidden column counts 0 times, and 0 times NaN is NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.bias_SKT = torch.full(shape[:3], -torch.inf, dtype=dtype, device=device)
        self.position_A = torch.empty(0, dtype=torch.long, device=device)
        self.place_N = torch.empty(0, dtype=torch.long, device=device)
        self.ends: list[int] = []
        self.table = self._rope_table(longest)
        return max(1, rows // SHARE)

    def enter(self, count: int) -> Tensor:
        parts = []
        while count:
            if self.held is None:
                self.held = self._prefilled()
            taken = min(count, len(self.held.rows))
            parts.append(self._lay_out(self.held, self.held.rows[:taken]))
            del self.held.rows[:taken]
            if not self.held.rows:
                self.held = None
            count -= taken
        self._place()
        return torch.cat(parts)

    def step(self, token_A: Tensor) -> Tensor:
        window = max(self.ends) + 1
        if window > self.columns:
            self._grow()
        self.bias_SKT.view(-1).index_fill_(0, self.place_N, 0.0)
        hidden_AH = self._forward(token_A[:, None], self.table.index_select(0, self.position_A), self._beside(window))
        self.position_A.add_(1)
        self.place_N.add_(1)
        self.ends = [end + 1 for end in self.ends]
        return self._norm(hidden_AH, self.weights.last_norm)

    def keep(self, rows: Sequence[int]) -> None:
        moved = [(source, target) for target, source in enumerate(rows) if source != target]
        if moved:
            source_M, target_M = torch.tensor(moved, device=self.policy.device).t()
            # Whole rows, so that nothing of a row that left stays behind.
            for tensor in (*self.keys, *self.values, self.bias_SKT):
                tensor.index_copy_(0, target_M, tensor.index_select(0, source_M))
            self.position_A[target_M] = self.position_A[source_M]
        self.position_A = self.position_A[: len(rows)]
        self.ends = [self.ends[row] for row in rows]
        self._place()

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
        width = max(lengths)
        ids_PT = torch.tensor([(*prompt, *(self.policy.pad_id,) * (width - len(prompt))) for prompt in prompts])
        device = self.policy.device
        length_P = torch.tensor(lengths, device=device)
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
            q, k, v = (part.unflatten(0, (-1, width)).transpose(1, 2) for part in (q_NHD, k_NKD, v_NKD))
            keys.append(k)
            values.append(v)
            found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return found.transpose(1, 2).flatten(0, 1).flatten(1)

        x_NH = self._forward(
            ids_PT.to(device), self.table[:width].repeat(len(prompts), *(1,) * (self.table.ndim - 1)), attend
        )
        last_PH = x_NH.index_select(0, torch.arange(len(prompts), device=device) * width + length_P - 1)
        return Held(keys, values, self._norm(last_PH, self.weights.last_norm), length_P, lengths, rows)

    def _lay_out(self, held: Held, rows: list[int]) -> Tensor:
        """Rows after the present ones continue these prompts."""
        rows_E = torch.tensor(rows, device=self.policy.device)
        there = slice(len(self.ends), len(self.ends) + len(rows))
        for ours, theirs in zip((*self.keys, *self.values), (*held.keys, *held.values), strict=True):
            ours[there, :, : theirs.shape[2]] = theirs[rows_E]
            ours[there, :, theirs.shape[2] :] = 0.0  # what a row that left may have held here, NaN perhaps
        length_E = held.length_P[rows_E]
        past_E1T = torch.arange(self.columns, device=rows_E.device) >= length_E[:, None, None]
        self.bias_SKT[there] = torch.zeros_like(self.bias_SKT[there]).masked_fill_(past_E1T, -torch.inf)
        self.position_A = torch.cat([self.position_A, length_E])
        self.ends += [held.lengths[row] for row in rows]
        return held.hidden_PH[rows_E]

    def _place(self) -> None:
        """Where the next keys of every row and head go, counted in columns of the whole cache."""
        heads_N = torch.arange(len(self.ends) * self.kv_heads, device=self.position_A.device) * self.columns
        self.place_N = heads_N + self.position_A.repeat_interleave(self.kv_heads)

    def _grow(self) -> None:
        more = min(self.longest, 2 * self.columns) - self.columns
        self.keys = [functional.pad(one, (0, 0, 0, more)) for one in self.keys]
        self.values = [functional.pad(one, (0, 0, 0, more)) for one in self.values]
        self.bias_SKT = functional.pad(self.bias_SKT, (0, more), value=-torch.inf)
        self.columns += more
        self._place()

    def _beside(self, window: int) -> Attend:
        """One new token of each row, written into the cache, attends to the row's own columns among the first `window`."""
        rows = len(self.ends)
        bias_N1T = self.bias_SKT[:rows, :, :window].flatten(0, 1)[:, None]
        group = self.heads // self.kv_heads

        def attend(layer: int, q_AHD: Tensor, k_AKD: Tensor, v_AKD: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys.view(-1, self.width).index_copy_(0, self.place_N, k_AKD.reshape(-1, self.width))
            values.view(-1, self.width).index_copy_(0, self.place_N, v_AKD.reshape(-1, self.width))
            if q_AHD.dtype != torch.float32:  # whose rounded scores would be too coarse; this keeps them in float32
                return functional.scaled_dot_product_attention(
                    q_AHD[:, :, None], keys[:rows, :, :window], values[:rows, :, :window],
                    attn_mask=self.bias_SKT[:rows, :1, None, :window], enable_gqa=True,
                ).flatten(1)  # fmt: skip
            k_NTD, v_NTD = (one[:rows, :, :window].flatten(0, 1) for one in (keys, values))
            q_NGD = q_AHD.reshape(-1, group, self.width)
            score_NGT = torch.baddbmm(bias_N1T, q_NGD, k_NTD.transpose(1, 2), alpha=self.width**-0.5)
            return torch.bmm(torch.softmax(score_NGT, dim=-1), v_NTD).view(rows, -1)

        return attend

    def _forward(self, ids_AL: Tensor, table_N: Tensor, attend: Attend) -> Tensor:
        """L new tokens of each of A rows, N = A · L in all: x (N, H) before the last norm.

        table_N  the RoPE table at each token's position
        """
        x = functional.embedding(ids_AL.reshape(-1), self.weights.embedding)
        q_and_k = (self.heads + self.kv_heads) * self.width
        for index, layer in enumerate(self.weights.layers):
            normed = self._norm(x, layer.before_attention)
            parts = [linear(normed) for linear in layer.qkv]
            qkv = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            qk = qkv[:, :q_and_k].unflatten(1, (-1, self.width))
            v = qkv[:, q_and_k:].unflatten(1, (-1, self.width))
            if layer.heads_norm is not None:
                qk = self._heads_norm(qk, layer.heads_norm)
            q, k = (self._turned(part, table_N) for part in (qk[:, : self.heads], qk[:, self.heads :]))
            x = layer.out.added(x, attend(index, q, k, v))
            normed = self._norm(x, layer.before_mlp)
            parts = [linear(normed) for linear in layer.gate_up]
            gate, up = parts[0].chunk(2, dim=-1) if len(parts) == 1 else parts
            x = layer.down.added(x, functional.silu(gate).mul_(up))
        return x

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None or x.dtype == torch.float32:
            return functional.rms_norm(x, x.shape[-1:], weight, self.eps)
        return weight * functional.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)

    def _heads_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of each head; written out, because over many short rows the fused operation is the slower one."""
        if x.dtype != torch.float32:
            return self._norm(x, weight)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps_1, length, length, value=1.0 / self.width).rsqrt_()
        return (x * scale).mul_(weight)

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
