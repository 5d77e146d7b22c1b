"""Run packed sequences through transformers models: an attention implementation, and a check of which models allow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from headwater.losses.packing import Packing, pack, packed_attention

ATTENTION = "headwater_packed"
"""The name under which `attention` is registered with transformers."""

PACKABLE = frozenset({"qwen3", "qwen2", "llama", "mistral", "granite", "cohere", "olmo2", "smollm3", "phi3"})
"""Architectures whose tokens interact in attention only, so that packed sequences cannot influence each other."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over packed tokens, q (1, heads, L, D) -> (1, L, heads, D); without a packing, transformers' `sdpa`."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    return packed_attention(packing, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def packed_hidden(body: nn.Module, ids_1L: Tensor, packing: Packing) -> Tensor:
    """Last hidden states (L, H) of packed tokens."""
    # A 4-d mask stops the model from building one; `attention` ignores it.
    unused_mask = ids_1L.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    out = body(
        input_ids=ids_1L, attention_mask=unused_mask, position_ids=packing.position_1L, use_cache=False, packing=packing
    )
    return out.last_hidden_state[0]


def enable_packing(model: Any, body: nn.Module, device: torch.device) -> bool:
    """Switch a model to packed attention if it supports it; returns whether it does.

    Its attention must be full (all earlier tokens, no cap), go through transformers' interface, and give two packed sequences
    the same hidden states as each alone.
    """
    config = model.config
    supported = body is model.base_model and getattr(model, "_supports_attention_backend", False)
    if not supported or not _has_full_attention(config) or config._attn_implementation != "sdpa":
        return False
    config._attn_implementation = ATTENTION
    if _same_when_packed(body, config.get_text_config().vocab_size, device):
        return True
    config._attn_implementation = "sdpa"
    return False


def _has_full_attention(config: Any) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        kinds == {"full_attention"}
        and getattr(config, "model_type", "") in PACKABLE
        and not getattr(config, "attn_logit_softcapping", None)
        and not (getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None))
    )


@torch.no_grad()
def _same_when_packed(body: nn.Module, vocabulary: int, device: torch.device) -> bool:
    ids = (torch.arange(3, 17) % vocabulary).tolist()
    prompt, completions = tuple(ids[:4]), (tuple(ids[4:7]), tuple(ids[7:]))
    try:
        packed = packed_hidden(body, *pack([(prompt, completion) for completion in completions], device))
        separate = [
            body(input_ids=torch.tensor([prompt + completion], device=device), use_cache=False).last_hidden_state[0]
            for completion in completions
        ]
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False  # the body does not accept the packing's arguments
    expected = torch.cat([separate[0], separate[1][len(prompt) :]]).float()
    tolerance = 1e-4 if packed.dtype == torch.float32 else 5e-2
    return bool((packed.float() - expected).abs().max() <= tolerance * expected.abs().max())
