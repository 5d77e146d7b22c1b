"""Annotated rollouts -> tensors, packed or padded. The shape legend of the whole package stands here.

    P  problems of a step            G  samples of a problem        B  sequences (rollouts), B = P·G
    T  tokens of the longest sequence in a batch, prompt included; shorter ones are padded on the right
    L  tokens of a packed batch: (1, L) in place of (B, T), no padding and each shared prompt once
    N  completion tokens of a batch, flat, in order of (sequence, position): the tokens that losses see
    H  hidden width                  V  vocabulary                  K  kept tokens of a cached teacher   E  events

Prompt and padding tokens are not masked out of the losses: they are never in N. EOS is a completion token like any other, and
since no token is recognised as padding by its id, it is trained on also where a tokenizer pads with EOS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.losses.distributions import Distributions, joined
from headwater.losses.packing import Packing, pack
from headwater.types import Rollout, Verdict


@dataclass(frozen=True)
class Row:
    """A rollout and what was said of it.

    advantage   the rollout's, spread over its tokens
    inert       it is counted in the denominator but cannot change the gradient, so it is not run
    here        whether this process runs it; where several train together, each runs some rows and counts all
    *_logp      per completion token, (n,) float32
    teacher     the teacher's distributions at the completion tokens, n of them
    """

    rollout: Rollout
    verdict: Verdict | None = None
    advantage: float = 0.0
    inert: bool = False
    here: bool = True
    reference_logp: Tensor | None = None
    old_logp: Tensor | None = None
    teacher: Distributions | None = None

    @property
    def tokens(self) -> int:
        return len(self.rollout.completion_ids)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors.

    ids_BT       token ids; (1, L) where they are packed
    mask_BT      which are not padding; None where they are packed
    predictor_N  index into the flattened (B·T or L) hidden states: the position before each target
    row_N        which sequence (0…B−1) each token belongs to
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


def collate(rows: Sequence[Row], pad_id: int, device: torch.device) -> Batch:
    """Pad on the right and flatten the completion tokens. All rows share one sampling temperature.

    Example: prompt (5, 6), completion (7, 2) gives ids (5, 6, 7, 2), targets (7, 2) and predictors at positions 1, 2.
    """
    sequences = [row.rollout.prompt_ids + row.rollout.completion_ids for row in rows]
    width = max(len(sequence) for sequence in sequences)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
    predictors = []
    for index, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        ids_BT[index, : len(sequence)] = torch.tensor(sequence)
        mask_BT[index, : len(sequence)] = 1
        start = index * width + len(row.rollout.prompt_ids) - 1
        predictors.append(torch.arange(start, start + row.tokens))
    return _batch(rows, ids_BT.to(device), mask_BT.to(device), None, torch.cat(predictors).to(device))


def collate_packed(rows: Sequence[Row], device: torch.device) -> Batch:
    """One row of real tokens, each distinct prompt once, and the completion tokens flat; otherwise as `collate`."""
    ids_1L, packing = pack([(row.rollout.prompt_ids, row.rollout.completion_ids) for row in rows], device)
    predictors = [
        torch.cat([torch.tensor([last]), torch.arange(start, start + row.tokens - 1)])
        for row, last, start in zip(rows, packing.prompt_B, packing.start_B, strict=True)
    ]
    return _batch(rows, ids_1L, None, packing, torch.cat(predictors).to(device))


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
        targets_N=torch.tensor(
            [i for row in rows for i in row.rollout.completion_ids], dtype=torch.long, device=device
        ),
        row_N=torch.repeat_interleave(counts).to(device),
        sampler_logp_N=torch.tensor([x for row in rows for x in row.rollout.sampler_logp], device=device),
        advantages_N=torch.tensor([row.advantage for row in rows]).repeat_interleave(counts).to(device),
        reference_logp_N=_flat([row.reference_logp for row in rows], device),
        old_logp_N=_flat([row.old_logp for row in rows], device),
        teacher=joined(teachers, device) if teachers else None,
        temperature=temperatures.pop(),
    )


def _flat(parts: list[Tensor | None], device: torch.device) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known).to(device) if known else None


def microbatches(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Split rows into parts of at most `tokens` padded tokens (a single longer row stands alone), alike in length."""
    part: list[Row] = []
    width = 0
    for row in sorted(rows, key=lambda row: len(row.rollout.prompt_ids) + row.tokens):
        width = len(row.rollout.prompt_ids) + row.tokens
        if part and width * (len(part) + 1) > tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def packed_microbatches(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """Split rows into as few parts of at most `tokens` packed tokens as an even cut allows (a single longer row stands alone).

    Rows of one prompt stay side by side, so that few parts repeat it; parts are alike in tokens.

    Example: four rows of prompt 2 and completion 3 under one prompt are 14 tokens; a budget of 10 cuts them 2 + 2.
    """
    by_prompt: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.rollout.prompt_ids, []).append(row)
    ordered = [row for group in by_prompt.values() for row in group]
    whole = sum(row.tokens for row in rows) + sum(map(len, by_prompt))
    for count in range(max(1, -(-whole // tokens)), len(rows)):
        parts = _cut(ordered, whole / count)
        if all(len(part) == 1 or packed_tokens(part) <= tokens for part in parts):
            return parts
    return [[row] for row in ordered]


def _cut(rows: Sequence[Row], share: float) -> list[list[Row]]:
    """Consecutive parts, each ended by the row with which it reaches its share of the tokens so far."""
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
    """Tokens that a packed pass over these rows computes: every completion, and each distinct prompt once."""
    return sum(row.tokens for row in rows) + sum(len(prompt) for prompt in {row.rollout.prompt_ids for row in rows})
