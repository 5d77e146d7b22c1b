"""One decoding step at a time, behind one small protocol: the general decoder for any causal LM; the fast one for plain Qwen3 and
Llama is in sampling/fast_decoder.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from headwater.models.policy import Policy
from headwater.sampling.fast_decoder import FastDecoder


class Decoder(Protocol):
    """Rows of sequences, extended by one token at a time; further ones enter as rows after those that are there."""

    def begin(self, prompts: Sequence[tuple[int, ...]], rows: int, longest: int) -> int:
        """Make ready for prompts that will enter in this order, equal ones together.

        rows     at most so many are there at once
        longest  no sequence comes to more tokens, its prompt included
        returns  how many rows should be free before the next enter
        """
        ...

    def enter(self, count: int) -> Tensor:
        """The next `count` prompts become rows: hidden (count, H) that predicts their first tokens."""
        ...

    def step(self, token_A: Tensor) -> Tensor:
        """Append one token to each of the A rows: hidden (A, H) that predicts the next."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """From now on row i is what rows[i] was; all others are dropped."""
        ...

    def logits(self, hidden_AH: Tensor) -> Tensor:
        """The head, at the policy's precision."""
        ...


def decoder_for(policy: Policy) -> Decoder:
    """The fast decoder where the model is of a kind whose every operation it knows, else the general one."""
    return FastDecoder(policy) if is_plain(policy) else CacheDecoder(policy)


def is_plain(policy: Policy) -> bool:
    held = policy.model.config
    rope = getattr(held, "rope_parameters", None) or {}
    return (
        held.model_type in ("qwen3", "llama")
        and policy.body is policy.model.base_model
        and getattr(held, "hidden_act", "") == "silu"
        and not getattr(held, "use_sliding_window", False)
        and rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
        and (policy.adapter.is_unquantized if policy.adapter is not None else not hasattr(policy.model, "peft_config"))
    )


class CacheDecoder:
    """Any causal LM, through transformers' own forward pass and cache: left-padded batches, one after the other.

    A cache of unknown kind (sliding windows, states) cannot take in a row beside older ones, so the next enter when all have left.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.prompts: list[tuple[int, ...]] = []
        self.cache: Any = None
        self.mask_AT = torch.empty(0)

    def begin(self, prompts: Sequence[tuple[int, ...]], rows: int, longest: int) -> int:
        self.prompts = list(prompts)
        return rows

    def enter(self, count: int) -> Tensor:
        entering, self.prompts = self.prompts[:count], self.prompts[count:]
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(entering))}
        width = max(map(len, distinct))
        ids_PT = torch.full((len(distinct), width), self.policy.pad_id, dtype=torch.long)
        mask_PT = torch.zeros((len(distinct), width), dtype=torch.long)
        for prompt, row in distinct.items():
            ids_PT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_PT[row, width - len(prompt) :] = 1
        device = self.policy.device
        mask_PT = mask_PT.to(device)
        self.cache = None
        hidden_PH = self._forward(ids_PT.to(device), mask_PT, (mask_PT.cumsum(dim=1) - 1).clamp_min(0))
        rows_B = torch.tensor([distinct[prompt] for prompt in entering], device=device)
        self.cache.batch_select_indices(rows_B)
        self.mask_AT = mask_PT[rows_B]
        return hidden_PH[rows_B]

    def step(self, token_A: Tensor) -> Tensor:
        self.mask_AT = torch.cat([self.mask_AT, self.mask_AT.new_ones(len(token_A), 1)], dim=1)
        return self._forward(token_A[:, None], self.mask_AT, self.mask_AT.sum(dim=1, keepdim=True) - 1)

    def keep(self, rows: Sequence[int]) -> None:
        rows_K = torch.tensor(rows, dtype=torch.long, device=self.mask_AT.device)
        self.mask_AT = self.mask_AT[rows_K]
        self.cache.batch_select_indices(rows_K)

    def logits(self, hidden_AH: Tensor) -> Tensor:
        return self.policy.logits(hidden_AH)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        with self.policy.autocast():
            out = self.policy.body(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
            )
        self.cache = out.past_key_values
        hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
        return hidden[:, -1]
