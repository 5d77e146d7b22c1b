"""Architectures of the fast decoder: one table, and the description of a single model that follows from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
LAYER_TYPES = ("full_attention", "sliding_attention")
STATIC_ROPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose angles depend on the position alone; `longrope` also depends on the length (`models.rope`)."""


@dataclass(frozen=True)
class Architecture:
    """How a model type differs from Llama. The norms are names of modules in a transformers layer; None: no norm there.

    attention_norm, attention_out_norm  of the attention's input, and of its output before it is added
    mlp_norm, mlp_out_norm              the same for the MLP
    norm_offset    added to the weight of every norm
    float32_norms  weights of norms multiply in float32, also in bfloat16 models
    windowed       the types of layers that have the config's sliding window
    rope_types     kinds of RoPE scaling that the decoder computes as transformers does
    activation     the config's field that names it
    fields         further fields of the config that the model type reads; others ignore them if they are there
    """

    attention_norm: str | None = "input_layernorm"
    attention_out_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_out_norm: str | None = None
    norm_offset: float = 0.0
    float32_norms: bool = False
    windowed: tuple[str, ...] = ()
    rope_types: tuple[str, ...] = STATIC_ROPES
    activation: str = "hidden_act"
    fields: tuple[str, ...] = ()

    def field(self, config: Any, name: str, default: Any) -> Any:
        return getattr(config, name, default) if name in self.fields else default


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(windowed=LAYER_TYPES),
    "qwen2": Architecture(windowed=("sliding_attention",)),
    "qwen3": Architecture(windowed=("sliding_attention",)),
    "smollm3": Architecture(windowed=("sliding_attention",), fields=("no_rope_layers",)),
    "phi3": Architecture(
        windowed=LAYER_TYPES, rope_types=(*STATIC_ROPES, "longrope"), fields=("partial_rotary_factor",)
    ),
    "gemma3_text": Architecture(
        attention_out_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out_norm="post_feedforward_layernorm",
        norm_offset=1.0,
        float32_norms=True,
        windowed=("sliding_attention",),
        activation="hidden_activation",
        fields=("query_pre_attn_scalar",),
    ),
    "olmo2": Architecture(
        attention_norm=None,
        attention_out_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_out_norm="post_feedforward_layernorm",
        float32_norms=True,
    ),
}
"""Model type of transformers -> what is special about it. Biases, fused projections and QK norms are read from the modules."""


@dataclass(frozen=True)
class DecoderSpec:
    """What the fast decoder has to know of one model besides its weights.

    width         of a head
    rotary_width  leading dimensions of each head that RoPE rotates
    query_scale   factor of the queries, where scores are not divided by √width
    windows       per layer, how many tokens a token attends to, itself included; None for all
    ropes         per layer, the name of its RoPE parameters ("" for a model with one set), or None without positions
    """

    architecture: Architecture
    heads: int
    kv_heads: int
    width: int
    rotary_width: int
    eps: float
    activation: str
    query_scale: float
    windows: tuple[int | None, ...]
    ropes: tuple[str | None, ...]


def decoder_spec(config: Any) -> DecoderSpec | None:
    """The description of a model of this config; None where the fast decoder would compute something else."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None or getattr(config, architecture.activation, None) not in ACTIVATIONS:
        return None
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "attn_logit_softcapping", None):
        return None
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    types = getattr(config, "layer_types", None) or ["full_attention"] * layers
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = {key: value for key, value in parameters.items() if isinstance(value, Mapping)} or {"": parameters}
    # transformers 5.19 fails on the second long batch of a model with `longrope` for one of several kinds of layers.
    rope_types = architecture.rope_types if "" in sets else STATIC_ROPES
    if set(types) - set(LAYER_TYPES) or any(
        rope.get("rope_type", "default") not in rope_types for rope in sets.values()
    ):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotary = parameters.get("partial_rotary_factor", 1.0) if "partial_rotary_factor" in architecture.fields else 1.0
    query_scalar = architecture.field(config, "query_pre_attn_scalar", width)
    window = getattr(config, "sliding_window", None)
    has_positions = architecture.field(config, "no_rope_layers", [1] * layers)
    return DecoderSpec(
        architecture=architecture,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        width=width,
        rotary_width=int(width * rotary),
        eps=config.rms_norm_eps,
        activation=getattr(config, architecture.activation),
        query_scale=(width / query_scalar) ** 0.5,
        windows=tuple(window if kind in architecture.windowed else None for kind in types),
        ropes=tuple(
            None if not has else "" if "" in sets else kind for has, kind in zip(has_positions, types, strict=True)
        ),
    )
