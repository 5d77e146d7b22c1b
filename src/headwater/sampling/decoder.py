"""Decoder protocol (prefill, decode one token a step), and the general decoder for any causal LM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from headwater.errors import UserError
from headwater.models.policy import Policy
from headwater.models.rope import mixed_lengths
from headwater.sampling.fast_decoder import FastDecoder


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
    """The fast decoder for plain Qwen3 and Llama models, else the general one."""
    return FastDecoder(policy) if supports_fast_decoder(policy) else CacheDecoder(policy)


def supports_fast_decoder(policy: Policy) -> bool:
    config = policy.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in ("qwen3", "llama")
        and policy.body is policy.model.base_model
        and getattr(config, "hidden_act", "") == "silu"
        and not getattr(config, "use_sliding_window", False)
        and rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
        and (policy.adapter.is_unquantized if policy.adapter is not None else not hasattr(policy.model, "peft_config"))
    )


class CacheDecoder:
    """Any causal LM, through transformers' forward pass and cache, in left-padded batches one after the other.

    Rows cannot be appended to a transformers cache of unknown kind (sliding windows, recurrent states), so the next prompts
    are prefilled once all rows have left.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.prompts: list[tuple[int, ...]] = []
        self.cache: Any = None
        self.mask_AT = torch.empty(0)

    def begin(self, prompts: Sequence[tuple[int, ...]], max_rows: int, max_tokens: int) -> int:
        lengths = sorted(map(len, prompts))
        problem = mixed_lengths(self.policy.model.config, lengths[0], lengths[-1], max_tokens - lengths[-1])
        if problem is not None:
            raise UserError(f"{self.policy.folder.field}: {problem}")
        self.prompts = list(prompts)
        return max_rows

    def prefill(self, count: int) -> Tensor:
        prompts, self.prompts = self.prompts[:count], self.prompts[count:]
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
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
        rows_B = torch.tensor([distinct[prompt] for prompt in prompts], device=device)
        self.cache.batch_select_indices(rows_B)
        self.mask_AT = mask_PT[rows_B]
        return hidden_PH[rows_B]

    def decode_step(self, token_A: Tensor) -> Tensor:
        self.mask_AT = torch.cat([self.mask_AT, self.mask_AT.new_ones(len(token_A), 1)], dim=1)
        return self._forward(token_A[:, None], self.mask_AT, self.mask_AT.sum(dim=1, keepdim=True) - 1)

    def select_rows(self, rows: Sequence[int]) -> None:
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
