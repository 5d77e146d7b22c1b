"""Sizes of adapters before any weights are read, against the adapters that peft then adds."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from headwater.config.lora import Lora
from headwater.models import adapter_size as module
from headwater.models import lora
from headwater.models.adapter_size import adapter_size
from headwater.models.shape import Shape
from tiny import tiny_model

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra `lora` is not installed")
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}


@needs_peft
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "o_proj")])
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("qwen3", {}),
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
        ("mixtral", EXPERTS),
        ("gpt_oss", EXPERTS),
        ("granitemoe", EXPERTS),
    ],
)
def test_adapter_size_equals_peft_parameter_count(architecture: str, fields: dict[str, Any], targets: Any) -> None:
    model, wanted = tiny_model(architecture, **fields), Lora(r=4, targets=targets)
    weights, active = adapter_size(Shape.from_config(model.config), wanted)
    lora.attach_adapter(model, "base", lora.AdapterSpec(wanted, (0, "size")), None)
    assert weights == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (active < weights) == (bool(fields) and targets == "all-linear")


@needs_peft
def test_active_adapter_size_counts_routed_experts_only() -> None:
    shape = Shape.from_config(tiny_model("gpt_oss", **EXPERTS).config)
    weights, active = adapter_size(shape, Lora(r=4))
    # Two layers of four experts with matrices of 32 × 128 and 64 × 32; a token uses half of them.
    experts = 2 * 4 * 4 * ((32 + 128) + (64 + 32))
    attention = shape.adapter_parameters(4, None)
    assert weights == attention + experts
    assert active == attention + experts / 2


def test_adapter_size_counts_gpt2_conv1d_layers() -> None:
    shape = Shape.from_config(tiny_model("gpt2", n_inner=64).config)
    # c_attn 32 × 96, c_proj 32 × 32, c_fc 32 × 64, c_proj 64 × 32.
    assert adapter_size(shape, Lora(r=2)) == (2 * 2 * (128 + 64 + 96 + 96),) * 2


def test_adapter_size_without_peft_counts_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    shape = Shape.from_config(tiny_model(num_hidden_layers=3).config)
    layer = (32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3
    assert adapter_size(shape, Lora(r=5)) == (3 * 5 * layer,) * 2
