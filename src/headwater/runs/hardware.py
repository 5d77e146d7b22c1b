"""Constants for estimates: configurations of published models and peak rates of accelerators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "hidden_act": "silu",
    "attention_bias": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "bos_token_id": 151_643, "eos_token_id": 151_645,
}  # fmt: skip
_LLAMA3: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128_256, "head_dim": 128, "num_key_value_heads": 8, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009],
}  # fmt: skip
_QWEN25: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 151_936, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "bos_token_id": 151_643, "eos_token_id": 151_645,
}  # fmt: skip
_SMOLLM2: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 49_152, "num_key_value_heads": 3, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_QWEN3_MOE: dict[str, Any] = {
    **_QWEN3, "model_type": "qwen3_moe", "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip


def _sized(family: dict[str, Any], layers: int, hidden: int, heads: int, inner: int, tied: bool) -> dict[str, Any]:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    return {**family, **sizes, "tie_word_embeddings": tied}


MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _sized(_QWEN3, 28, 1024, 16, 3072, tied=True),
    "Qwen/Qwen3-1.7B": _sized(_QWEN3, 28, 2048, 16, 6144, tied=True),
    "Qwen/Qwen3-4B": _sized(_QWEN3, 36, 2560, 32, 9728, tied=True),
    "Qwen/Qwen3-8B": _sized(_QWEN3, 36, 4096, 32, 12_288, tied=False),
    "Qwen/Qwen3-14B": _sized(_QWEN3, 40, 5120, 40, 17_408, tied=False),
    "Qwen/Qwen3-30B-A3B": _sized(_QWEN3_MOE, 48, 2048, 32, 6144, tied=False),
    "Qwen/Qwen2.5-0.5B-Instruct": _sized(_QWEN25, 24, 896, 14, 4864, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _sized(_QWEN25, 28, 1536, 12, 8960, tied=True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _sized(_SMOLLM2, 30, 576, 9, 1536, tied=True),
    "meta-llama/Llama-3.2-1B-Instruct": {
        **_sized(_LLAMA3, 16, 2048, 32, 8192, tied=True),
        "head_dim": 64,
        "rope_parameters": {**_LLAMA3["rope_parameters"], "factor": 32.0},
    },
    "meta-llama/Llama-3.1-8B-Instruct": _sized(_LLAMA3, 32, 4096, 32, 14_336, tied=False),
    "meta-llama/Llama-3.3-70B-Instruct": _sized(_LLAMA3, 80, 8192, 64, 28_672, tied=False),
}
"""Hub id -> fields of its published config.json that determine shape, positions and special tokens."""


@dataclass(frozen=True)
class Device:
    """Datasheet of one accelerator: dense bfloat16 FLOP/s with float32 accumulation, bytes of memory, bytes per second."""

    flops: float
    memory: float
    bandwidth: float
    source: str


DEVICES: dict[str, Device] = {
    "b200": Device(2250e12, 180 * 2**30, 8.0e12, "NVIDIA HGX B200, per GPU"),
    "h200": Device(989.4e12, 140 * 2**30, 4.8e12, "NVIDIA H200 SXM datasheet"),
    "h100": Device(989.4e12, 80 * 2**30, 3.35e12, "NVIDIA H100 SXM datasheet"),
    "a100-80": Device(312e12, 80 * 2**30, 2.039e12, "NVIDIA A100 80GB SXM datasheet"),
    "a100-40": Device(312e12, 40 * 2**30, 1.555e12, "NVIDIA A100 40GB SXM datasheet"),
    "l40s": Device(362e12, 48 * 2**30, 0.864e12, "NVIDIA L40S datasheet"),
    "rtx4090": Device(165.2e12, 24 * 2**30, 1.008e12, "NVIDIA Ada architecture whitepaper"),
    "rtx3090": Device(71e12, 24 * 2**30, 0.936e12, "NVIDIA Ampere GA102 whitepaper"),
}
UTILISATION = 0.4
"""Assumed share of peak FLOP/s of scoring, forward and backward passes; well-tuned trainers report 0.3 to 0.5."""
BANDWIDTH_SHARE = 0.6
"""Assumed share of peak memory bandwidth of decoding."""
