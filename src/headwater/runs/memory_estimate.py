"""Estimate memory of training from model shapes alone, in bytes."""

from __future__ import annotations

from collections.abc import Iterable

from headwater.losses.fused_linear import CHUNK_ELEMENTS
from headwater.models.shape import Shape

FOUR_BITS = 0.5 + 0.5 / 64 + 4 / 64 / 256
"""Bytes of a weight in nf4 with double quantisation: blocks of 64 with a scale in eight bits, whose own scales are float32."""


def persistent_bytes(
    trained: Shape | None, adapter: int, quantized: bool, frozen: Iterable[Shape], width: int
) -> float:
    """Weights, gradients and optimizer state, held all the time.

    trained    the model that trains; None where none does
    adapter    weights of its LoRA adapter; 0 where all of its own train
    quantized  whether the frozen weights under the adapter are in four bits
    frozen     models that only score or sample
    width      bytes of a value in the compute dtype

    Trained weights are float32 with a gradient and two moments; autocast keeps a copy of matrices in the compute dtype. Four bits
    reach the linear layers and not the head, nor experts that are stacked in one tensor.
    """
    total = sum(float(shape.parameters * width) for shape in frozen)
    if trained is None:
        return total
    if adapter:
        linear = trained.linear_parameters * (FOUR_BITS if quantized else width)
        return total + (linear + (trained.parameters - trained.linear_parameters) * width + adapter * 16.0)
    return total + trained.parameters * (16.0 + (width if width < 4 else 0))


def pass_bytes(shape: Shape, tokens: float, width: int, recompute: bool, cuda: bool, logits: int) -> float:
    """Activations that a backward pass needs, and the loss's chunks of logits with the gradient of the hidden states.

    tokens     of one forward and backward pass
    recompute  whether activations are recomputed layer by layer (gradient checkpointing)
    logits     chunks of them at once: the student's, and where the loss compares distributions the teacher's

    With recomputation one layer's activations exist at a time, after the loss's have been freed. Per layer and token: what
    both norms keep and the residual stream (float32), the projections' outputs and normed heads, attention's inputs and
    output, and the gated MLP's four wide vectors. Experts also copy the hidden states that each of them is sent, and give back
    as many, before and after their weighting.
    """
    query, keys = shape.heads * shape.key_dim, shape.kv_heads * shape.key_dim
    layer = 4.0 * 6 * shape.hidden + width * (5 * query + 4 * keys) + width * 4.0 * shape.intermediate
    layer += width * 3.0 * shape.experts_per_token * shape.hidden
    chunks = logits * float(min(CHUNK_ELEMENTS["cuda" if cuda else "cpu"], tokens * shape.vocabulary)) * width
    hidden = tokens * 3 * 4.0 * shape.hidden
    if recompute:
        return hidden + tokens * 4.0 * shape.hidden * shape.layers + max(tokens * layer, chunks)
    return hidden + tokens * layer * shape.layers + chunks
