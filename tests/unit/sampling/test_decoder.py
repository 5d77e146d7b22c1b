"""Fast decoder: the general decoder's hidden states for every supported model; unsupported models are not accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwater.models.policy import Policy
from headwater.sampling.decoder import CacheDecoder, decoder_for
from headwater.sampling.fast_decoder import INITIAL_COLUMNS, FastDecoder
from tiny import CPU, PROMPTS, tiny_policy

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
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
}


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


@pytest.mark.parametrize("kind", PLAIN)
def test_fast_decoder_equals_general_decoder_hidden_states(kind: str) -> None:
    name, settings = PLAIN[kind]
    policy = tiny_policy(name, seed=4, **settings)
    if settings.get("attention_bias"):  # fresh biases are 0, which would hide an omitted bias
        with torch.no_grad():
            for weight_name, weight in policy.model.named_parameters():
                if weight_name.endswith("bias"):
                    weight.normal_(generator=torch.Generator().manual_seed(len(weight_name)))
    assert isinstance(decoder_for(policy), FastDecoder)
    # Past the first growth of the cache at 9 + 64 columns, and past the second.
    steps = 2 * (9 + INITIAL_COLUMNS) + 5
    for ours, expected in zip(
        hidden_states(policy, FastDecoder(policy), steps),
        hidden_states(policy, CacheDecoder(policy), steps),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_unfused_weights_of_large_models_give_same_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("qwen3", seed=4)
    fused = hidden_states(policy, FastDecoder(policy), 12)
    monkeypatch.setattr("headwater.sampling.fast_weights.FUSED_PARAMETERS", 0)
    unfused = FastDecoder(policy)
    layer, model_layer = unfused.weights.layers[0], policy.model.model.layers[0]
    assert len(layer.qkv) == 3
    assert layer.qkv[0].weight.data_ptr() == model_layer.self_attn.q_proj.weight.data_ptr()
    for ours, expected in zip(hidden_states(policy, unfused, 12), fused, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3", {"hidden_act": "gelu"}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("qwen2", {}),
        ("gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    ],
)
def test_unsupported_models_use_general_decoder(name: str, settings: dict[str, Any]) -> None:
    assert isinstance(decoder_for(tiny_policy(name, **settings)), CacheDecoder)


def test_decoder_built_after_update_uses_new_weights() -> None:
    policy = tiny_policy("qwen3", seed=4)
    before = hidden_states(policy, FastDecoder(policy), 2)
    with torch.no_grad():
        policy.model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    after = hidden_states(policy, FastDecoder(policy), 2)
    assert (after[-1] - before[-1]).abs().max().item() > 1e-2
    torch.testing.assert_close(after[-1], hidden_states(policy, CacheDecoder(policy), 2)[-1], rtol=1e-3, atol=1e-4)
    assert after[-1].device == CPU
