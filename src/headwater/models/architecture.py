"""Refuse the config of anything but a causal language model, and choose the attention implementation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from headwater.errors import UnsupportedModelError

CLASSIFIERS = re.compile(r"Classification|QuestionAnswering|MultipleChoice|Reward|NextSentence|WithValueHead")
"""Classes in `architectures` that score texts: their output layer gives no distribution over tokens."""
OTHER_INPUTS = ("vision", "image", "audio", "speech", "codec", "text_encoder")
"""In the name of a part of a config: it belongs to something that reads more than text."""
RANDOM_IN_TRAINING = {"reformer"}
"""Model types whose backward pass works only in training mode, where their dropout and hashing are drawn at random."""
WANTED = "name a causal language model (a decoder for text), such as Qwen3 or Llama"


def refuse_unknown(config: Mapping[str, Any], field: str, name: str) -> None:
    """Raises UnsupportedModelError if transformers has no code for the model type that a config.json names."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING and not config.get("auto_map"):
        raise UnsupportedModelError(
            f"{field}: {name} is a {kind:.80} model, which transformers {transformers.__version__} does not know; upgrade "
            f"transformers, or {WANTED}"
        )


def refuse_unsupported(config: Any, field: str, name: str) -> None:
    """Raises UnsupportedModelError unless a config describes a model that writes text from left to right.

    A model whose code the folder brings (`auto_map`) is judged when it is loaded.
    """
    for architecture in getattr(config, "architectures", None) or ():
        if CLASSIFIERS.search(str(architecture)):
            raise UnsupportedModelError(
                f"{field}: {name} is no language model (its config.json names {architecture!s:.80}); name a model whose architectures "
                "are …ForCausalLM"
            )
    kind = config.model_type
    model = f"{field}: {name} is a {kind} model"
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{model}, an encoder-decoder; {WANTED}")
    if kind in RANDOM_IN_TRAINING:
        raise UnsupportedModelError(f"{model}, which is random wherever it computes gradients; {WANTED}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{model}, for which transformers {transformers.__version__} has no causal language model; {WANTED}"
        )
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder:
        raise UnsupportedModelError(f"{model}, an encoder, with bidirectional attention; {WANTED}")
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    window, known = getattr(config, "keep_window_size", None), getattr(config, "max_position_embeddings", None)
    if window is not None and known is not None and window < known:
        raise UnsupportedModelError(
            f"{model}, whose attention beyond keep_window_size {window} tokens depends on later tokens; {WANTED}"
        )
    built = model_class.config_class or type(config)
    others = sorted(part for part in built.sub_configs if any(word in part for word in OTHER_INPUTS))
    if others:
        raise UnsupportedModelError(
            f"{model}, which reads more than text ({', '.join(others)}); save its language model alone, or {WANTED}"
        )
    text = config.get_text_config()
    sliding, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    used = getattr(text, "use_sliding_window", True) if kinds is None else "sliding_attention" in kinds
    if used and isinstance(sliding, int) and sliding < 1:  # transformers turns a window off for null only
        raise UnsupportedModelError(
            f"{model} whose sliding_window is {sliding}, so that no token attends to any; write null into its config.json for "
            "attention to all earlier tokens"
        )


def attention_of(config: Any) -> str | None:
    """The attention implementation to ask for; None is transformers' choice: `sdpa`, or `eager` for a model without it.

    transformers' `sdpa` leaves out a cap on attention scores (Gemma 2, VaultGemma).
    """
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def keep_weights_in_place(model: Any) -> None:
    """Stop RWKV from dividing its weights by powers of 2 when it is not in training mode: the divided ones would be saved."""
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0
