"""Estimate memory of training from model shapes alone, in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from headwater.losses.fused_linear import CHUNK_ELEMENTS
from headwater.models.shape import Shape

FOUR_BITS = 0.5 + 0.5 / 64 + 4 / 64 / 256
"""Bytes of a weight in nf4 with double quantisation: blocks of 64 with a scale in eight bits, whose own scales are float32."""


@dataclass(frozen=True)
class ModelBytes:
    """Bytes that a node holds from its start to its end.

    weights    of the model that trains, with the copy in the compute dtype that autocast keeps of float32 ones
    optimizer  gradients and two moments
    frozen     models that only score or sample: teachers, a reference
    heads      output layers among `frozen`, of which every device holds a whole one
    """

    weights: float = 0.0
    optimizer: float = 0.0
    frozen: float = 0.0
    heads: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.frozen


def model_bytes(
    trained: Shape | None, adapter: int, quantized: bool, frozen: Iterable[Shape], width: int
) -> ModelBytes:
    """Weights, gradients and optimizer state, all devices together.

    trained    the model that trains; None where none does
    adapter    weights of its LoRA adapter; 0 where all of its own train
    quantized  whether the frozen weights under the adapter are in four bits
    frozen     models that only score or sample
    width      bytes of a value in the compute dtype

    Trained weights are float32 with a gradient and two moments; autocast keeps a copy of matrices in the compute dtype. Four bits
    reach the linear layers and not the head, nor experts that are stacked in one tensor.
    """
    shapes = list(frozen)
    scored = sum(float(shape.parameters * width) for shape in shapes)
    heads = sum(float(head_parameters(shape) * width) for shape in shapes)
    if trained is None:
        return ModelBytes(frozen=scored, heads=heads)
    if adapter:
        linear = trained.linear_parameters * (FOUR_BITS if quantized else width)
        weights = linear + (trained.parameters - trained.linear_parameters) * width + adapter * 4.0
        return ModelBytes(weights, adapter * 12.0, scored, heads)
    return ModelBytes(
        trained.parameters * (4.0 + (width if width < 4 else 0)), trained.parameters * 12.0, scored, heads
    )


def head_parameters(shape: Shape) -> int:
    """Weights of the output layer, which may be the embedding's."""
    return shape.hidden * shape.vocabulary


def gathered_bytes(trained: Shape, width: int) -> float:
    """What FSDP2 gathers on each device during a training pass: embedding, head and norms, and one layer at a time."""
    layers = trained.matrix_parameters - head_parameters(trained)
    return float(width * (trained.parameters - layers + layers / max(1, trained.layers)))


def whole_copy_bytes(shape: Shape, width: int, trains: bool) -> float:
    """All weights on one device, as the embedded sampler of several devices gathers them.

    Matrices of linear layers are gathered in the compute dtype. The others, above all the embedding, are in the type that they are
    stored in (float32 where all weights train), and the decoder holds another copy in the compute dtype.
    """
    head = head_parameters(shape)
    tied = shape.parameters - shape.linear_parameters < 2 * head
    matrices = shape.linear_parameters + (0 if tied else head)
    others = 4.0 + (width if width < 4 else 0) if trains else float(width)
    return matrices * float(width) + (shape.parameters - matrices) * others


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device, by part. Sampling and training take turns, or with `both` go on at once (`compute.overlap`).

    weights, optimizer, frozen  this device's shards of `ModelBytes`
    sampler      what samples: a whole copy of the weights on several devices, or vLLM's share of the device
    kv_cache     of the embedded sampler; vLLM's is in its share
    gathered     weights of other devices' shards during a training pass
    activations  of a microbatch
    """

    weights: float
    optimizer: float
    frozen: float
    sampler: float
    kv_cache: float
    gathered: float
    activations: float
    both: bool = False

    @property
    def peak(self) -> float:
        sampling, training = self.sampler + self.kv_cache, self.gathered + self.activations
        turns = sampling + training if self.both else max(sampling, training)
        return self.weights + self.optimizer + self.frozen + turns

    def row(self) -> dict[str, float]:
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "both"}


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
