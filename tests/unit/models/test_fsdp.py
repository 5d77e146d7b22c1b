"""What `models.fsdp` decides without several ranks: which matrices it casts before it gathers them."""

from __future__ import annotations

import pytest
import torch

from headwater.models.fsdp import linear_matrices
from tiny import CPU, policy_of, sampled_rows, tiny_model


@pytest.mark.parametrize("architecture", ["qwen3", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_sampling_with_cast_linear_matrices_is_bitwise_equal(architecture: str, tied: bool) -> None:
    """By the fast decoder and by transformers: under autocast each product casts them anyway."""
    policy = policy_of(tiny_model(architecture, tied=tied), device=CPU, dtype=torch.bfloat16)
    before = sampled_rows(policy, groups=4, group_size=8)
    casts = linear_matrices(policy.model)
    names = {name for name, parameter in policy.model.named_parameters() if id(parameter) in casts}
    assert len(names) == (14 if architecture == "qwen3" else 8) + (not tied)
    for parameter in policy.model.parameters():
        if id(parameter) in casts:
            parameter.data = parameter.data.bfloat16()
    assert [row.rollout for row in sampled_rows(policy, groups=4, group_size=8)] == [row.rollout for row in before]


def test_adapters_keep_their_type() -> None:
    lora = pytest.importorskip("peft")
    model = tiny_model(tied=False)
    adapted = lora.inject_adapter_in_model(lora.LoraConfig(r=2, target_modules=["q_proj"]), model)
    names = {name for name, parameter in adapted.named_parameters() if id(parameter) in linear_matrices(adapted)}
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in names and "lm_head.weight" in names
    assert not any(".lora_" in name or "embed" in name or "norm" in name for name in names)
