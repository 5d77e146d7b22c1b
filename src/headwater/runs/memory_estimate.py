"""Bytes that training and sampling hold, from shapes alone: what stays, and what comes and goes with a step."""

from __future__ import annotations

from dataclasses import dataclass

from headwater.losses.fused_linear import CHUNK_ELEMENTS
from headwater.models.shape import Shape

FOUR_BITS = 0.5 + 0.5 / 64 + 4 / 64 / 256
"""Bytes of a weight in nf4 with double quantisation: blocks of 64 with a scale in eight bits, whose own scales are float32."""


@dataclass(frozen=True)
class Held:
    """What is there all the time.

    trained    the model that trains; None where none does
    adapter    weights of its adapter; 0 where all of its own train
    quantised  whether the frozen weights under the adapter are held in four bits
    frozen     models that only score or sample
    width      bytes of a number at the compute type
    """

    trained: Shape | None
    adapter: int
    quantised: bool
    frozen: tuple[Shape, ...]
    width: int


def held_bytes(held: Held, devices: int) -> float:
    """Bytes on each of so many devices that share weights, gradients and moments evenly.

    What trains is held in float32 with its gradient and two moments; autocast keeps a copy of matrices at the compute type.
    """
    found = sum(float(one.parameters * held.width) for one in held.frozen)
    if held.trained is not None:
        if held.adapter:
            body = held.trained.body_parameters * (FOUR_BITS if held.quantised else held.width)
            rest = (held.trained.parameters - held.trained.body_parameters) * held.width
            found += body + rest + held.adapter * 16.0
        else:
            found += held.trained.parameters * (16.0 + (held.width if held.width < 4 else 0))
    return found / devices


@dataclass(frozen=True)
class Work:
    """What is there for a while.

    tokens      of one forward and backward pass; 0 where nothing trains
    rows        sequences that are decoded at once, and the length to which they grow
    width       bytes of a number at the compute type
    recomputed  whether activations are recomputed layer by layer (gradient checkpointing)
    logits      chunks of them at once: the student's, and where the loss compares distributions the teacher's
    """

    shape: Shape
    tokens: float
    rows: float
    length: float
    width: int
    recomputed: bool
    cuda: bool
    logits: int


def working_bytes(work: Work) -> float:
    """The larger of a training pass and of decoding, which take turns."""
    return max(pass_bytes(work), work.rows * work.length * work.shape.kv_cache_numbers * work.width)


def pass_bytes(work: Work) -> float:
    """Activations that a backward pass needs, and the loss stage's chunks of logits with the hidden states' gradient.

    Where a layer's activations are recomputed, it stands alone after the loss stage has ended. Of a layer and a token: what both
    norms keep and the residual stream (float32), the projections' outputs and normed heads, attention's inputs and output,
    and the gated MLP's four wide vectors.
    """
    if not work.tokens:
        return 0.0
    shape = work.shape
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    narrow = 4.0 * 6 * shape.hidden + work.width * (5 * query + 4 * keys)
    wide = work.width * 4.0 * shape.intermediate
    layer = narrow + wide
    chunk = min(CHUNK_ELEMENTS["cuda" if work.cuda else "cpu"], work.tokens * shape.vocabulary)
    beside = work.tokens * 3 * 4.0 * shape.hidden
    chunks = work.logits * float(chunk) * work.width
    if work.recomputed:
        return beside + work.tokens * 4.0 * shape.hidden * shape.layers + max(work.tokens * layer, chunks)
    return beside + work.tokens * layer * shape.layers + chunks
