"""Adapters on layers other than `nn.Linear`: GPT-2's Conv1D, fused experts and their routers. Trained, saved, reloaded, continued."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from headwater.config.lora import Lora
from headwater.errors import UserError
from headwater.losses.objectives import objective_of
from headwater.models import lora, lora_targets
from headwater.models.adapter_coverage import coverage
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.save import save_policy
from headwater.training.update import make_optimizer, update
from tests.unit.models.test_lora import GRPO, adapted, base, furthest_apart, scores, trained
from tiny import CPU, MODELS, gradient_of, sampled_rows, tiny_folder, tiny_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra `lora` is not installed")

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "std": 0.1}),
}


def folder_of(kind: str, folder: Path) -> Path:
    architecture, config = KINDS[kind]
    return tiny_folder(folder, architecture, **config)


def logp(model: Any, rows: list[Any]) -> torch.Tensor:
    """Log-probs of the rows' completions by transformers' own forward pass."""
    parts = []
    for row in rows:
        prompt, completion = row.rollout.prompt_ids, row.rollout.completion_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
        parts.append(torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_layers_save_and_reload_in_peft(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    start = folder_of(kind, tmp_path / "base")
    policy = trained(start, output="adapter")
    rows = sampled_rows(policy, draw=7)
    ours = scores(policy, rows)
    assert furthest_apart(ours, scores(base(start), rows)) > 0.1
    drawn = torch.cat([torch.tensor(row.rollout.sampler_logp) for row in rows])
    assert furthest_apart(drawn, ours) < 1e-4  # the sampler reads the same adapter

    save_policy(policy, tmp_path / "adapter", torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert furthest_apart(logp(peft_model, rows), ours) < 1e-4
    assert furthest_apart(logp(peft_model.merge_and_unload(), rows), ours) < 1e-4
    assert furthest_apart(scores(base(tmp_path / "adapter"), rows), ours) < 1e-4

    assert policy.adapter is not None
    adapter = replace(policy.adapter, lora=policy.adapter.lora.model_copy(update={"output": "merged"}))
    save_policy(replace(policy, adapter=adapter), tmp_path / "merged", torch.float32)
    written, first = load_file(tmp_path / "merged" / "model.safetensors"), load_file(start / "model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in first.items()
    }
    handed = dict(policy.checkpoint_weights())  # what vLLM is given: names as in a checkpoint, tied head included
    assert handed.keys() - {"lm_head.weight"} == first.keys() - {"lm_head.weight"}
    assert all(torch.equal(handed[name], written[name]) for name in written)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert furthest_apart(logp(loaded, rows), ours) < 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_next_stage_continues_layers_with_their_start_as_reference(kind: str, tmp_path: Path) -> None:
    first = trained(folder_of(kind, tmp_path / "base"), output="adapter")
    save_policy(first, tmp_path / "first", torch.float32)
    second = adapted(tmp_path / "first", draw=1, output="adapter")
    rows = sampled_rows(first, draw=3)
    wanted = scores(first, rows)
    assert furthest_apart(scores(second, rows), wanted) < 1e-5
    update(second, make_optimizer(second, GRPO.optim), sampled_rows(second, draw=4), objective_of(GRPO), 4096)
    assert furthest_apart(scores(second.reference(), rows), wanted) < 1e-5
    assert furthest_apart(scores(second, rows), wanted) > 0.05


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_adapter_gradient_equals_weight_gradient_times_other_half(kind: str, tmp_path: Path) -> None:
    """At B = 0 the gradient of B is that of the weight times A: checked on the fused matrices by full training of the same rows."""
    start = folder_of(kind, tmp_path / "base")
    policy = adapted(start)
    rows = sampled_rows(policy)
    ours = gradient_of(policy, rows, GRPO)
    whole = _all_weights(start)
    full = gradient_of(whole, rows, GRPO)
    assert policy.adapter is not None
    for path, layer in policy.adapter.layers.items():
        weight = full[lora_targets.weight_name(path, layer)]
        down, scaling = layer.lora_A["default"].weight, layer.scaling["default"]
        if getattr(layer, "fan_in_fan_out", False):
            expected = weight.T @ down.T
        elif weight.dim() == 3:
            count = len(weight)
            down_ERI = down.reshape(count, -1, down.shape[1])
            expected = torch.stack([weight[i] @ down_ERI[i].T for i in range(count)], dim=2).flatten(1)
        else:
            expected = weight @ down.T
        torch.testing.assert_close(ours[f"{path}.lora_B.default.weight"], scaling * expected, rtol=1e-3, atol=1e-5)


def _all_weights(folder: Path) -> Any:
    return load_policy(ModelFolder.open(str(folder), "models.student"), LoadOptions(MODELS, CPU, frozen=False))


def covered(folder: Path, **settings: Any) -> Any:
    return coverage(ModelFolder.open(str(folder), "models.student"), Lora.model_validate({"r": 2, **settings}))


def test_adapter_coverage_by_hand(tmp_path: Path) -> None:
    """Hidden 32, 2 layers, 4 experts of 3·32·16, 4 heads of 8 and 2 for keys and values, a router of 4·32."""
    moe = covered(folder_of("qwen3_moe", tmp_path / "moe"), targets=["q_proj", "v_proj"])
    attention, experts, router = 32 * (32 + 16 + 16 + 32), 4 * 3 * 32 * 16, 4 * 32
    assert (moe.covered, moe.total) == (2 * 32 * (32 + 16), 2 * (attention + experts + router))
    assert moe.others == {
        "experts.gate_up_proj": 2 * 4 * 2 * 32 * 16, "experts.down_proj": 2 * 4 * 32 * 16, "self_attn.o_proj": 2 * 32 * 32,
        "self_attn.k_proj": 2 * 32 * 16, "mlp.gate": 2 * router,
    }  # fmt: skip
    for kind in KINDS:
        whole = covered(folder_of(kind, tmp_path / kind))
        assert whole.covered == whole.total > 0 and whole.others == {}
    # peft takes the names of a dense layer's matrices for those of experts: they get no adapter, which the doctor says.
    deepseek = tiny_folder(
        tmp_path / "deepseek", "deepseek_v3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1,
        topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    assert "mlp.up_proj" in covered(deepseek).others and covered(deepseek).share < 0.9


@pytest.mark.parametrize("transposed", [False, True], ids=["out, in", "in, out"])
def test_fused_expert_update_equals_peft(transposed: bool) -> None:
    """GPT-OSS keeps its experts as (experts, inputs, outputs), Qwen3-MoE as (experts, outputs, inputs)."""
    from peft import LoraConfig, inject_adapter_in_model

    if transposed:
        from transformers import GptOssConfig

        config: Any = GptOssConfig(
            vocab_size=90, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        )  # fmt: skip
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    else:
        model = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets), model, "default")
    layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "parameter_name")}
    assert len(layers) == 2 * len(model.model.layers)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        torch.testing.assert_close(lora.update_of(layer), layer.get_delta_weight("default"))


@pytest.mark.parametrize(
    ("architecture", "config", "targets", "message"),
    [
        (
            "gpt2",
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
            ["wte"],
            "wte is a layer of type Embedding",
        ),
        ("gpt_neox", {}, ["lm_head"], "lm_head is the model's head"),
        ("mixtral", KINDS["mixtral"][1], ["input_layernorm"], "MixtralRMSNorm"),
        ("falcon_mamba", {"state_size": 4, "conv_kernel": 4}, ["conv1d"], "conv1d"),
    ],
)
def test_unsavable_targets_are_refused_before_training(
    architecture: str, config: dict[str, Any], targets: list[str], message: str
) -> None:
    model = tiny_model(architecture, **config) if architecture != "falcon_mamba" else _mamba(config)
    with pytest.raises(UserError, match=r"models\.lora\.targets: ") as raised:
        lora_targets.inject(
            model, lora_targets.peft_config(Lora(r=2).model_copy(update={"targets": tuple(targets)}), model)
        )
    assert message in str(raised.value)


def _mamba(config: dict[str, Any]) -> Any:
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    return FalconMambaForCausalLM(FalconMambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, **config))


def test_transposed_quantized_layers_keep_their_layout_when_saved() -> None:
    """transformers turns GPT-2's Conv1D into linear layers of four bits; here they are linear layers of float32 instead."""
    model, plain = (tiny_model("gpt2", **KINDS["gpt2"][1]) for _ in range(2))
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear: Any = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias, linear.source_cls = nn.Parameter(module.weight.t()), module.bias, Conv1D
            model.set_submodule(path, linear)
    settings = Lora(r=2)
    adapter = lora.Adapter(settings, "", lora_targets.inject(model, lora_targets.peft_config(settings, model)))
    for layer in adapter.layers.values():
        nn.init.normal_(layer.lora_B["default"].weight)
    plain.load_state_dict(dict(adapter.merged_weights(model)))
    ids = torch.tensor([[1, 6, 15, 7, 2]])
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-4)


def test_expert_choice_routers_get_no_adapter() -> None:
    """Llama 4's router is a linear layer by class and returns a choice of experts, to which peft would add a product."""
    moe = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    model, settings = tiny_model("llama4_text", **moe), Lora(r=2)
    layers = lora_targets.inject(model, lora_targets.peft_config(settings, model))
    assert {path.rpartition(".")[2] for path in layers} >= {"experts", "q_proj", "gate_proj"}
    assert not any("router" in path for path in layers)
    assert model(input_ids=torch.tensor([[1, 6, 15]])).logits.isfinite().all()


def test_mamba_layers_read_by_kernels_get_no_adapter(tmp_path: Path) -> None:
    policy = trained(tiny_folder(tmp_path / "base", "mamba", state_size=4), output="adapter")
    rows = sampled_rows(policy, draw=7)
    save_policy(policy, tmp_path / "adapter", torch.float32)
    assert policy.adapter is not None
    assert {path.rpartition(".")[2] for path in policy.adapter.layers} == {"in_proj", "x_proj", "dt_proj"}
    assert furthest_apart(scores(base(tmp_path / "adapter"), rows), scores(policy, rows)) < 1e-4


def test_three_dimensional_vectors_are_no_experts() -> None:
    """RWKV keeps its time mixes as (1, 1, hidden)."""
    model, settings = tiny_model("rwkv", attention_hidden_size=32, context_length=32), Lora(r=2)
    layers = lora_targets.inject(model, lora_targets.peft_config(settings, model))
    assert layers and not any(hasattr(layer, "parameter_name") for layer in layers.values())
