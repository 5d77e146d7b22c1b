"""The numbers of a model's shape that decide its cost; from its config alone, without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoConfig


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's shape that decide its cost; from its config alone, without its weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool

    @staticmethod
    def of(where: str, trust_remote_code: bool = False) -> Shape:
        found = Shape.from_config(AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code))
        for name, value in vars(found).items():
            if not isinstance(value, int) or (value < 1 and name != "tied"):
                raise ValueError(f"{name} is {value!r:.40}")
        return found

    @staticmethod
    def known(fields: Mapping[str, Any]) -> Shape:
        """From the fields of a config.json."""
        return Shape.from_config(AutoConfig.for_model(**fields))

    @staticmethod
    def from_config(held: Any) -> Shape:
        held = held.get_text_config()
        heads = held.num_attention_heads
        return Shape(
            layers=held.num_hidden_layers,
            hidden=held.hidden_size,
            heads=heads,
            kv_heads=getattr(held, "num_key_value_heads", None) or heads,
            head_dim=getattr(held, "head_dim", None) or held.hidden_size // heads,
            inner=getattr(held, "intermediate_size", None) or 4 * held.hidden_size,
            vocabulary=held.vocab_size,
            tied=bool(held.tie_word_embeddings),
        )

    @property
    def body_parameters(self) -> int:
        """Weights of the layers' matrices: attention and gated MLP."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def matrix_parameters(self) -> int:
        """Weights that multiply every token: the layers' and the head's; embeddings are looked up, not multiplied."""
        return self.body_parameters + self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        return self.matrix_parameters + (0 if self.tied else self.hidden * self.vocabulary)

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The matrices of a layer, (inputs, outputs), under the names that Qwen3 and Llama give them."""
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def cache_numbers(self) -> int:
        """Numbers that a decoder keeps for every token: a key and a value of each layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def adapter_parameters(self, rank: int, targets: Sequence[str] | None) -> int:
        """Weights of low-rank adapters beside these matrices of every layer; None stands for all of them."""
        chosen = [sizes for name, sizes in self.linear.items() if targets is None or name in targets]
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in chosen)

    def flops(self, tokens: float, context: float, passes: Literal[1, 3] = 1, adapter: int = 0) -> float:
        """Floating-point operations of a forward pass (1) or a forward and backward pass (3) over `tokens` tokens.

        Two for each matrix weight and token, and 4·layers·heads·head_dim a token and each earlier token it attends to;
        `context` is the mean number of those. A backward pass costs twice the forward one; where only an adapter of so many
        weights trains, the matrices need no gradient of their own, so it costs them once the forward one.
        """
        attention = 4.0 * self.layers * self.heads * self.head_dim * context
        if not adapter:
            return passes * tokens * (2.0 * self.matrix_parameters + attention)
        over_matrices = 1 if passes == 1 else 2
        return tokens * (over_matrices * 2.0 * self.matrix_parameters + passes * (attention + 2.0 * adapter))
