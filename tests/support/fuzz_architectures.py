"""Fuzz cases of small models of every architecture that transformers has, with legal and illegal settings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from architectures import MLA, MOE
from fuzz_models import compare, opened, small_model
from fuzz_recipes import prepare, small
from headwater.config.builtin import find_recipe
from headwater.config.stage import Sampling
from headwater.models.policy import Policy
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.scoring import logp_of
from headwater.types import problem_id
from malformed_inputs import mutated
from tools.pretrain.pocket import make_tokenizer

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_NUMBERS = 1_000_000
"""Weights of a model that is built; of a larger one only the config is written."""
COMMON: dict[str, Any] = {
    "head_dim": 8,
    "n_layer": 2,
    "num_layers": 2,
    "sliding_window": None,
    "hidden_size_per_layer_input": 8,
}
STATE = {
    "state_size": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_num_heads": 8,
    "num_heads": 8, "n_groups": 2, "chunk_size": 8, "lru_width": 32,
}  # fmt: skip
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 500.0}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
     "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4,
     "original_max_position_embeddings": 16},
    {"rope_type": "nope", "factor": -1}, {"rope_type": "yarn"},
]  # fmt: skip
ODD: dict[str, list[Any]] = {
    "num_attention_heads": [1, 2, 3, 5, 0, -1], "num_key_value_heads": [1, 4, 3, 0, None], "hidden_size": [16, 33, 0],
    "head_dim": [4, 7, 16, None], "num_hidden_layers": [1, 3, 0], "vocab_size": [29, 31, 64, 1], "intermediate_size": [1, 24, 0],
    "tie_word_embeddings": [True, False], "sliding_window": [4, 0, 1, None], "use_sliding_window": [True], "rope_parameters": ROPES,
    "layer_types": [
        ["full_attention"] * 2, ["sliding_attention", "full_attention"], ["linear_attention", "full_attention"],
        ["conv", "full_attention"], ["full_attention"], ["nothing"] * 2,
    ],
    "attention_bias": [True], "max_position_embeddings": [8, 16, 1], "hidden_act": ["gelu", "relu2", "nope"], "is_decoder": [True],
    "attention_dropout": [0.5], "dropout": [0.5], "partial_rotary_factor": [0.5, 0.1], "num_experts_per_tok": [1, 4, 9],
    "attn_logit_softcapping": [20.0], "final_logit_softcapping": [5.0], "logits_scaling": [2.0], "alibi": [True],
    "eos_token_id": [[3, 4], 99],
    "pad_token_id": [None, 40], "rms_norm_eps": [1e-3], "dtype": ["bfloat16", "float16"],
}  # fmt: skip
"""Settings, legal and illegal ones, that a config may get."""


def some_settings(draw: random.Random) -> dict[str, Any]:
    settings = dict(COMMON)
    for group in (MOE, MLA, STATE, DELTA):
        settings |= group if draw.random() < (0.7 if group is MOE else 0.3) else {}
    for name in draw.sample(list(ODD), draw.choice([0, 1, 1, 2, 4])):
        settings[name] = draw.choice(ODD[name])
    return settings


def architecture(draw: random.Random, folder: Path) -> str:
    """A small model of some architecture. If it loads, trainer and sampler give the log-probs of plain transformers."""
    kind, settings, target = draw.choice(KINDS), some_settings(draw), folder / "m"
    torch.manual_seed(draw.randrange(2**31))
    make_tokenizer().save_pretrained(target)
    try:
        with torch.device("meta"):
            numbers = sum(weight.numel() for weight in small_model(kind, settings).parameters())
        model = small_model(kind, settings) if numbers <= MOST_NUMBERS else None
        if model is not None:
            model.save_pretrained(target)
    except Exception:  # settings that transformers refuses
        model = None
    if model is None:
        (target / "config.json").write_text(
            json.dumps({"model_type": kind, "vocab_size": 30, **settings}), encoding="utf-8"
        )
        weights = {
            f"model.layers.{layer}.weight": torch.zeros(64, 64) for layer in range(8)
        }  # enough for the config's sizes
        save_file(weights, target / "model.safetensors")
    elif draw.random() < 0.2:
        path = target / "config.json"
        path.write_text(json.dumps(mutated(draw, json.loads(path.read_bytes()), 2)), encoding="utf-8")
        model = None
    raw = small("pocket")
    raw["models"]["student"] = raw["models"]["teacher"] = str(target)
    (folder / "r.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    prepare(find_recipe(str(folder / "r.yaml"), []), "direct_grpo", folder, draw.random() < 0.03)
    policy = opened(target, frozen=draw.random() < 0.5)
    if model is None or policy.vocabulary < len(make_tokenizer()):  # the doctor refuses a vocabulary that is too small
        return "loaded, unlike it was built"
    compare_with_transformers(policy, target, f"{kind} with {settings}")
    return "loaded"


def compare_with_transformers(policy: Policy, folder: Path, what: str) -> None:
    """Sample three prompts of different lengths in one batch; score the completions in one; compare both with single rows."""
    prompts = [(1, 6, 15, 7, 2), (1, 14, 2), (1, 5, 5, 15, 13, 11, 15, 6, 2)]
    wanted = requests_for([(problem_id(str(prompt)), prompt) for prompt in prompts], 1, 0, "fuzz")
    rollouts = TorchSampler(policy).sample(wanted, Sampling(max_tokens=4))
    scored = torch.cat(logp_of(policy, rollouts, 64))
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    logps = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        start = len(rollout.prompt_ids)
        with torch.no_grad():
            logp = plain(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float().log_softmax(-1)
        logps.append(logp.gather(1, ids[0, start:, None])[:, 0])
    compare(scored, torch.cat(logps), f"trainer, {what}")
    compare(
        torch.tensor([logp for rollout in rollouts for logp in rollout.sampler_logp]),
        torch.cat(logps),
        f"sampler, {what}",
    )
