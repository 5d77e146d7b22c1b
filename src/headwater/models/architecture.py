"""What kind of model a config describes: refuse all but causal language models, and choose how a model computes."""

from __future__ import annotations

import re
from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from headwater.errors import UnsupportedModelError

CLASSIFIERS = re.compile(r"Classification|QuestionAnswering|MultipleChoice|Reward|NextSentence|WithValueHead")
"""Classes in `architectures` that score texts: their output layer gives no distribution over tokens."""
OTHER_INPUTS = ("vision", "image", "audio", "speech", "codec", "text_encoder")
"""In the name of a part of a config: it belongs to something that reads more than text."""
RANDOM = ("drop", "jitter")
"""In the name of a number that makes a model in training mode random: dropout, layerdrop, resid_pdrop, router_jitter_noise, …"""
WANTED = "name a causal language model (a decoder for text), such as Qwen3 or Llama"


def refuse_unsupported(config: Any, field: str, name: str) -> None:
    """Raises UnsupportedModelError unless a config describes a model that writes text from left to right.

    A model whose code the folder brings (`auto_map`) is judged when it is loaded.
    """
    classifier = next((one for one in getattr(config, "architectures", None) or () if CLASSIFIERS.search(str(one))), None)
    if classifier is not None:
        raise UnsupportedModelError(
            f"{field}: {name} is no language model (its config.json names {classifier:.80}); name a model whose architectures are "
            "…ForCausalLM"
        )
    kind = config.model_type
    model = f"{field}: {name} is a {kind} model"
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{model}, an encoder with a decoder; {WANTED}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{model}, of which transformers {transformers.__version__} has no causal language model; {WANTED}"
        )
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder:
        raise UnsupportedModelError(f"{model}, an encoder, whose tokens see later tokens; {WANTED}")
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    built = model_class.config_class or type(config)
    others = sorted(part for part in built.sub_configs if any(word in part for word in OTHER_INPUTS))
    if others:
        raise UnsupportedModelError(
            f"{model}, which reads more than text ({', '.join(others)}); save its language model alone, or {WANTED}"
        )


def attention_of(config: Any) -> str | None:
    """The attention implementation to ask for; None is transformers' choice: `sdpa`, or `eager` for a model without it.

    transformers' `sdpa` leaves out a cap on attention scores (Gemma 2, VaultGemma).
    """
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def disable_randomness(model: Any) -> None:
    """Set every dropout and jitter to 0: with them the trainer's log-probs would differ from the sampler's.

    Some models read the numbers from their config, some from attributes of their layers, some have Dropout modules.
    """
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    for owner in (*model.modules(), *configs.values()):
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and any(word in name for word in RANDOM):
                setattr(owner, name, 0.0)
        if isinstance(owner, nn.modules.dropout._DropoutNd):
            owner.p = 0.0


def keep_weights_in_place(model: Any) -> None:
    """Stop RWKV from dividing its weights by powers of 2 when it is not in training mode: the divided ones would be saved."""
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0
