"""Read the files of a saved LoRA adapter (peft's format): which can be merged, each layer's scaling, names of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before every name in an adapter's file."""
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts that torch.compile, FSDP and checkpointing add to names, and that some trainers leave in the file."""
PAIRED = ("lora_A", "lora_B")
CAUSAL_LM = ("CAUSAL_LM", None, "")

UNCHANGED_BASE = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights (in lower case) that leave the base weights as they are. All others of peft subtract the new
adapter's product from the base, or quantize it, and no file of the adapter holds the base that results."""
READ = frozenset({
    "r", "lora_alpha", "target_modules", "use_rslora", "bias", "peft_type", "task_type", "base_model_name_or_path",
    "init_lora_weights", "revision", "rank_pattern", "alpha_pattern", "use_dora", "modules_to_save", "lora_bias",
    "target_parameters", "trainable_token_indices", "fan_in_fan_out",
})  # fmt: skip
"""Entries that decide how the adapter is merged."""
IGNORED = frozenset({
    "peft_version", "inference_mode", "lora_dropout", "layers_pattern", "layers_to_transform", "exclude_modules",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "qalora_group_size", "auto_mapping",
})  # fmt: skip
"""Entries that only matter while an adapter is created or trained: the weights in the file say which layers have one."""
PATTERN = re.compile(r"[\w.^$\\|()*+\[\]-]{1,200}")
"""Characters of a rank_pattern or alpha_pattern that is evaluated."""
MAX_PATTERNS = 4096
"""Most of them in one entry: each is matched against each layer."""
MAX_CHOICES = 4
"""Most repetitions and groups in one: a match may try every combination of their lengths and alternatives."""


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Why an adapter cannot be used, with the remedy; None if it can be. Unknown entries that are set are refused."""
    extra = sorted(
        key for key, value in config.items() if key not in READ | IGNORED and value not in (None, False, [], {}, "", 0)
    )
    base, task, start = (config.get(key) for key in ("base_model_name_or_path", "task_type", "init_lora_weights"))
    rank, alpha = config.get("r"), config.get("lora_alpha")
    elsewhere = "merge it where it was trained (peft's merge_and_unload) and name the merged folder"
    if config.get("peft_type") != "LORA":
        return f"peft_type is {config.get('peft_type')!r:.40}, and only LORA is read; {elsewhere}, if peft can merge it"
    if str(start).lower() not in UNCHANGED_BASE:
        return (
            f"init_lora_weights is {start!r:.40}: it was trained on changed base weights, which its files do not hold; save it "
            f"with peft's path_initial_model_for_weight_conversion, or {elsewhere}"
        )
    if extra:
        return f"it sets {extra[0]!r:.80}, which is not supported here; {elsewhere}, if peft can merge it"
    if task not in CAUSAL_LM:
        return f"task_type is {task!r:.40}, so it is not a language model; name an adapter of task_type CAUSAL_LM"
    if not isinstance(base, str) or not base:
        return "it names no base model; write the base's folder as base_model_name_or_path into adapter_config.json"
    if config.get("revision") not in (None, "", "main"):
        return (
            f"it refers to revision {config['revision']!r:.60} of its base; download that revision and write its folder as "
            "base_model_name_or_path, without revision, into adapter_config.json"
        )
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not _is_number(alpha):
        return f"it says r {rank!r:.40} and lora_alpha {alpha!r:.40}, which must be a positive integer and a number"
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if not isinstance(config.get(key), bool | None):
            return f"its {key} is {config[key]!r:.40}, which must be true or false"
    for key in ("modules_to_save", "target_parameters"):
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            return f"its {key} is {names!r:.40}, which must be a list of names"
    return _unsupported_pattern(config)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _unsupported_pattern(config: Mapping[str, Any]) -> str | None:
    """Why a rank_pattern or alpha_pattern is not evaluated: a hostile regular expression can run for years."""
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            return f"its {field} is no mapping"
        if len(patterns) > MAX_PATTERNS:
            return f"its {field} holds {len(patterns):,} entries; at most {MAX_PATTERNS:,} are evaluated"
        for pattern, value in patterns.items():
            if not _is_number(value) or value <= 0:
                return f"its {field} gives {value!r:.40} for {pattern!r:.80}; it must be a positive number"
            choices = len(re.findall(r"[*+(]", pattern))
            safe = PATTERN.fullmatch(pattern) and choices <= MAX_CHOICES and not re.search(r"\)[*+]", pattern)
            try:
                re.compile(pattern)
            except re.error:
                safe = None
            if not safe:
                return (
                    f"its {field} holds {pattern!r:.80}, which is not evaluated here; write the layers' names instead"
                )
    return None


def rank_and_scaling(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """(r, factor of the product) of the layer of that dotted name, as peft reads them from the config."""
    rank = int(_for_layer(config.get("rank_pattern"), path, config["r"]))
    alpha = _for_layer(config.get("alpha_pattern"), path, config["lora_alpha"])
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _for_layer(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    matching = (value for pattern, value in (patterns or {}).items() if _end_of_path(pattern).match(path))
    return next(matching, default)


@cache  # that of `re` holds 512, and each pattern meets each layer
def _end_of_path(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def read_weights(path: Path) -> dict[str, Tensor]:
    """An adapter file's tensors by peft's own names without its prefix, such as `model.layers.0.self_attn.q_proj.lora_A.weight`.

    Names that a wrapper or another way of saving has changed are restored. Raises ValueError if two of them become equal.
    """
    tensors = load_file(path)
    restored = {_plain_name(name): tensor for name, tensor in tensors.items()}
    if len(restored) < len(tensors):
        raise ValueError(f"{path.name} holds two adapters, or one twice")
    return restored


def _plain_name(name: str) -> str:
    """Example: `module.base_model.model.lm.q_proj.lora_A.default.weight` is `lm.q_proj.lora_A.weight`."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    if parts[0] == "module":  # DistributedDataParallel
        parts = parts[1:]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    if len(parts) > 3 and parts[-3] in PAIRED and parts[-1] in ("weight", "bias"):
        parts.pop(-2)  # the adapter's own name, which peft leaves out
    return ".".join(parts)
