"""Small models of many architectures, and how Headwater loads, samples and trains each, compared with plain transformers.

`python -m tests.support.architectures [NAME …]` prints the table of docs/models.md, or the rows of some models.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from headwater.config.lora import Lora
from headwater.config.recipe import Models
from headwater.config.stage import Sampling
from headwater.errors import HeadwaterError
from headwater.losses.batch import Row
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.lora import AdapterSpec
from headwater.models.policy import Policy
from headwater.sampling.base import requests_for
from headwater.sampling.decoder import fast_decoder_spec
from headwater.sampling.torch_sampler import TorchSampler
from headwater.types import Rollout, problem_id
from tests.support.tiny import CPU, PROMPTS
from tools.pretrain.pocket import make_tokenizer

OMIT = object()
"""A setting that an architecture's config does not take."""
CONFIG_ONLY: dict[str, Any] = {"config_only": True}
"""Refused before anything but the config is read."""
NO_HEADS = {"num_attention_heads": OMIT, "num_key_value_heads": OMIT, "head_dim": OMIT}
MOE = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
WINDOW = {"sliding_window": 4, "use_sliding_window": True}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
INDEX = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 4}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {**MOE, **MIXED}, "apertus": {}, "arcee": {}, "axk1": {**MLA, **MOE}, "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bart": CONFIG_ONLY, "bert": CONFIG_ONLY, "bert, is_decoder": {"is_decoder": True}, "big_bird": CONFIG_ONLY,
    "biogpt": {}, "bitnet": {}, "bloom": {},
    "codegen": {"rotary_dim": 4}, "cohere": {}, "cohere2, sliding window": MIXED, "cohere2_moe": MOE, "cpmant": {}, "ctrl": {},
    "cwm": {"bos_token_id": 1}, "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": {**MLA, **MOE}, "deepseek_v3": {**MLA, **MOE}, "deepseek_v32": {**MLA, **MOE, **INDEX}, "diffllama": {},
    "doge": {}, "dots1": {**MOE, "layer_types": ["full_attention"] * 2}, "ernie4_5": {},
    "ernie4_5_moe": {
        **MOE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    },
    "exaone4": MIXED, "exaone_moe": MOE, "falcon": {"head_dim": OMIT}, "falcon, alibi": {"head_dim": OMIT, "alibi": True},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64}, "falcon_mamba": {"state_size": 8, **NO_HEADS}, "flex_olmo": MOE, "gemma": {},
    "gemma2, sliding window": MIXED, "gemma3": CONFIG_ONLY, "gemma3_text, sliding window": MIXED,
    "gemma3n_text": {
        **MIXED, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "vocab_size_per_layer_input": 30, "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [64, 64],
    },
    "gemma4_text": {
        **MIXED, "vocab_size_per_layer_input": 30, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
    },
    "glm": {}, "glm4": {}, "glm4_moe": MOE, "glm4_moe_lite": {**MLA, **MOE}, "glm_moe_dsa": {**MLA, **MOE, **INDEX}, "gpt2": {},
    "gpt_bigcode": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4}, "gpt_neox": {},
    "gpt_oss, sliding window": {**MIXED, **MOE}, "gptj": {"rotary_dim": 4}, "granite": {}, "granitemoe": MOE,
    "granitemoehybrid": {**MAMBA, **MOE, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "granitemoeshared": MOE, "helium": {}, "hunyuan_v1_dense": {}, "hunyuan_v1_moe": MOE, "hy_v3": MOE, "jais2": {},
    "jamba": {
        **MOE, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "jetmoe": {}, "kimi_linear": {
        **MLA, **MOE,
        "linear_attn_config": {
            "kda_layers": [1], "full_attn_layers": [2], "num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4,
        },
    },
    "laguna": MOE, "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, "llama": {},
    "llama4_text, chunked": {**MOE, "attention_chunk_size": 4},
    "longcat_flash": {
        **MLA, **MOE, "num_layers": 1, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2,
    },
    "mamba": {"state_size": 8, **NO_HEADS}, 
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8, "num_attention_heads": OMIT},
    "mellum": MOE,
    "minicpm3": MLA, "mimo_v2_flash": {**MOE, "v_head_dim": 8},
    "minimax": {**MOE, "layer_types": ["linear_attention", "full_attention"], "block_size": 8}, "minimax_m2": MOE,
    "ministral": MIXED, "ministral3": {}, "mistral": {"sliding_window": None}, "mistral, sliding window": WINDOW, "mixtral": MOE,
    "modernbert-decoder": {"bos_token_id": 1}, "mpt": {}, "nanochat": {}, "nemotron": {},
    "nemotron_h": {
        **{key: value for key, value in MOE.items() if key not in ("n_group", "topk_group")}, "mamba_num_heads": 8,
        "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "layer_types": ["mamba", "attention"],
    },
    "olmo": {}, "olmo2": {}, "olmo3, sliding window": MIXED, "olmo_hybrid": DELTA, "olmoe": MOE, "openai-gpt": {},
    "opt": {"dropout": 0.1, "word_embed_proj_dim": 16}, "persimmon": {}, "phi": {}, "phi3": {"sliding_window": None},
    "phimoe": MOE, "qwen2": {}, "qwen2, sliding window": MIXED, "qwen2_moe": MOE, "qwen2_vl": CONFIG_ONLY,
    "qwen3": {}, "qwen3_5_moe_text": {**DELTA, **MOE},
    "qwen3_5_text": DELTA, "qwen3_moe": MOE, "qwen3_next": {**DELTA, **MOE}, "recurrent_gemma": {"lru_width": 32},
    "roberta": CONFIG_ONLY, "roberta, is_decoder": {"is_decoder": True}, "rwkv": NO_HEADS,
    "seed_oss": {}, "smollm3": {"no_rope_layers": [1, 0]}, "solar_open": MOE, "stablelm": {}, "starcoder2": {}, "t5": CONFIG_ONLY,
    "vaultgemma": MIXED, "xglm": {}, "xlstm": NO_HEADS, "youtu": MLA,
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 8, "mamba_headdim": 8,
        "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_key_value_heads": 4, "num_mem_blocks": 1,
        "head_dim": OMIT,
    },
}  # fmt: skip
"""Model type, and what is special about the small model -> settings of its config."""
EXACT = 2e-4
"""Largest difference of log-probs, in nats, and of gradients, relative to the largest, that rounding may cause."""


@dataclass(frozen=True)
class Outcome:
    """Result for one model. The texts are the table's cells; `gap` is 0 for a model that is refused.

    gap       largest |Δ log-prob| of trainer or sampler against transformers, each sequence alone
    gradient  largest difference of a gradient from transformers', relative to the largest gradient
    """

    name: str
    trains: str
    samples: str
    packs: str
    lora: str
    reason: str
    gap: float = 0.0
    gradient: float = 0.0

    def row(self) -> str:
        return f"| {self.name} | {self.trains} | {self.samples} | {self.packs} | {self.lora} | {self.reason} |"


HEADER = "| model type | trains | samples | packs | LoRA | reason |\n|---|---|---|---|---|---|"


def settings_of(name: str) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    common = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return {key: value for key, value in {**common, **ARCHITECTURES[name]}.items() if value is not OMIT}


def write_folder(name: str, folder: Path) -> None:
    """A small model of random weights, large enough that its distributions are far from uniform."""
    kind, tokenizer = name.partition(",")[0], make_tokenizer()
    tokenizer.save_pretrained(folder)
    if ARCHITECTURES[name] is CONFIG_ONLY:
        (folder / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings_of(name))).float().eval()
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if weight.dim() > 1 or (path.endswith("bias") and "norm" not in path):
                    weight.normal_(0.0, 0.3)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)


def outcome(name: str, folder: Path) -> Outcome:
    """Load the small model as a student, sample it, score what it sampled, and compare both with transformers."""
    write_folder(name, folder)
    opened = ModelFolder.open(str(folder), "models.student")
    models = Models(student=str(folder), teacher=str(folder))
    try:
        policy = load_policy(opened, LoadOptions(models, CPU, frozen=False))
    except HeadwaterError as error:
        reason = str(error).partition(" model, ")[2].partition(";")[0]
        return Outcome(name, "no", "no", "no", "no", reason)
    rollouts = sampled(policy)
    sampler_logp = torch.tensor([logp for rollout in rollouts for logp in rollout.sampler_logp])
    trainer_logp, trainer_gradient = trained(policy, rollouts)
    plain_logp, plain_gradient = transformers_logp(folder, rollouts)
    gap = max(float((logp - plain_logp).abs().max()) for logp in (sampler_logp, trainer_logp))
    largest = max(float(gradient.abs().max()) for gradient in plain_gradient.values())
    difference = (
        max(float((trainer_gradient[key] - plain_gradient[key]).abs().max()) for key in plain_gradient) / largest
    )
    exact = gap <= EXACT and difference <= EXACT and trainer_gradient.keys() == plain_gradient.keys()
    way, reason = sampling_of(policy)
    return Outcome(
        name,
        "exact" if exact else f"differs by {gap:.1g} nats, gradient {difference:.1g}",
        way,
        "yes" if policy.supports_packing else "no",
        lora_of(opened, models, rollouts, plain_logp),
        reason,
        gap,
        difference,
    )


def sampling_of(policy: Policy) -> tuple[str, str]:
    """(how the policy samples, its special properties)."""
    if fast_decoder_spec(policy) is not None:
        return "fast decoder", ""
    reasons = []
    if policy.model.config._attn_implementation == "eager" and hasattr(policy.model.config, "num_attention_heads"):
        reasons.append("eager attention")
    if not policy.supports_padding:
        reasons.append("only sequences of one length share a batch")
    ways = {
        "left_padded": "cache",
        "equal_lengths": "cache, prompts of one length in a batch",
        "recompute": "without cache",
    }
    return ways[policy.decoding], ", ".join(reasons)


def sampled(policy: Policy) -> list[Rollout]:
    wanted = requests_for([(problem_id(str(prompt)), prompt) for prompt in PROMPTS], 2, 0, "test")
    return TorchSampler(policy, batch=6).sample(wanted, Sampling(max_tokens=7))


def trained(policy: Policy, rollouts: list[Rollout]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of all completion tokens in the trainer's batches, in order of the rollouts, and the gradient of their sum."""
    logps: dict[tuple[str, int], Tensor] = {}
    policy.model.zero_grad(set_to_none=True)
    for rows, batch in policy.batches([Row(rollout) for rollout in rollouts], 40):
        logits_NV = policy.logits(policy.completion_hidden(batch)).float()
        logp_N = logits_NV.log_softmax(-1).gather(1, batch.targets_N[:, None])[:, 0]
        logp_N.sum().backward()
        for row, logp in zip(rows, logp_N.detach().split([row.tokens for row in rows]), strict=True):
            logps[row.rollout.problem_id, row.rollout.sample] = logp
    return torch.cat([logps[rollout.problem_id, rollout.sample] for rollout in rollouts]), gradient_of(policy.model)


def transformers_logp(folder: Path, rollouts: list[Rollout]) -> tuple[Tensor, dict[str, Tensor]]:
    """As `trained`, by transformers: one sequence at a time with eager attention, without mask or cache."""
    # transformers 5.19 counts Falcon's alibi twice in eager attention.
    attention = "sdpa" if json.loads((folder / "config.json").read_text()).get("alibi") else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    logps = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        start = len(rollout.prompt_ids)
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
        logp = logits.log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
        logp.sum().backward()
        logps.append(logp.detach())
    return torch.cat(logps), gradient_of(model)


def gradient_of(model: Any) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def lora_of(opened: ModelFolder, models: Models, rollouts: list[Rollout], plain_logp: Tensor) -> str:
    """`yes` if a new adapter on the layers that Headwater picks leaves the log-probs as they are and gets a gradient."""
    spec = AdapterSpec(Lora(r=2), (0, "test"))
    try:
        policy = load_policy(opened, LoadOptions(models, CPU, frozen=False, adapter=spec))
    except HeadwaterError as error:
        return f"no: {error}"
    logp, gradient = trained(policy, rollouts)
    ups = [weight for path, weight in gradient.items() if "lora_B" in path]
    trains = any(bool(weight.any()) for weight in ups) and all("lora_" in path for path in gradient)
    return "yes" if trains and float((logp - plain_logp).abs().max()) <= EXACT else "no: other log-probs"


def outcomes(names: Sequence[str]) -> list[Outcome]:
    results = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            results.append(outcome(name, Path(folder)))
    return results


def table(results: Sequence[Outcome]) -> str:
    return "\n".join([HEADER, *(outcome.row() for outcome in results)])


if __name__ == "__main__":
    logging.set_verbosity_error()
    print(table(outcomes(sys.argv[1:] or list(ARCHITECTURES))))
