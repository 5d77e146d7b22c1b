"""Sizes from the config alone: published counts of mixtures of experts, odd heads, MLPs without a gate, and FLOPs by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from headwater.models.shape import Shape
from headwater.teachers.scoring import logp_of
from tiny import PROMPTS, rollout_of, tiny_policy

Fields = dict[str, Any]
MLA: Fields = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
DBRX: Fields = {
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500_000},
    "ffn_config": {"ffn_hidden_size": 10_752, "moe_num_experts": 16, "moe_top_k": 4},
}

PUBLISHED: dict[str, tuple[float, float, Fields]] = {
    "Qwen3-30B-A3B": (30.5, 3.3, {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151_936,
    }),
    "Mixtral-8x7B": (46.7, 12.9, {"model_type": "mixtral"}),
    "Mixtral-8x22B": (141, 39, {
        "model_type": "mixtral", "hidden_size": 6144, "intermediate_size": 16_384, "num_attention_heads": 48,
        "num_hidden_layers": 56, "num_key_value_heads": 8, "vocab_size": 32_768,
    }),
    "DeepSeek-V3": (671, 37, {"model_type": "deepseek_v3"}),
    "DeepSeek-V2-Lite": (15.7, 2.4, {
        "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "first_k_dense_replace": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "q_lora_rank": None, "vocab_size": 102_400,
        **MLA,
    }),
    "DeepSeek-V2": (236, 21, {
        "model_type": "deepseek_v2", "hidden_size": 5120, "intermediate_size": 12_288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128, "first_k_dense_replace": 1,
        "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "q_lora_rank": 1536, "vocab_size": 102_400,
        **MLA,
    }),
    "Qwen1.5-MoE-A2.7B": (14.3, 2.7, {"model_type": "qwen2_moe"}),
    "Qwen2-57B-A14B": (57.4, 14.2, {
        "model_type": "qwen2_moe", "hidden_size": 3584, "moe_intermediate_size": 2560, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "num_experts": 64, "num_experts_per_tok": 8,
        "shared_expert_intermediate_size": 20_480,
    }),
    "gpt-oss-20b": (20.9, 3.6, {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt-oss-120b": (116.8, 5.1, {"model_type": "gpt_oss"}),
    "OLMoE-1B-7B": (6.9, 1.3, {"model_type": "olmoe", "intermediate_size": 1024, "vocab_size": 50_304}),
    "Phi-3.5-MoE": (41.9, 6.6, {"model_type": "phimoe"}),
    "granite-3.0-1b-a400m": (1.3, 0.4, {
        "model_type": "granitemoe", "hidden_size": 1024, "intermediate_size": 512, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 8,
        "vocab_size": 49_155, "tie_word_embeddings": True,
    }),
    "Llama-4-Scout": (108, 17, {"model_type": "llama4_text"}),
    "Jamba-v0.1": (52, 12, {"model_type": "jamba"}),
    "JetMoe-8B": (8.5, 2.3, {"model_type": "jetmoe", "num_hidden_layers": 24}),
    "Qwen3-Next-80B-A3B": (80, 3.9, {"model_type": "qwen3_next"}),
    "Hunyuan-A13B": (80, 13, {
        "model_type": "hunyuan_v1_moe", "hidden_size": 4096, "intermediate_size": 3072, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "num_experts": 64, "moe_topk": [8] * 32, "vocab_size": 128_167,
        "tie_word_embeddings": True,
    }),
    "dbrx-base": (132, 36, {
        "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100_352, **DBRX,
    }),
}  # fmt: skip
"""Billions of parameters and of active ones that the publisher states, and the fields of config.json that differ from defaults.

gpt-oss counts the head as active and not the embedding; Llama-4-Scout's 109 hold a vision tower that a text model lacks.
"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_moe_parameter_counts_equal_published_ones(name: str) -> None:
    total, active, fields = PUBLISHED[name]
    shape = Shape.from_fields(fields)
    assert shape.experts_known
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.03)
    used = shape.token_parameters if name.startswith("gpt-oss") else shape.active_parameters
    assert used / 1e9 == pytest.approx(active, rel=0.12 if active < 3 else 0.04)


def test_qwen3_moe_parameter_count_by_hand() -> None:
    """Layer 0 and layer 2 hold experts; layer 1 is dense by name and layer 3 by the step."""
    shape = Shape.from_fields(
        {
            "model_type": "qwen3_moe", "hidden_size": 8, "intermediate_size": 20, "moe_intermediate_size": 6,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_experts": 5,
            "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [1, 3], "vocab_size": 50,
        }
    )  # fmt: skip
    attention = 8 * 24 * 2 + 8 * 12 * 2  # queries and output, keys and values
    expert, router, dense = 3 * 8 * 6, 5 * 8, 3 * 8 * 20
    norms = 4 * (2 * 8 + 2 * 6) + 8
    assert shape.parameters == 4 * attention + 2 * (5 * expert + router) + 2 * dense + norms + 2 * 50 * 8
    assert shape.matrix_parameters == 4 * attention + 2 * (5 * expert + router) + 2 * dense + 50 * 8
    assert shape.token_parameters == 4 * attention + 2 * (2 * expert + router) + 2 * dense + 50 * 8
    assert shape.active_parameters == shape.parameters - 2 * 3 * expert
    assert shape.flops(10, 3) == 10 * (2 * shape.token_parameters + 4 * 4 * 24 * 3)
    assert shape.kv_cache_numbers == 4 * 2 * 12
    # Experts are stacked in one tensor: no adapter of linear layers and no four-bit quantization reaches them.
    assert shape.linear_parameters == 4 * attention + 2 * dense


def test_llama_parameter_count_by_hand() -> None:
    fields = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 50, "tie_word_embeddings": True,
    }  # fmt: skip
    shape = Shape.from_fields(fields)
    # Attention a layer: queries and output 2·(8·4·6) = 384, keys and values 2·(8·2·6) = 192. MLP: 3·8·10 = 240. Head: 8·50.
    assert shape.token_parameters == shape.matrix_parameters == 2 * (384 + 192 + 240) + 400 == 2032
    assert shape.parameters == shape.active_parameters == 2032 + 5 * 8  # and the norms
    assert Shape.from_fields({**fields, "tie_word_embeddings": False}).parameters == 2032 + 5 * 8 + 400
    # A token costs 2·2032 for the matrices and 4·2·4·6 = 192 for each of the 5 earlier tokens it attends to.
    assert shape.flops(tokens=10, context=5) == 10 * (4064 + 960)
    assert shape.flops(tokens=10, context=5, passes=3) == 3 * 10 * (4064 + 960)
    assert shape.intermediate == 10
    assert shape.adapter_parameters(3, ["q_proj", "mlp.up_proj"]) == 2 * 3 * ((8 + 24) + (8 + 10))


DENSE: dict[str, tuple[float, Fields]] = {
    "gpt2": (0.1244, {"model_type": "gpt2"}),
    "opt-350m": (0.331, {
        "model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "word_embed_proj_dim": 512, "do_layer_norm_before": False,
    }),
    "gemma-2-2b": (2.614, {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256_000,
    }),
    "falcon-7b": (6.92, {"model_type": "falcon", "alibi": False, "multi_query": True}),
    "bloom-560m": (0.559, {"model_type": "bloom", "hidden_size": 1024, "n_head": 16, "n_layer": 24}),
    "mpt-7b": (6.65, {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50_432}),
    "mamba-130m": (0.129, {"model_type": "mamba", "num_hidden_layers": 24, "vocab_size": 50_280}),
    "phi-2": (2.78, {
        "model_type": "phi", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 51_200,
    }),
}  # fmt: skip
"""Billions of parameters that the publisher states: MLPs of two matrices, learned positions, wide heads, no attention at all."""


@pytest.mark.parametrize("name", DENSE)
def test_parameter_counts_of_other_architectures_equal_published_ones(name: str) -> None:
    total, fields = DENSE[name]
    shape = Shape.from_fields(fields)
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.003)
    assert shape.active_parameters == shape.parameters


COUNTED: dict[str, Fields] = {
    "qwen3_moe": {
        "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 12,
    },
    "qwen2_moe": {
        "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "jetmoe": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "llama": {"num_key_value_heads": 2},
    "gpt2": {"bos_token_id": 1, "eos_token_id": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "gemma2": {"head_dim": 16, "num_key_value_heads": 2},
    "falcon": {"multi_query": True, "alibi": False},
}  # fmt: skip
"""Architecture -> fields of a small model whose FLOPs torch counts."""


@pytest.mark.parametrize("architecture", COUNTED)
def test_forward_flops_equal_torch_count(architecture: str) -> None:
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    config = AutoConfig.for_model(architecture, **small | COUNTED[architecture])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")  # others run operations that the counter does not know
    ids = torch.arange(2 * 16).view(2, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    # Every token is compared with all 16, the later ones included.
    assert Shape.from_config(config).flops(ids.numel(), 16) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        # Keys and values of a token and layer: 6 heads of 16 and 16; one head; MLA's latent of 512 and a key of 64.
        ({"model_type": "gpt2", "n_embd": 96, "n_layer": 3, "n_head": 6}, 3 * 6 * 32),
        ({"model_type": "falcon", "hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 2}, 2 * 1 * 32),
        ({"model_type": "jamba", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
          "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 3, "vocab_size": 64}, 2 * 2 * 32),
        ({"model_type": "deepseek_v3", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
          "num_key_value_heads": 4, "n_routed_experts": 8, "vocab_size": 64, **MLA}, 3 * (512 + 64)),
        ({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2}, 0),
    ],
)  # fmt: skip
def test_kv_cache_counts_layers_and_heads_with_keys(fields: Fields, kept: int) -> None:
    assert Shape.from_fields(fields).kv_cache_numbers == kept


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "deepseek_v3", "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
         "num_experts_per_tok": 2, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10, "q_lora_rank": 8,
         "kv_lora_rank": 8},
        {"model_type": "falcon", "alibi": False, "multi_query": True},
        {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 24},
    ],
    ids=lambda fields: fields["model_type"],
)  # fmt: skip
def test_kv_cache_size_equals_allocated_cache(fields: Fields) -> None:
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 64,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small, **fields)).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(7)[None], use_cache=True).past_key_values
    allocated = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert Shape.from_config(model.config).kv_cache_numbers * 7 == allocated


def test_config_without_experts_per_token_counts_all_experts() -> None:
    fields = {"model_type": "deepseek_v2", "hidden_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 1,
              "num_attention_heads": 4, "vocab_size": 64, "moe_intermediate_size": 16}  # fmt: skip
    unknown, known = Shape.from_fields(fields), Shape.from_fields({**fields, "num_experts_per_tok": 6})
    assert not unknown.experts_known and known.experts_known
    assert unknown.token_parameters == unknown.matrix_parameters == known.matrix_parameters
    assert known.matrix_parameters - known.token_parameters == 58 * 3 * 32 * 16  # of 64 experts


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 0), ("vocab_size", -3)])
def test_sizes_other_than_positive_integers_are_named(field: str, value: int) -> None:
    name = {"hidden_size": "hidden", "vocab_size": "vocabulary"}[field]
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Shape.from_config(AutoConfig.for_model("qwen3", **{field: value}))


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_shape_changes_neither_config_nor_packed_log_probs(architecture: str) -> None:
    """The order of calls differs between a run and its resumption, so a side effect would break exact resume."""
    policy = tiny_policy(architecture, num_hidden_layers=3)
    rollouts = [rollout_of(prompt, (5, 6, 7, 8, 9)) for prompt in PROMPTS]
    before, settings = logp_of(policy, rollouts, 4096), copy.deepcopy(policy.model.config)
    assert Shape.from_config(policy.model.config).layers == 3
    assert policy.model.config.to_dict() == settings.to_dict()
    assert policy.model.config._attn_implementation == settings._attn_implementation
    for scores, expected in zip(logp_of(policy, rollouts, 4096), before, strict=True):
        assert torch.equal(scores, expected)
