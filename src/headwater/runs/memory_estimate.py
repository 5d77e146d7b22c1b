"""Estimate memory of training and sampling from model shapes alone, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from headwater.losses.fused_linear import CHUNK_ELEMENTS
from headwater.models.shape import Shape

FOUR_BITS = 0.5 + 0.5 / 64 + 4 / 64 / 256
"""Bytes of a weight in nf4 with double quantisation: blocks of 64 with a scale in eight bits, whose own scales are float32."""


@dataclass(frozen=True)
class PersistentMemory:
    """Weights, gradients and optimizer state, held all the time.

    trained    the model that trains; None where none does
    adapter    weights of its LoRA adapter; 0 where all of its own train
    quantized  whether the frozen weights under the adapter are in four bits
    frozen     models that only score or sample
    """

    trained: Shape | None
    adapter: int
    quantized: bool
    frozen: tuple[Shape, ...]
    bytes_per_value: int

    def bytes(self, devices: int) -> float:
        """Bytes on each of so many devices that share weights, gradients and moments evenly.

        Trained weights are float32 with a gradient and two moments; autocast keeps a copy of matrices in the compute dtype.
        """
        width = self.bytes_per_value
        total = sum(float(shape.parameters * width) for shape in self.frozen)
        if self.trained is not None and self.adapter:
            body = self.trained.body_parameters * (FOUR_BITS if self.quantized else width)
            rest = (self.trained.parameters - self.trained.body_parameters) * width
            total += body + rest + self.adapter * 16.0
        elif self.trained is not None:
            total += self.trained.parameters * (16.0 + (width if width < 4 else 0))
        return total / devices


@dataclass(frozen=True)
class WorkingMemory:
    """Activations and KV caches, held for a while.

    tokens     of one forward and backward pass; 0 where nothing trains
    rows       sequences that are decoded at once, and the `length` to which they grow
    recompute  whether activations are recomputed layer by layer (gradient checkpointing)
    logits     chunks of them at once: the student's, and where the loss compares distributions the teacher's
    """

    shape: Shape
    tokens: float
    rows: float
    length: float
    bytes_per_value: int
    recompute: bool
    cuda: bool
    logits: int

    def bytes(self) -> float:
        """The larger of a training pass and of decoding, which alternate."""
        return max(self.pass_bytes(), self.rows * self.length * self.shape.kv_cache_numbers * self.bytes_per_value)

    def pass_bytes(self) -> float:
        """Activations that a backward pass needs, and the loss's chunks of logits with the gradient of the hidden states.

        With recomputation one layer's activations exist at a time, after the loss's have been freed. Per layer and token: what
        both norms keep and the residual stream (float32), the projections' outputs and normed heads, attention's inputs and
        output, and the gated MLP's four wide vectors.
        """
        if not self.tokens:
            return 0.0
        shape, width = self.shape, self.bytes_per_value
        query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        layer = 4.0 * 6 * shape.hidden + width * (5 * query + 4 * keys) + width * 4.0 * shape.intermediate
        chunk = min(CHUNK_ELEMENTS["cuda" if self.cuda else "cpu"], self.tokens * shape.vocabulary)
        chunks = self.logits * float(chunk) * width
        hidden = self.tokens * 3 * 4.0 * shape.hidden
        if self.recompute:
            return hidden + self.tokens * 4.0 * shape.hidden * shape.layers + max(self.tokens * layer, chunks)
        return hidden + self.tokens * layer * shape.layers + chunks
