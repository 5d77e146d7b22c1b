"""Validate the config of a saved LoRA adapter (peft's file format)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = frozenset({
    "r", "lora_alpha", "target_modules", "use_rslora", "bias", "peft_type", "task_type", "base_model_name_or_path",
    "peft_version", "inference_mode", "lora_dropout", "init_lora_weights", "revision",
})  # fmt: skip
"""Entries that are read here, or that have no effect once the adapter is trained."""
IGNORED = frozenset(
    {"layers_pattern", "megatron_core", "loftq_config", "runtime_config", "qalora_group_size", "auto_mapping"}
)
"""Entries that peft writes into every config and that only matter while an adapter is created."""


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Why an adapter is not a plain LoRA of linear layers; None if it is one. Unknown entries that are set are refused."""
    extra = sorted(
        key for key, value in config.items() if key not in READ | IGNORED and value not in (None, False, [], {}, "", 0)
    )
    base = config.get("base_model_name_or_path")
    if config.get("peft_type") != "LORA":
        return f"peft_type is {config.get('peft_type')!r:.40}"
    if extra:
        return f"it sets {extra[0]}, which is not supported here"
    if config.get("bias", "none") != "none":
        return "it trains biases"
    if not isinstance(base, str) or not base:
        return "it names no base model"
    if not isinstance(config.get("target_modules"), list):
        return "its target_modules is no list"
    return None
