"""Model dimensions read from a config, and the parameter and FLOP counts that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoConfig


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder-only transformer that determine its cost."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> Shape:
        """From the fields of a config.json."""
        return Shape.from_config(AutoConfig.for_model(**fields))

    @staticmethod
    def from_config(config: Any) -> Shape:
        """From a transformers config. Raises ValueError for sizes that are no positive integers."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        shape = Shape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )
        for name, value in vars(shape).items():
            if not isinstance(value, int) or (value < 1 and name != "tied"):
                raise ValueError(f"{name} is {value!r:.40}")
        return shape

    @property
    def body_parameters(self) -> int:
        """Weights of all layers' matrices: attention and gated MLP."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.layer_matrices.values())

    @property
    def matrix_parameters(self) -> int:
        """Weights that multiply every token: layers and head, but not the embedding, which is a lookup."""
        return self.body_parameters + self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        return self.matrix_parameters + (0 if self.tied else self.hidden * self.vocabulary)

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """Qwen3's and Llama's name -> (inputs, outputs) of each matrix in a layer."""
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def kv_cache_numbers(self) -> int:
        """Elements of the KV cache per token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def adapter_parameters(self, rank: int, targets: Sequence[str] | None) -> int:
        """Weights of LoRA adapters of a rank on the named matrices of every layer; None means all of them."""
        chosen = [sizes for name, sizes in self.layer_matrices.items() if targets is None or name in targets]
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in chosen)

    def flops(self, tokens: float, context: float, passes: Literal[1, 3] = 1, adapter: int = 0) -> float:
        """FLOPs of a forward pass (1) or a forward and backward pass (3) over `tokens` tokens.

        2 per matrix weight and token, plus 4·layers·heads·head_dim per token and earlier token that it attends to; `context`
        is the mean number of those. A backward pass costs twice the forward pass. If only an adapter of `adapter` weights
        trains, the base matrices need no gradient of their own, so their backward pass costs as much as their forward pass.
        """
        attention = 4.0 * self.layers * self.heads * self.head_dim * context
        if not adapter:
            return passes * tokens * (2.0 * self.matrix_parameters + attention)
        base_passes = 1 if passes == 1 else 2
        return tokens * (base_passes * 2.0 * self.matrix_parameters + passes * (attention + 2.0 * adapter))
