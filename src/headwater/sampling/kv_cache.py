"""The fast decoder's cache: one preallocated table of keys and one of values a layer, into which rows come and from which they go.

Every row is left-aligned: column t holds what its token t left. So rows of any age lie beside one another, a new one may take the
place of one that left, nothing is ever shifted, and a bias hides what lies past a row's own end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Held:
    """Prompts that have been run: keys and values of each layer (P, kv_heads, T, D), hidden states after their last tokens.

    rows   for each request that is to enter from here, in order: its prompt's row
    """

    keys: list[Tensor]
    values: list[Tensor]
    hidden_PH: Tensor
    lengths: list[int]
    rows: list[int]


class Cache:
    """Room for `rows` sequences of at most `longest` tokens; at first for `columns` tokens, doubled when they are full.

    heads   (kv_heads, head_dim)
    lanes   columns whose keys lie side by side, for kernels that score so many at once
    keys    of each layer (rows, kv_heads, columns / lanes, head_dim, lanes)
    values  of each layer (rows, kv_heads, columns, head_dim)
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        columns: int,
        longest: int,
        heads: tuple[int, int],
        lanes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.lanes = lanes
        self.columns, self.longest = self._whole(min(columns, longest)), self._whole(longest)
        self.kv_heads, self.width = heads
        shape = (rows, self.kv_heads, self.columns, self.width)
        lying = (rows, self.kv_heads, self.columns // lanes, self.width, lanes)
        # Zeros, not whatever was in memory: a hidden column counts 0 times, and 0 times NaN is NaN.
        self.keys = [torch.zeros(lying, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.bias_SKT = torch.full(shape[:3], -torch.inf, dtype=dtype, device=device)
        self.position_A = torch.empty(0, dtype=torch.long, device=device)
        self.place_N = torch.empty(
            0, dtype=torch.long, device=device
        )  # where a row's next keys go, in columns of all rows
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def enter(self, held: Held, rows: Sequence[int]) -> Tensor:
        """New rows after the present ones that continue these prompts: hidden (E, H)."""
        device = self.position_A.device
        rows_E, length_E = torch.tensor([(row, held.lengths[row]) for row in rows], device=device).t()
        there = slice(len(self), len(self) + len(rows))
        for ours, theirs in zip((*self.keys, *self.values), (*map(self._lying, held.keys), *held.values), strict=True):
            ours[there, :, : theirs.shape[2]] = theirs[rows_E]
            ours[there, :, theirs.shape[2] :] = 0.0  # what a row that left may have held here, NaN perhaps
        past_E1T = torch.arange(self.columns, device=device) >= length_E[:, None, None]
        self.bias_SKT[there] = torch.zeros_like(self.bias_SKT[there]).masked_fill_(past_E1T, -torch.inf)
        self.position_A = torch.cat([self.position_A, length_E])
        self.lengths += [held.lengths[row] for row in rows]
        self._place()
        return held.hidden_PH[rows_E]

    def open(self) -> int:
        """Room for every row's next column; returns up to which column there is anything to see."""
        window = max(self.lengths) + 1
        if window > self.columns:
            self._grow()
        return window

    def show(self) -> None:
        """The next column is hidden from its row no longer."""
        self.bias_SKT.view(-1).index_fill_(0, self.place_N, 0.0)

    def write(self, layer: int, keys_AKD: Tensor, values_AKD: Tensor) -> None:
        for table, new in ((self.keys[layer], keys_AKD), (self.values[layer], values_AKD)):
            table.view(-1, self.width).index_copy_(0, self.place_N, new.reshape(-1, self.width))

    def close(self) -> None:
        """The next column's turn."""
        self.position_A.add_(1)
        self.place_N.add_(1)
        self.lengths = [length + 1 for length in self.lengths]

    def keep(self, rows: Sequence[int]) -> None:
        """From now on row i is what rows[i] was."""
        moved = [(source, target) for target, source in enumerate(rows) if source != target]
        if moved:
            source_M, target_M = torch.tensor(moved, device=self.position_A.device).t()
            # Whole rows, so that nothing of a row that left stays behind.
            for tensor in (*self.keys, *self.values, self.bias_SKT, self.position_A):
                tensor.index_copy_(0, target_M, tensor.index_select(0, source_M))
        self.position_A = self.position_A[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]
        self._place()

    def _place(self) -> None:
        first_N = torch.arange(len(self) * self.kv_heads, device=self.position_A.device) * self.columns
        self.place_N = first_N + self.position_A.repeat_interleave(self.kv_heads)

    def _grow(self) -> None:
        more = min(self.longest, 2 * self.columns) - self.columns
        self.keys = [functional.pad(one, (0, 0, 0, 0, 0, more // self.lanes)) for one in self.keys]
        self.values = [functional.pad(one, (0, 0, 0, more)) for one in self.values]
        self.bias_SKT = functional.pad(self.bias_SKT, (0, more), value=-torch.inf)
        self.columns += more
        self._place()

    def _whole(self, columns: int) -> int:
        return -(-columns // self.lanes) * self.lanes

    def _lying(self, keys_PKTD: Tensor) -> Tensor:
        """Keys of prompts as they lie here."""
        rest = -keys_PKTD.shape[2] % self.lanes
        whole = functional.pad(keys_PKTD, (0, 0, 0, rest)) if rest else keys_PKTD
        return whole.unflatten(2, (-1, self.lanes)).transpose(-1, -2)
