"""Sizes of a model from its config alone, and the parameter and FLOP counts that follow.

The model is built on the meta device, where weights have shapes and no memory: the counts are those of the model that
transformers will run, whatever its architecture. 80 layers take about 0.3 s; each config is measured once per process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_USED = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts",
)  # fmt: skip
"""Config fields with the number of routed experts of a layer, and of those that each token is sent to."""
LAYER_KINDS = ("layer_types", "layers_block_type")
"""Config fields with the kind of each layer, for models in which not every layer has attention over all earlier tokens."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model that determine its cost.

    heads, kv_heads     of an attention layer; 0 in a model without attention
    key_dim, value_dim  width of one head's keys (and queries) and of its values
    attention_layers    layers whose cost grows with the context; a sliding window counts as a full one (an upper bound)
    kv_cache_numbers    elements of the KV cache per token
    intermediate        width of a gated MLP with as many weights as a layer uses for one token besides attention: the config's
                        `intermediate_size` in Qwen3 and Llama, that of all experts of a token together in Qwen3-MoE
    parameters          all weights: every expert, embeddings, head, norms, a vision tower
    matrix_parameters   weights of the decoder's matrices and of the head, which multiply tokens; an embedding is a lookup
    token_parameters    those of them that one token is multiplied with: of the routed experts, the ones that it is sent to
    experts_per_token   routed experts that a token is sent to; 0 in a model without experts
    experts_known       False where the config does not say how many: then all of them are in `token_parameters`
    linears             (name, inputs, outputs) of every linear layer except the head
    buffer_bytes        of tables that the model computes from its config and that are no weights, such as causal masks
    config              what it was measured on, so that the model can be built again (`empty_model`); None for a served model
    """

    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    attention_layers: int
    kv_cache_numbers: int
    intermediate: int
    parameters: int
    matrix_parameters: int
    token_parameters: int
    experts_per_token: float = 0.0
    experts_known: bool = True
    linears: tuple[tuple[str, int, int], ...] = ()
    buffer_bytes: int = 0
    config: Any = field(default=None, repr=False, compare=False)
    trust_remote_code: bool = False

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> Shape:
        """From the fields of a config.json."""
        return Shape.from_config(AutoConfig.for_model(**fields))

    @staticmethod
    def from_config(config: Any, trust_remote_code: bool = False) -> Shape:
        """From a transformers config. Raises ValueError for sizes that are no positive integers.

        trust_remote_code  whether a model whose code comes with its folder may be built
        """
        key = config_key(config)
        if key not in _MEASURED:
            _MEASURED[key] = _measure(config, trust_remote_code)
        return _MEASURED[key]

    @property
    def active_parameters(self) -> int:
        """All weights that one token uses, embeddings included; of the experts, only the routed ones."""
        return self.parameters - (self.matrix_parameters - self.token_parameters)

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers without the head: what four-bit quantization reaches."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    def adapter_parameters(self, rank: int, targets: Sequence[str] | None) -> int:
        """Weights of LoRA adapters of a rank on the linear layers with these names; None means all of them.

        Experts that are stacked in one tensor are not among them (`models.adapter_size` counts those too).
        """
        chosen = [
            inputs + outputs
            for name, inputs, outputs in self.linears
            if targets is None or any(f".{name}".endswith(f".{target}") for target in targets)
        ]
        return rank * sum(chosen)

    def flops(self, tokens: float, context: float, passes: Literal[1, 3] = 1, adapter: float = 0) -> float:
        """FLOPs of a forward pass (1) or a forward and backward pass (3) over `tokens` tokens.

        2 per matrix weight that a token uses, plus 2·attention_layers·heads·(key_dim + value_dim) per token and earlier token
        that it attends to; `context` is the mean number of those. A backward pass costs twice the forward pass. If only an
        adapter trains (`adapter` of its weights for a token), the base matrices need no gradient of their own, so their backward
        pass costs as much as their forward pass.
        """
        attention = 2.0 * self.attention_layers * self.heads * (self.key_dim + self.value_dim) * context
        if not adapter:
            return passes * tokens * (2.0 * self.token_parameters + attention)
        base_passes = 1 if passes == 1 else 2
        return tokens * (base_passes * 2.0 * self.token_parameters + passes * (attention + 2.0 * adapter))


_MEASURED: dict[str, Shape] = {}
"""Shapes by config."""


def config_key(config: Any) -> str:
    """Equal for configs that describe the same model."""
    return f"{type(config).__qualname__} {config.to_json_string(use_diff=False)}"


def empty_model(config: Any, trust_remote_code: bool) -> Any:
    """The model of a config on the meta device: weights with shapes and without memory."""
    # A copy of the config, because transformers writes the data type and the attention into it: a loaded model's own config must
    # keep its packed attention. The type is named because the config's would become the default of every thread meanwhile.
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code, dtype=torch.float32, attn_implementation="eager"
        )


def _measure(config: Any, trust_remote_code: bool) -> Shape:
    text = config.get_text_config()
    sizes = {"layers": text.num_hidden_layers, "hidden": text.hidden_size, "vocabulary": text.vocab_size}
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r:.40}")
    model = empty_model(config, trust_remote_code)
    decoder = (model.get_decoder() if hasattr(model, "get_decoder") else None) or model.base_model
    head = model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    total, used = _number(text, EXPERTS), _number(text, EXPERTS_USED)
    matrices, idle, mlp, experts = 0, 0.0, 0.0, False
    for name, parameter in decoder.named_parameters():
        if parameter.ndim < 2 or name.endswith("bias") or id(parameter) in looked_up or parameter is head_weight:
            continue
        share = 1.0
        if _is_of_experts(name, parameter, total):
            experts, share = True, min(1.0, used / (total or len(parameter))) if used else 1.0
        matrices += parameter.numel()
        idle += (1.0 - share) * parameter.numel()
        mlp += 0.0 if "att" in name else share * parameter.numel()
    matrices += 0 if head_weight is None else head_weight.numel()
    return Shape(
        **sizes,
        **_attention(text),
        intermediate=round(mlp / (3 * sizes["hidden"] * sizes["layers"])),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        matrix_parameters=matrices,
        token_parameters=matrices - round(idle),
        experts_per_token=(used or total or 1.0) if experts else 0.0,
        experts_known=not experts or used is not None,
        linears=tuple(
            (name, *_inputs_and_outputs(module))
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        ),
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        config=copy.deepcopy(config),
        trust_remote_code=trust_remote_code,
    )


def _attention(text: Any) -> dict[str, int]:
    """Sizes of attention, by their names in `Shape`; all 0 where the config has no attention heads."""
    # A size that differs by layer raises where it is read as an attribute, and is one of the layers' values here.
    fields = {**text.to_dict(), **{name: getattr(text, name) for name in text.attribute_map if hasattr(text, name)}}
    heads = fields.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        return dict.fromkeys(("heads", "kv_heads", "key_dim", "value_dim", "attention_layers", "kv_cache_numbers"), 0)
    kinds = next((kinds for name in LAYER_KINDS if (kinds := getattr(text, name, None))), None)
    layers = text.num_hidden_layers if kinds is None else sum(map(_attends, kinds))
    kv_heads = _key_value_heads(fields) or heads
    latent, nope, rope = (fields.get(name) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"))
    if latent and nope and rope:  # multi-head latent attention: one low-rank vector is cached for all heads
        key, cached = nope + rope, latent + rope
    else:
        key, cached = fields.get("head_dim") or text.hidden_size // heads, None
    value = fields.get("v_head_dim") or key
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "key_dim": key,
        "value_dim": value,
        "attention_layers": layers,
        "kv_cache_numbers": layers * (cached or kv_heads * (key + value)),
    }


def _key_value_heads(fields: Mapping[str, Any]) -> int | None:
    """Heads whose keys and values are kept, under the names that architectures give them; None where it is all of them."""
    if fields.get("multi_query") and not fields.get("new_decoder_architecture"):
        return 1  # Falcon-7B, GPT-BigCode
    nested = fields.get("attn_config")
    dbrx = nested.get("kv_n_heads") if isinstance(nested, dict) else None
    falcon = fields.get("num_kv_heads") if fields.get("new_decoder_architecture") else None
    return fields.get("num_key_value_heads") or falcon or dbrx


def _attends(kind: str) -> bool:
    return kind.startswith("hybrid") or ("attention" in kind and "linear" not in kind)


def _number(text: Any, names: Sequence[str]) -> float | None:
    """The first of these config fields that is set, the mean of one that lists layers; None where none is."""
    for section in (text, getattr(text, "ffn_config", None)):  # DBRX nests them
        for name in names:
            value = getattr(section, name, None)
            values = value if isinstance(value, (list, tuple)) else [value]
            if values and all(isinstance(number, int) and number > 0 for number in values):
                return sum(values) / len(values)
    return None


def _is_of_experts(name: str, parameter: torch.Tensor, total: float | None) -> bool:
    """Whether a weight belongs to routed experts: all of them stacked in one tensor, or one in a list of modules."""
    parts = name.split(".")
    stacked = (
        parameter.ndim == 3 and len(parameter) == total and min(parameter.shape) > 1
    )  # JetMoE has no module `experts`
    return ("experts" in parts and "router" not in parts) or stacked


def _inputs_and_outputs(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
