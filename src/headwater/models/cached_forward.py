"""A batch that grows by one token a step, through transformers' forward pass and cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin


class CachedBatch:
    """Rows of one batch with the model's cache: keys and values, recurrent and convolution states.

    pads  prompts of different lengths are padded on the left and masked; else all have one length and there is no mask
    """

    def __init__(self, body: nn.Module, pads: bool) -> None:
        self.body, self.pads = body, pads
        takes = inspect.signature(body.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.cache_name = "cache_params" if "cache_params" in takes else "past_key_values"
        self.cache: Any = None
        self.mask_AT = torch.empty(0)

    @property
    def is_plain(self) -> bool:
        """Whether the model keeps nothing but keys and values."""
        recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.cache.layers)
        return type(self.cache) is DynamicCache and not recurrent

    def prefill(self, prompts: Sequence[tuple[int, ...]], pad_id: int, device: torch.device) -> Tensor:
        """Run the prompts, one row each: hidden states (A, H) at their last tokens."""
        width = max(map(len, prompts))
        ids_AT = torch.full((len(prompts), width), pad_id, dtype=torch.long)
        mask_AT = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_AT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_AT[row, width - len(prompt) :] = 1
        self.mask_AT = mask_AT.to(device)
        return self._forward(ids_AT.to(device), (self.mask_AT.cumsum(dim=1) - 1).clamp_min(0))

    def append(self, token_A: Tensor) -> Tensor:
        """Append one token to each row: hidden states (A, H) at them."""
        self.mask_AT = torch.cat([self.mask_AT, self.mask_AT.new_ones(len(token_A), 1)], dim=1)
        return self._forward(token_A[:, None], self.mask_AT.sum(dim=1, keepdim=True) - 1)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Reorder the batch: new row i is old row rows[i]; rows may repeat, and all others are dropped."""
        rows_K = torch.tensor(rows, dtype=torch.long, device=self.mask_AT.device)
        self.mask_AT = self.mask_AT[rows_K]
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.cache.layers):
            self.cache.reorder_cache(rows_K)  # those layers have no `batch_select_indices`
        else:
            self.cache.batch_select_indices(rows_K)

    def _forward(self, ids_AT: Tensor, position_AT: Tensor) -> Tensor:
        inputs = {"input_ids": ids_AT, self.cache_name: self.cache, "use_cache": True}
        if self.pads:
            inputs["attention_mask"] = self.mask_AT
        if self.takes_positions:
            inputs["position_ids"] = position_AT
        out = self.body(**inputs)
        self.cache = getattr(out, self.cache_name)
        return last_hidden(out)[:, -1]


def last_hidden(out: Any) -> Tensor:
    """Last hidden states (B, T, H) of a body's output; a whole model in the place of a body gives its logits."""
    hidden: Tensor = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
    return hidden
