"""Decoder protocol (prefill, decode one token a step), and the general decoders for any causal LM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from headwater.losses.batch import pad_right, padded_parts
from headwater.models.cached_forward import CachedBatch
from headwater.models.policy import Policy
from headwater.sampling.fast_architectures import DecoderSpec, decoder_spec
from headwater.sampling.fast_decoder import FastDecoder

RECOMPUTED_TOKENS = 2048
"""Tokens of one pass where sequences are run again from their start, padding included."""


class Decoder(Protocol):
    """A batch of sequences that grow by one token a step; new sequences are appended as rows after the present ones."""

    def begin(self, prompts: Sequence[tuple[int, ...]], max_rows: int, max_tokens: int) -> int:
        """Prepare for prompts that will be prefilled in this order, equal ones adjacent.

        max_rows    rows in the batch at once, at most
        max_tokens  tokens of a sequence at most, prompt included
        returns     how many rows should be free before the next prefill
        """
        ...

    def prefill(self, count: int) -> Tensor:
        """Append the next `count` prompts as rows: hidden (count, H) that predicts their first tokens."""
        ...

    def decode_step(self, token_A: Tensor) -> Tensor:
        """Append one token to each of the A rows: hidden (A, H) that predicts the next."""
        ...

    def select_rows(self, rows: Sequence[int]) -> None:
        """Reorder the batch: new row i is old row rows[i]; all other rows are dropped."""
        ...

    def logits(self, hidden_AH: Tensor) -> Tensor:
        """Output layer: (A, H) -> (A, V), at the policy's precision."""
        ...


def decoder_for(policy: Policy) -> Decoder:
    """The fast decoder for the architectures that it knows, else the general one that the model's cache allows."""
    spec = fast_decoder_spec(policy)
    if spec is not None:
        return FastDecoder(policy, spec)
    return RecomputeDecoder(policy) if policy.decoding == "recompute" else CacheDecoder(policy)


def fast_decoder_spec(policy: Policy) -> DecoderSpec | None:
    """What the fast decoder has to know of this policy's model; None if it cannot run it."""
    adapted = hasattr(policy.model, "peft_config")
    unquantized = policy.adapter.is_unquantized if policy.adapter is not None else not adapted
    plain = policy.body is policy.model.base_model and unquantized
    return decoder_spec(policy.model.config) if plain else None


class CacheDecoder:
    """Any causal LM, through transformers' forward pass and cache.

    A model that allows it (`Policy.decoding`) runs as one left-padded batch; else prompts of one length make a batch each.
    Rows cannot be appended to a transformers cache of unknown kind (sliding windows, recurrent states), so the next prompts
    are prefilled once all rows have left.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.logits, self.pads = policy, policy.logits, policy.decoding == "left_padded"
        self.prompts: list[tuple[int, ...]] = []
        self.batches: list[tuple[list[int], CachedBatch]] = []  # with the row of each of the batch's own rows

    def begin(self, prompts: Sequence[tuple[int, ...]], max_rows: int, max_tokens: int) -> int:
        self.prompts = list(prompts)
        return max_rows

    def prefill(self, count: int) -> Tensor:
        prompts, self.prompts = self.prompts[:count], self.prompts[count:]
        rows_of: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(0 if self.pads else len(prompt), []).append(row)
        self.batches = []
        hidden = []
        for rows in rows_of.values():
            distinct = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts[row] for row in rows))}
            batch = CachedBatch(self.policy.body, self.pads)
            with self.policy.autocast():
                hidden_PH = batch.prefill(list(distinct), self.policy.pad_id, self.policy.device)
            chosen = [distinct[prompts[row]] for row in rows]
            batch.select_rows(chosen)
            hidden.append(hidden_PH[torch.tensor(chosen, device=self.policy.device)])
            self.batches.append((rows, batch))
        return self._in_row_order(hidden)

    def decode_step(self, token_A: Tensor) -> Tensor:
        with self.policy.autocast():
            return self._in_row_order(
                [batch.append(token_A if len(self.batches) == 1 else token_A[rows]) for rows, batch in self.batches]
            )

    def select_rows(self, rows: Sequence[int]) -> None:
        new_row = {old: new for new, old in enumerate(rows)}
        batches = []
        for old_rows, batch in self.batches:
            kept = sorted((new_row[old], index) for index, old in enumerate(old_rows) if old in new_row)
            if kept:
                batch.select_rows([index for _, index in kept])
                batches.append(([new for new, _ in kept], batch))
        self.batches = batches

    def _in_row_order(self, hidden: Sequence[Tensor]) -> Tensor:
        """The rows of all batches (A, H); those of a single batch are in order already."""
        if len(hidden) == 1:
            return hidden[0]
        hidden_AH = torch.cat(list(hidden))
        order = [row for rows, _ in self.batches for row in rows]
        return torch.empty_like(hidden_AH).index_copy_(0, torch.tensor(order, device=hidden_AH.device), hidden_AH)


class RecomputeDecoder:
    """Any causal LM, without a cache: each step runs every sequence from its start. Slow, for models without a usable cache."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.logits = policy, policy.logits
        self.prompts: list[tuple[int, ...]] = []
        self.sequences: list[tuple[int, ...]] = []

    def begin(self, prompts: Sequence[tuple[int, ...]], max_rows: int, max_tokens: int) -> int:
        self.prompts, self.sequences = list(prompts), []
        return 1

    def prefill(self, count: int) -> Tensor:
        prompts, self.prompts = self.prompts[:count], self.prompts[count:]
        self.sequences += prompts
        return self._last_hidden(prompts)

    def decode_step(self, token_A: Tensor) -> Tensor:
        tokens = token_A.tolist()
        self.sequences = [(*ids, token) for ids, token in zip(self.sequences, tokens, strict=True)]
        return self._last_hidden(self.sequences)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.sequences = [self.sequences[row] for row in rows]

    def _last_hidden(self, sequences: Sequence[tuple[int, ...]]) -> Tensor:
        """Hidden states (A, H) at the sequences' last tokens."""
        distinct = list(dict.fromkeys(sequences))
        hidden: dict[tuple[int, ...], Tensor] = {}
        for part in padded_parts(distinct, len, RECOMPUTED_TOKENS, self.policy.supports_padding):
            ids_BT, mask_BT = pad_right(part, self.policy.pad_id)
            hidden_BTH = self.policy.hidden(ids_BT.to(self.policy.device), mask_BT.to(self.policy.device))
            hidden.update({ids: hidden_BTH[row, len(ids) - 1] for row, ids in enumerate(part)})
        return torch.stack([hidden[ids] for ids in sequences])
