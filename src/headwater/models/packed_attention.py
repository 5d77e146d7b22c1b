"""Packed sequences through transformers' models: their attention interface, and which models it may be used for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from headwater.losses.packing import Packing, pack, packed_attention

ATTENTION = "headwater_packed"
"""The name under which transformers' models find `attention`."""


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
    """Attention of packed tokens, q (1, heads, L, D) -> (1, L, heads, D); without a packing that of `sdpa`."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    return packed_attention(packing, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def packed_hidden(body: nn.Module, ids_1L: Tensor, packing: Packing) -> Tensor:
    """Last hidden states (L, H) of packed tokens."""
    # A mask of four dimensions is taken as it is: no model builds one of its own, and `attention` looks at none.
    unused = ids_1L.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    out = body(
        input_ids=ids_1L, attention_mask=unused, position_ids=packing.position_1L, use_cache=False, packing=packing
    )
    return out.last_hidden_state[0]


def prepare(model: Any, body: nn.Module, device: torch.device) -> bool:
    """Whether sequences may be packed for this model; where they may, its attention is made to know how.

    Its attention must be plain (every token of the sequence seen, no cap), go through transformers' interface, and give two
    packed sequences the same hidden states as each alone.
    """
    held = model.config
    if body is not model.base_model or not getattr(model, "_supports_attention_backend", False) or not plain(held):
        return False
    before = held._attn_implementation
    if before != "sdpa":
        return False
    held._attn_implementation = ATTENTION
    if _same_packed(body, held.get_text_config().vocab_size, device):
        return True
    held._attn_implementation = before
    return False


def plain(held: Any) -> bool:
    kinds = set(getattr(held, "layer_types", None) or ["full_attention"])
    return (
        kinds == {"full_attention"}
        and getattr(held, "model_type", "") in PLAIN
        and not getattr(held, "attn_logit_softcapping", None)
        and not (getattr(held, "use_sliding_window", True) and getattr(held, "sliding_window", None))
    )


PLAIN = frozenset({"qwen3", "qwen2", "llama", "mistral", "granite", "cohere", "olmo2", "smollm3", "phi3"})
"""Architectures whose tokens meet each other in attention alone, so that packed ones cannot."""


@torch.no_grad()
def _same_packed(body: nn.Module, vocabulary: int, device: torch.device) -> bool:
    ids = [int(one) for one in torch.arange(3, 17) % vocabulary]
    prompt, texts = tuple(ids[:4]), (tuple(ids[4:7]), tuple(ids[7:]))
    try:
        found = packed_hidden(body, *pack([(prompt, text) for text in texts], device))
        apart = (torch.tensor([prompt + text], device=device) for text in texts)
        expected = [body(input_ids=one, use_cache=False).last_hidden_state[0] for one in apart]
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False  # a body that does not take what packing hands it
    whole = torch.cat([expected[0], expected[1][len(prompt) :]]).float()
    near = 1e-4 if found.dtype == torch.float32 else 5e-2
    return bool((found.float() - whole).abs().max() <= near * whole.abs().max())
