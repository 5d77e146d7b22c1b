"""KV cache of the fast decoder: one preallocated tensor of keys and one of values per layer, with rows added and removed.

Every row is left-aligned: column t holds the key and value of the row's token t. Rows of any age therefore share the tensors, a
new row can reuse a free one, nothing is shifted, and an attention bias of -inf masks the columns past a row's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headwater.devices import to_device


@dataclass(frozen=True)
class PrefilledPrompts:
    """Prompts after prefill: keys and values of each layer (P, kv_heads, T, D), hidden states after their last tokens.

    pending  the prompt (0 … P-1) of each request that is still to be inserted, in order
    """

    keys: list[Tensor]
    values: list[Tensor]
    hidden_PH: Tensor
    lengths: list[int]
    pending: list[int]


class KVCache:
    """Keys and values of up to `rows` sequences of at most `max_tokens`; allocated for `columns` tokens, doubled when full.

    heads   (kv_heads, head_dim)
    lanes   adjacent columns whose keys are interleaved, for kernels that score this many at once
    keys    per layer (rows, kv_heads, columns / lanes, head_dim, lanes)
    values  per layer (rows, kv_heads, columns, head_dim)
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        columns: int,
        max_tokens: int,
        heads: tuple[int, int],
        lanes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.lanes = lanes
        self.columns, self.max_columns = self._round_up(min(columns, max_tokens)), self._round_up(max_tokens)
        self.kv_heads, self.width = heads
        value_shape = (rows, self.kv_heads, self.columns, self.width)
        key_shape = (rows, self.kv_heads, self.columns // lanes, self.width, lanes)
        # Zeros, not uninitialized memory: a masked column has weight 0, and 0 times NaN is NaN.
        self.keys = [torch.zeros(key_shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(value_shape, dtype=dtype, device=device) for _ in range(layers)]
        self.bias_SKT = torch.full(value_shape[:3], -torch.inf, dtype=dtype, device=device)
        # Memory that stays where it is, for graphs of a step (`step_graphs`).
        self.position_S = torch.zeros(rows, dtype=torch.long, device=device)
        self.write_S = torch.zeros(rows * self.kv_heads, dtype=torch.long, device=device)
        self.lengths: list[int] = []
        self._update_write_index()

    def __len__(self) -> int:
        return len(self.lengths)

    def resize(self, rows: int) -> None:
        """Drop the last rows, or append rows without a sequence, whose outputs mean nothing."""
        added = rows - len(self)
        if added:
            self.position_S[len(self) : rows] = 0
            self.lengths = self.lengths[:rows] + [0] * added
            self._update_write_index()

    def insert(self, prefilled: PrefilledPrompts, prompts: Sequence[int]) -> Tensor:
        """Append one row for each of these prefilled prompts: their hidden states (E, H)."""
        device = self.position_S.device
        prompt_E, length_E = to_device(torch.tensor([(row, prefilled.lengths[row]) for row in prompts]), device).t()
        rows = slice(len(self), len(self) + len(prompts))
        new_tensors = (*map(self._interleave, prefilled.keys), *prefilled.values)
        for cached, new in zip((*self.keys, *self.values), new_tensors, strict=True):
            cached[rows, :, : new.shape[2]] = new[prompt_E]
            cached[rows, :, new.shape[2] :] = 0.0  # clear what a removed row left here, which may be NaN
        past_E1T = torch.arange(self.columns, device=device) >= length_E[:, None, None]
        self.bias_SKT[rows] = torch.zeros_like(self.bias_SKT[rows]).masked_fill_(past_E1T, -torch.inf)
        self.position_S[rows] = length_E
        self.lengths += [prefilled.lengths[row] for row in prompts]
        self._update_write_index()
        return prefilled.hidden_PH[prompt_E]

    def reserve_column(self) -> int:
        """Make room for every row's next token. Returns how many columns attention has to read."""
        window = max(self.lengths) + 1
        if window > self.columns:
            self._grow()
        return window

    def unmask_column(self) -> None:
        """Let each row attend to its next column."""
        self.bias_SKT.view(-1).index_fill_(0, self.write_N, 0.0)

    def window_bias(self, columns: int, window: int | None) -> Tensor:
        """Attention bias (A, kv_heads, columns) of the next token, with only its last `window` columns unmasked."""
        bias_AKT = self.bias_SKT[: len(self), :, :columns]
        if window is None or window >= columns:
            return bias_AKT
        first_A11 = (self.position_A - window + 1)[:, None, None]
        past_A1T = torch.arange(columns, device=bias_AKT.device) < first_A11
        return bias_AKT.masked_fill(past_A1T, -torch.inf)

    def write(self, layer: int, keys_AKD: Tensor, values_AKD: Tensor) -> None:
        """Store one token's key and value for every row."""
        for cached, new in ((self.keys[layer], keys_AKD), (self.values[layer], values_AKD)):
            cached.view(-1, self.width).index_copy_(0, self.write_N, new.reshape(-1, self.width))

    def advance(self) -> None:
        """Move every row's position on by one token."""
        self.position_A.add_(1)
        self.write_N.add_(1)
        self.lengths = [length + 1 for length in self.lengths]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Reorder the rows: new row i is old row rows[i]; all other rows are dropped."""
        moved = [(source, target) for target, source in enumerate(rows) if source != target]
        if moved:
            source_M, target_M = to_device(torch.tensor(moved), self.position_S.device).t()
            # Copy whole rows, so that nothing of a removed row remains.
            for tensor in (*self.keys, *self.values, self.bias_SKT, self.position_S):
                tensor.index_copy_(0, target_M, tensor.index_select(0, source_M))
        self.lengths = [self.lengths[row] for row in rows]
        self._update_write_index()

    def _update_write_index(self) -> None:
        """Set position_A (A,), each row's next position, and write_N, the flat (row, head, column) index of its key and value."""
        count = len(self) * self.kv_heads
        self.position_A, self.write_N = self.position_S[: len(self)], self.write_S[:count]
        first_N = torch.arange(count, device=self.position_S.device) * self.columns
        torch.add(first_N, self.position_A.repeat_interleave(self.kv_heads), out=self.write_N)

    def _grow(self) -> None:
        more = min(self.max_columns, 2 * self.columns) - self.columns
        self.keys = [functional.pad(keys, (0, 0, 0, 0, 0, more // self.lanes)) for keys in self.keys]
        self.values = [functional.pad(values, (0, 0, 0, more)) for values in self.values]
        self.bias_SKT = functional.pad(self.bias_SKT, (0, more), value=-torch.inf)
        self.columns += more
        self._update_write_index()

    def _round_up(self, columns: int) -> int:
        return -(-columns // self.lanes) * self.lanes

    def _interleave(self, keys_PKTD: Tensor) -> Tensor:
        """Keys of prompts in the layout of `keys`."""
        rest = -keys_PKTD.shape[2] % self.lanes
        padded = functional.pad(keys_PKTD, (0, 0, 0, rest)) if rest else keys_PKTD
        return padded.unflatten(2, (-1, self.lanes)).transpose(-1, -2)
