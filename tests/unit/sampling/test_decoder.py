"""Fast decoder: the general decoder's hidden states for every supported model; unsupported models are not accepted."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from headwater.models.policy import Policy
from headwater.sampling import fast_decoder as fast_decoder_module
from headwater.sampling import fast_weights
from headwater.sampling.decoder import CacheDecoder, decoder_for
from headwater.sampling.fast_decoder import FastDecoder
from headwater.sampling.fast_weights import Linear
from tiny import CPU, PROMPTS, tiny_policy

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
WINDOW = {"use_sliding_window": True, "sliding_window": 6}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
FULL = ["full_attention", "full_attention"]
STEPS = 48
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "qwen3 with yarn": ("qwen3", {"rope_parameters": YARN}),
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tied": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 positions": ("llama", {"rope_parameters": LLAMA3}),
    "llama, stretched": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, one key head per query head": ("llama", {"num_key_value_heads": 4}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows in one layer": ("qwen2", MIXED),
    "qwen3, windows": ("qwen3", {**WINDOW, "max_window_layers": 0}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, windows": ("mistral", WINDOW),
    "smollm3, a layer without positions": ("smollm3", {"no_rope_layers": [1, 0], "attention_bias": True}),
    "gemma3, two ropes and windows": ("gemma3_text", MIXED),
    "gemma3, scores scaled by another width": ("gemma3_text", {"layer_types": FULL, "query_pre_attn_scalar": 3}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, short positions": (
        "phi3",
        {"sliding_window": None, "rope_parameters": {**LONG, "original_max_position_embeddings": 128}},
    ),
    "phi3, long positions": (
        "phi3",
        {"sliding_window": None, "rope_parameters": {**LONG, "original_max_position_embeddings": 2}},
    ),
    "phi3, windows, half of each head rotates": ("phi3", {**WINDOW, "rope_parameters": HALF}),
    "phi3, half of each head rotates": ("phi3", {"sliding_window": None, "rope_parameters": HALF}),
    "olmo2": ("olmo2", {}),
    "olmo2, one key head per query head": ("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
}


def fast_decoder(policy: Policy) -> FastDecoder:
    decoder = decoder_for(policy)
    assert isinstance(decoder, FastDecoder)
    return decoder


def hidden_states(policy: Policy, decoder: CacheDecoder | FastDecoder, steps: int) -> list[torch.Tensor]:
    """Hidden states of a fixed schedule: prefill four prompts of different length, some twice, and drop rows two times."""
    tokens = torch.randint(5, 30, (steps, 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        decoder.begin([PROMPTS[row] for row in (0, 0, 1, 1, 2, 3, 3)], 7, max(map(len, PROMPTS)) + steps)
        states = [decoder.prefill(7)]
        alive = [0, 1, 2, 3, 4, 5, 6]
        for step in range(steps):
            if step in (3, 9):
                keep = [0, 2, 3, 4, 6] if step == 3 else [3, 1]
                alive = [alive[row] for row in keep]
                decoder.select_rows(keep)
            states.append(decoder.decode_step(tokens[step, alive]))
    return states


@cache
def policy_and_states(kind: str) -> tuple[Policy, list[torch.Tensor]]:
    """A policy, and the general decoder's hidden states. Fresh biases and norms would hide an omitted one: they are noisy."""
    name, settings = KINDS[kind]
    policy = tiny_policy(name, seed=4, **settings)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.dim() == 1:
                weight.add_(0.4 * torch.randn(weight.shape, generator=noise))
    return policy, hidden_states(policy, CacheDecoder(policy), STEPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["kernels", "folded", "as they are"])
def test_fast_decoder_equals_general_decoder_hidden_states(
    kind: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_decoder_module, "INITIAL_COLUMNS", 4)  # so that the cache grows, twice
    if weights == "folded":
        monkeypatch.setattr(fast_weights, "kernels", lambda: None)
    if weights == "as they are":
        monkeypatch.setattr(fast_weights, "FUSED_PARAMETERS", 0)
    policy, general = policy_and_states(kind)
    decoder = fast_decoder(policy)
    assert decoder.weights.interleaved == (weights != "as they are")
    for ours, expected in zip(hidden_states(policy, decoder, STEPS), general, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert decoder.cache.columns >= 4 * (9 + 4)


def test_large_models_are_decoded_without_copies_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_weights, "FUSED_PARAMETERS", 0)
    for name in ("qwen3", "phi3", "gemma3_text"):
        policy = tiny_policy(name, seed=4)
        ours, attention = fast_decoder(policy).weights.layers[0], policy.model.model.layers[0].self_attn
        first = attention.qkv_proj if name == "phi3" else attention.q_proj
        assert len(ours.qkv) == (1 if name == "phi3" else 3)
        assert isinstance(ours.qkv[0], Linear) and ours.qkv[0].weight.data_ptr() == first.weight.data_ptr()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3", {"hidden_act": "gelu"}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("gemma3_text", {"hidden_activation": "relu"}),
        ("gemma3_text", {"attn_logit_softcapping": 20.0}),
        ("olmo", {}),
        ("gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    ],
)
def test_unsupported_models_use_general_decoder(name: str, settings: dict[str, Any]) -> None:
    assert isinstance(decoder_for(tiny_policy(name, **settings)), CacheDecoder)


def test_decoder_built_after_update_uses_new_weights() -> None:
    policy = tiny_policy("qwen3", seed=4)
    before = hidden_states(policy, fast_decoder(policy), 2)
    with torch.no_grad():
        policy.model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    after = hidden_states(policy, fast_decoder(policy), 2)
    assert (after[-1] - before[-1]).abs().max().item() > 1e-2
    torch.testing.assert_close(after[-1], hidden_states(policy, CacheDecoder(policy), 2)[-1], rtol=1e-3, atol=1e-4)
    assert after[-1].device == CPU
