"""Convert a GGUF file to a transformers model folder: config, tokenizer, generation config and safetensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Gemma3TextConfig, GenerationConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from headwater.errors import UserError

LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Gemma 3's four norms of a layer: `ffn_norm` comes before the MLP there, under another name."""


def convert(gguf: Path, folder: Path, stop_ids: tuple[int, ...]) -> None:
    """Write the model folder in bfloat16. `config.json` comes last, so that a folder with one is complete.

    The three models tie the head to the embedding. A separate `output.weight`, where there is one, is the same matrix in more bits and
    takes the place of both.

    Raises UserError for an architecture that is not known here.
    """
    reader = GGUFReader(gguf)
    architecture = _contents(reader, "general.architecture")
    if architecture not in CONFIGS:
        raise UserError(f"{gguf}: holds a model of architecture {architecture}; known are {', '.join(CONFIGS)}")

    def field(name: str) -> Any:
        return _contents(reader, f"{architecture}.{name}")

    config = _config(architecture, field)
    config.vocab_size = next(int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == "token_embd.weight")
    config.tie_word_embeddings = True
    config.dtype = torch.bfloat16
    folder.mkdir(parents=True, exist_ok=True)
    adds_bos = _contents(reader, "tokenizer.ggml.add_bos_token")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, add_bos_token=bool(adds_bos))
    tokenizer.save_pretrained(folder)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, stop_ids[0]
    config.pad_token_id = tokenizer.pad_token_id
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(stop_ids), pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in _weights(reader, architecture, config)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [ARCHITECTURES[architecture]]
    config.save_pretrained(folder)


def _contents(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _weights(reader: Any, architecture: str, config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """transformers' name and float32 values of every tensor."""
    names = {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight" and "output.weight" in names:
            continue
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if architecture == "gemma3" and tensor.name.endswith("norm.weight"):
            values -= 1.0  # GGUF stores the factor, transformers what is added to 1
        if architecture == "llama" and (part := re.search(r"attn_([qk])\.weight", tensor.name)):
            heads = config.num_attention_heads if part[1] == "q" else config.num_key_value_heads
            values = _uninterleaved(values, heads)
        yield _name(tensor.name, architecture), values


def _uninterleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix in transformers' order: each head's first halves of the rotary pairs, then the second halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _name(gguf_name: str, architecture: str) -> str:
    if gguf_name in ("token_embd.weight", "output.weight"):
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, kind = gguf_name.split(".")
    names = LAYER_TENSORS | (GEMMA_NORMS if architecture == "gemma3" else {})
    return f"model.layers.{layer}.{names[part]}.{kind}"


CONFIGS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma3": Gemma3TextConfig}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gemma3": "Gemma3ForCausalLM"}


def _config(architecture: str, field: Callable[[str], Any]) -> PretrainedConfig:
    """transformers' config from the fields of a GGUF file; of Gemma 3 that of its text model."""
    rope = {"rope_type": "default", "rope_theta": field("rope.freq_base")}
    fields: dict[str, Any] = {
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": round(field("attention.layer_norm_rms_epsilon"), 12),
        "rope_parameters": rope,
    }
    if architecture == "gemma3":  # every sixth layer attends to the whole context, the others to a window
        width = field("attention.key_length")
        fields |= {
            "head_dim": width,
            "query_pre_attn_scalar": width,
            "sliding_window": field("attention.sliding_window"),
            "rope_parameters": {
                "full_attention": rope,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        }
    return CONFIGS[architecture](**fields)
