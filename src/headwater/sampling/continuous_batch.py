"""State of a continuous batch: each sequence's random numbers, tokens and log-probs, in fixed slots on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from headwater.devices import to_device
from headwater.sampling.token_draws import named_uniforms

FinishedSequence = tuple[int, tuple[int, ...], tuple[float, ...], bool]
"""A finished completion: index of its request, tokens, log-probs, and whether it ended with a stop id."""


class ContinuousBatch:
    """`size` slots of `limit` tokens each. Rows of the batch move when others are removed; a sequence keeps its slot.

    check_every  a sequence may decode up to this many tokens past its stop id before `finished_rows` is called
    stop_V       bool (V,): the ids that end a completion
    """

    def __init__(self, size: int, limit: int, check_every: int, stop_V: Tensor) -> None:
        self.limit, self.check_every, self.stop_V = limit, check_every, stop_V
        device = stop_V.device
        self.stop_ids = frozenset(stop_V.nonzero().squeeze(1).tolist())
        self.draws = torch.zeros(size * limit, dtype=torch.float64, device=device)
        self.ids = torch.zeros(size * limit, dtype=torch.long, device=device)
        self.logp = torch.zeros(size * limit, device=device)
        self.free_slots = list(range(size))[::-1]
        self.slot_A = np.empty(0, dtype=np.int64)
        self.request_A = np.empty(0, dtype=np.int64)
        self.age_A = np.empty(0, dtype=np.int64)  # tokens drawn so far
        self.write_A = torch.empty(0, dtype=torch.long, device=device)  # flat index of the row's next token
        self.token_A = torch.empty(0, dtype=torch.long, device=device)
        self.stopped_A = torch.empty(0, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return len(self.slot_A)

    def add(self, requests: Sequence[int], rng_keys: Sequence[tuple[str | int, ...]]) -> None:
        """Append one row for each request, with the uniform numbers of its RNG key."""
        slot_E = np.array([self.free_slots.pop() for _ in requests], dtype=np.int64)
        device = self.draws.device
        slots = to_device(torch.from_numpy(slot_E), device)
        draws = to_device(torch.from_numpy(named_uniforms(self.limit, rng_keys)), device)
        self.draws.view(-1, self.limit)[slots] = draws
        self.slot_A = np.concatenate([self.slot_A, slot_E])
        self.request_A = np.concatenate([self.request_A, np.array(requests, dtype=np.int64)])
        self.age_A = np.concatenate([self.age_A, np.zeros(len(requests), dtype=np.int64)])
        self.write_A = torch.cat([self.write_A, slots * self.limit])
        self.stopped_A = torch.cat([self.stopped_A, self.stopped_A.new_zeros(len(requests))])

    def uniforms(self) -> Tensor:
        """Each row's next uniform number."""
        return self.draws.index_select(0, self.write_A)

    def append(self, token_A: Tensor, logp_A: Tensor) -> None:
        """Append one token to every row."""
        self.ids.index_copy_(0, self.write_A, token_A)
        self.logp.index_copy_(0, self.write_A, logp_A)
        self.stopped_A |= self.stop_V.index_select(0, token_A)
        self.token_A = token_A
        self.write_A.add_(1)
        self.age_A += 1

    def finished_rows(self) -> np.ndarray:
        """Rows that have drawn a stop id or reached the limit, ascending. Synchronizes the device."""
        return np.flatnonzero(self.stopped_A.cpu().numpy() | (self.age_A >= self.limit))

    def sequences(self, rows_F: np.ndarray) -> Iterator[FinishedSequence]:
        """The completions of finished rows, cut after the first stop id."""
        longest = min(int(self.age_A[rows_F].max()), self.limit)
        slots = torch.from_numpy(self.slot_A[rows_F]).to(self.ids.device)
        ids, logp = (flat.view(-1, self.limit)[slots, :longest].tolist() for flat in (self.ids, self.logp))
        for row, tokens, values in zip(rows_F.tolist(), ids, logp, strict=True):
            age = int(self.age_A[row])
            end = min(age, self.limit)
            # A stop id can only be among the tokens drawn since the last check.
            for column in range(max(0, age - self.check_every), end):
                if tokens[column] in self.stop_ids:
                    end = column + 1
                    break
            stopped = tokens[end - 1] in self.stop_ids
            yield int(self.request_A[row]), tuple(tokens[:end]), tuple(values[:end]), stopped

    def remove(self, rows_F: np.ndarray) -> list[int]:
        """Remove rows and move the last ones into the gaps. Returns the old row of each remaining row."""
        self.free_slots += self.slot_A[rows_F].tolist()
        count = len(self) - len(rows_F)
        removed = np.zeros(len(self), dtype=bool)
        removed[rows_F] = True
        kept = np.arange(count)
        kept[removed[:count]] = count + np.flatnonzero(~removed[count:])
        self.slot_A, self.request_A, self.age_A = self.slot_A[kept], self.request_A[kept], self.age_A[kept]
        kept_K = to_device(torch.from_numpy(kept), self.write_A.device)
        self.write_A, self.token_A, self.stopped_A = self.write_A[kept_K], self.token_A[kept_K], self.stopped_A[kept_K]
        return kept.tolist()
