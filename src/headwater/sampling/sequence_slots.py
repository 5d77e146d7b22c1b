"""The completions under way: for each row of the sampler's batch its draws, the tokens drawn so far and their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headwater.sampling.token_draws import named_uniforms


@dataclass(frozen=True, slots=True)
class Line:
    """One finished completion: the request it answers, its tokens and their log-probs, and whether a stop id ended it."""

    request: int
    ids: tuple[int, ...]
    logp: tuple[float, ...]
    stopped: bool


class Slots:
    """`size` places of `limit` tokens on the device. Rows move when others leave; a row's place stays the same.

    look   a row may run on for so many steps after its end until someone looks (on a GPU every look waits for the device)
    stops  bool (V,): the ids that end a completion
    """

    def __init__(self, size: int, limit: int, look: int, stops_V: Tensor) -> None:
        self.limit, self.look, self.stops_V = limit, look, stops_V
        device = stops_V.device
        self.stop_ids = frozenset(stops_V.nonzero().squeeze(1).tolist())
        self.draws = torch.zeros(size * self.limit, dtype=torch.float64, device=device)
        self.ids = torch.zeros(size * self.limit, dtype=torch.long, device=device)
        self.logp = torch.zeros(size * self.limit, device=device)
        self.free = list(range(size))[::-1]
        self.slot_A = np.empty(0, dtype=np.int64)
        self.request_A = np.empty(0, dtype=np.int64)
        self.age_A = np.empty(0, dtype=np.int64)
        self.next_A = torch.empty(0, dtype=torch.long, device=device)  # where the row's next token is written
        self.token_A = torch.empty(0, dtype=torch.long, device=device)
        self.done_A = torch.empty(0, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return len(self.slot_A)

    def enter(self, requests: Sequence[int], names: Sequence[tuple[str | int, ...]]) -> None:
        """New rows after the present ones, each with the draws of its name."""
        slot_E = np.array([self.free.pop() for _ in requests], dtype=np.int64)
        device = self.draws.device
        slots = torch.from_numpy(slot_E).to(device)
        self.draws.view(-1, self.limit)[slots] = torch.from_numpy(named_uniforms(self.limit, names)).to(device)
        self.slot_A = np.concatenate([self.slot_A, slot_E])
        self.request_A = np.concatenate([self.request_A, np.array(requests, dtype=np.int64)])
        self.age_A = np.concatenate([self.age_A, np.zeros(len(requests), dtype=np.int64)])
        self.next_A = torch.cat([self.next_A, slots * self.limit])
        self.done_A = torch.cat([self.done_A, self.done_A.new_zeros(len(requests))])

    def uniforms(self) -> Tensor:
        """Each row's next uniform number."""
        return self.draws.index_select(0, self.next_A)

    def append(self, token_A: Tensor, logp_A: Tensor) -> None:
        self.ids.index_copy_(0, self.next_A, token_A)
        self.logp.index_copy_(0, self.next_A, logp_A)
        self.done_A |= self.stops_V.index_select(0, token_A)
        self.token_A = token_A
        self.next_A.add_(1)
        self.age_A += 1

    def ended(self) -> np.ndarray:
        """The rows that have met a stop id or their limit, in order."""
        return np.flatnonzero(self.done_A.cpu().numpy() | (self.age_A >= self.limit))

    def lines(self, rows_F: np.ndarray) -> list[Line]:
        """What these rows, which have ended, have drawn."""
        longest = min(int(self.age_A[rows_F].max()), self.limit)
        slots = torch.from_numpy(self.slot_A[rows_F]).to(self.ids.device)
        ids, logp = (one.view(-1, self.limit)[slots, :longest].tolist() for one in (self.ids, self.logp))
        found = []
        for row, line, values in zip(rows_F.tolist(), ids, logp, strict=True):
            age = int(self.age_A[row])
            end = min(age, self.limit)
            # Whoever ended before the last look has left.
            for column in range(max(0, age - self.look), end):
                if line[column] in self.stop_ids:
                    end = column + 1
                    break
            stopped = line[end - 1] in self.stop_ids
            found.append(Line(int(self.request_A[row]), tuple(line[:end]), tuple(values[:end]), stopped))
        return found

    def leave(self, rows_F: np.ndarray) -> list[int]:
        """Drop these rows; the last ones take their places. Returns what each row that is left was before."""
        self.free += self.slot_A[rows_F].tolist()
        left = len(self) - len(rows_F)
        gone = np.zeros(len(self), dtype=bool)
        gone[rows_F] = True
        kept = np.arange(left)
        kept[gone[:left]] = left + np.flatnonzero(~gone[left:])
        self.slot_A, self.request_A, self.age_A = self.slot_A[kept], self.request_A[kept], self.age_A[kept]
        kept_K = torch.from_numpy(kept).to(self.next_A.device)
        self.next_A, self.token_A, self.done_A = self.next_A[kept_K], self.token_A[kept_K], self.done_A[kept_K]
        return kept.tolist()
