"""Collate annotated rollouts into tensors, packed or padded. Holds the shape legend of the whole package.

    P  problems of a step            G  samples of a problem        B  sequences (rollouts), B = P·G
    T  tokens of the longest sequence in a batch, prompt included; shorter sequences are padded on the right
    L  tokens of a packed batch: (1, L) instead of (B, T), without padding and with each shared prompt once
    N  completion tokens of a batch, flattened in order of (sequence, position): the tokens that losses see
    H  hidden width                  V  vocabulary                  K  kept tokens of a cached teacher   E  events

Prompt and padding tokens need no mask in the losses: they are never in N. EOS is a completion token like any other. No token is
recognized as padding by its id, so EOS is trained on even where a tokenizer pads with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from headwater.devices import to_device
from headwater.losses.distributions import Distributions, concatenate
from headwater.losses.packing import Packing, pack
from headwater.types import Rollout, Verdict

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A rollout with its training signals.

    advantage      of the rollout, the same for each of its tokens
    zero_gradient  the row counts in the denominator but has no gradient, so its forward pass is skipped
    local          this rank runs the row; each rank runs some rows and counts all
    *_logp         per completion token, (n,) float32
    teacher        the teacher's distributions at the n completion tokens
    dense_weights  weight of the teacher's signal at each completion token, (n,) float32; None is 1 everywhere
    tag            of the rollout's problem, where the loss is normalized by tag; else empty
    """

    rollout: Rollout
    verdict: Verdict | None = None
    advantage: float = 0.0
    zero_gradient: bool = False
    local: bool = True
    reference_logp: Tensor | None = None
    old_logp: Tensor | None = None
    teacher: Distributions | None = None
    dense_weights: Tensor | None = None
    tag: str = ""

    @property
    def tokens(self) -> int:
        return len(self.rollout.completion_ids)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors.

    ids_BT       token ids; (1, L) if packed
    mask_BT      1 for real tokens, 0 for padding; None if packed
    predictor_N  index of the position before each target in the flattened (B·T or L) hidden states
    row_N        index of the sequence (0…B−1) of each token
    """

    ids_BT: Tensor
    mask_BT: Tensor | None
    packing: Packing | None
    predictor_N: Tensor
    targets_N: Tensor
    row_N: Tensor
    sampler_logp_N: Tensor
    advantages_N: Tensor
    reference_logp_N: Tensor | None
    old_logp_N: Tensor | None
    teacher: Distributions | None
    temperature: float
    dense_weights_N: Tensor | None = None


def collate(rows: Sequence[Row], pad_id: int, device: torch.device) -> Batch:
    """Pad on the right and flatten the completion tokens. All rows must share one sampling temperature.

    Example: prompt (5, 6), completion (7, 2) gives ids (5, 6, 7, 2), targets (7, 2) and predictors at positions 1, 2.
    """
    sequences = [row.rollout.prompt_ids + row.rollout.completion_ids for row in rows]
    ids_BT, mask_BT = pad_right(sequences, pad_id)
    starts = [index * ids_BT.shape[1] + len(row.rollout.prompt_ids) - 1 for index, row in enumerate(rows)]
    predictors = [torch.arange(start, start + row.tokens) for row, start in zip(rows, starts, strict=True)]
    ids_BT, mask_BT, predictor_N = (to_device(part, device) for part in (ids_BT, mask_BT, torch.cat(predictors)))
    return _batch(rows, ids_BT, mask_BT, None, predictor_N)


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded on the right, and their mask: 1 for real tokens."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    padded = partial(pad_sequence, batch_first=True)
    return padded(rows, padding_value=pad_id), padded([torch.ones_like(row) for row in rows])


def collate_packed(rows: Sequence[Row], device: torch.device) -> Batch:
    """As `collate`, but pack all tokens into one row without padding, with each distinct prompt once."""
    ids_1L, packing = pack([(row.rollout.prompt_ids, row.rollout.completion_ids) for row in rows], device)
    predictors = [
        torch.cat([torch.tensor([last]), torch.arange(start, start + row.tokens - 1)])
        for row, last, start in zip(rows, packing.prompt_end_B, packing.start_B, strict=True)
    ]
    return _batch(rows, ids_1L, None, packing, to_device(torch.cat(predictors), device))


def _batch(
    rows: Sequence[Row], ids_BT: Tensor, mask_BT: Tensor | None, packing: Packing | None, predictor_N: Tensor
) -> Batch:
    device = ids_BT.device
    temperatures = {row.rollout.temperature for row in rows}
    if len(temperatures) != 1:
        raise ValueError(f"rows of one batch were sampled at different temperatures: {sorted(temperatures)}")
    counts = torch.tensor([row.tokens for row in rows])
    teachers = [row.teacher for row in rows if row.teacher is not None]
    return Batch(
        ids_BT=ids_BT,
        mask_BT=mask_BT,
        packing=packing,
        predictor_N=predictor_N,
        targets_N=to_device(
            torch.tensor([token for row in rows for token in row.rollout.completion_ids], dtype=torch.long), device
        ),
        row_N=to_device(torch.repeat_interleave(counts), device),
        sampler_logp_N=to_device(torch.tensor([logp for row in rows for logp in row.rollout.sampler_logp]), device),
        advantages_N=to_device(torch.tensor([row.advantage for row in rows]).repeat_interleave(counts), device),
        reference_logp_N=_concatenate([row.reference_logp for row in rows], device),
        old_logp_N=_concatenate([row.old_logp for row in rows], device),
        teacher=concatenate(teachers, device) if teachers else None,
        temperature=temperatures.pop(),
        dense_weights_N=_concatenate([row.dense_weights for row in rows], device),
    )


def _concatenate(parts: list[Tensor | None], device: torch.device) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return to_device(torch.cat(present), device) if present else None


def microbatches(rows: Sequence[Row], tokens: int, pads: bool = True) -> Iterator[list[Row]]:
    """Split rows, sorted by length, into parts of at most `tokens` padded tokens. A longer row is a part of its own.

    pads  whether rows of different lengths may be in one part
    """
    return padded_parts(rows, lambda row: row.rollout.length, tokens, pads)


def padded_parts(items: Sequence[T], length: Callable[[T], int], tokens: int, pads: bool) -> Iterator[list[T]]:
    """As `microbatches`, for any items that have a length.

    Example: items of lengths 2, 3, 3 and a budget of 9 give [2, 3, 3], and without padding [2], [3, 3].
    """
    part: list[T] = []
    for item in sorted(items, key=length):
        width = length(item)
        if part and (width * (len(part) + 1) > tokens or not (pads or width == length(part[0]))):
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def packed_microbatches(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """Split rows into the fewest parts of similar size with at most `tokens` packed tokens. A longer row is a part of its own.

    Rows of one prompt stay adjacent, so that few parts repeat it.

    Example: four rows of prompt 2 and completion 3 under one prompt are 14 tokens; a budget of 10 cuts them 2 + 2.
    """
    by_prompt: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.rollout.prompt_ids, []).append(row)
    ordered = [row for group in by_prompt.values() for row in group]
    total = sum(row.tokens for row in rows) + sum(map(len, by_prompt))
    for count in range(max(1, -(-total // tokens)), len(rows)):
        parts = _split(ordered, total / count)
        if all(len(part) == 1 or packed_tokens(part) <= tokens for part in parts):
            return parts
    return [[row] for row in ordered]


def _split(rows: Sequence[Row], share: float) -> list[list[Row]]:
    """Consecutive parts of about `share` tokens: part i (from 1) ends before the row that takes the total past i · share."""
    parts: list[list[Row]] = [[]]
    done = 0
    last: tuple[int, ...] | None = None
    for row in rows:
        cost = row.tokens + (0 if row.rollout.prompt_ids == last else len(row.rollout.prompt_ids))
        if parts[-1] and done + cost > share * len(parts):
            parts.append([])
        parts[-1].append(row)
        done, last = done + cost, row.rollout.prompt_ids
    return parts


def packed_tokens(rows: Sequence[Row]) -> int:
    """Tokens that a packed forward pass computes: every completion, and each distinct prompt once."""
    return sum(row.tokens for row in rows) + sum(len(prompt) for prompt in {row.rollout.prompt_ids for row in rows})
