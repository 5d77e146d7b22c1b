"""Estimates: parameter counts, memory of its parts, memory measured by the allocator."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from headwater.cli.dry_run import notes
from headwater.cli.options import DryRunOptions
from headwater.config.builtin import find_recipe
from headwater.config.lora import Lora
from headwater.losses.batch import Row
from headwater.losses.objectives import objective_of
from headwater.models import lora
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.shape import Shape
from headwater.runs.estimate import Assumptions, condition_schedule, estimates
from headwater.runs.hardware import MODELS
from headwater.runs.memory_estimate import (
    FOUR_BITS,
    DeviceMemory,
    gathered_bytes,
    head_parameters,
    model_bytes,
    pass_bytes,
    whole_copy_bytes,
)
from headwater.runs.setup import prepared
from headwater.training.update import make_optimizer, update
from runs import TINY
from tiny import CPU, rollout_of, stage_of, taught, tiny_folder
from tiny import MODELS as TINY_MODELS

# Shapes ---------------------------------------------------------------------------------------------------------------


BILLIONS = {
    "Qwen/Qwen3-0.6B": 0.596, "Qwen/Qwen3-1.7B": 1.72, "Qwen/Qwen3-4B": 4.02, "Qwen/Qwen3-8B": 8.19, "Qwen/Qwen3-14B": 14.77,
    "Qwen/Qwen3-30B-A3B": 30.53, "Qwen/Qwen2.5-0.5B-Instruct": 0.494, "Qwen/Qwen2.5-1.5B-Instruct": 1.544,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 0.1345,
    "meta-llama/Llama-3.2-1B-Instruct": 1.236, "meta-llama/Llama-3.1-8B-Instruct": 8.03, "meta-llama/Llama-3.3-70B-Instruct": 70.55,
}  # fmt: skip
"""Parameters that their publishers count."""


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_equal_published_ones(name: str) -> None:
    assert Shape.from_fields(MODELS[name]).parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.003)


def test_persistent_memory_is_sum_of_its_parts() -> None:
    shape = Shape.from_fields(MODELS["Qwen/Qwen3-8B"])
    whole = model_bytes(shape, 0, False, (), 2).total
    assert whole == 18.0 * shape.parameters  # float32 weights, gradients, two moments, and the copy that autocast makes
    adapter = shape.adapter_parameters(16, None)
    assert adapter == 43_646_976  # 36 layers × 16 × (4096+4096 + 2·(4096+1024) + 4096+4096 + 3·(4096+12288))
    assert model_bytes(shape, adapter, False, (), 2).total == 2.0 * shape.parameters + 16.0 * adapter
    rest = shape.parameters - shape.linear_parameters
    four = model_bytes(shape, adapter, True, (shape,), 2).total
    assert four == pytest.approx(FOUR_BITS * shape.linear_parameters + 2 * rest + 16 * adapter + 2 * shape.parameters)


def test_device_memory_by_hand() -> None:
    """Qwen3-8B: 8,190,735,360 weights, of which 36 layers of 192,937,984 are matrices and 622,329,856 each embedding and head."""
    shape = Shape.from_fields(MODELS["Qwen/Qwen3-8B"])
    layer, head = 192_937_984, 622_329_856
    assert shape.parameters - 36 * layer - 2 * head == 4096 + 36 * (2 * 4096 + 2 * 128)  # norms
    assert head_parameters(shape) == head and shape.linear_parameters == 36 * layer
    norms = shape.parameters - 36 * layer - 2 * head
    assert gathered_bytes(shape, 4) == 4.0 * (2 * head + norms + layer)
    assert whole_copy_bytes(shape, 2, trains=True) == 2.0 * (36 * layer + head) + 6.0 * (head + norms)
    assert whole_copy_bytes(shape, 2, trains=False) == 2.0 * shape.parameters
    parts = model_bytes(shape, 0, False, (shape,), 2)
    assert (parts.weights, parts.optimizer, parts.frozen, parts.heads) == (
        6.0 * shape.parameters, 12.0 * shape.parameters, 2.0 * shape.parameters, 2.0 * head,
    )  # fmt: skip
    turns = DeviceMemory(1, 2, 3, sampler=10, kv_cache=20, gathered=5, activations=6)
    assert turns.peak == 36 and replace(turns, both=True).peak == 47


def test_sampler_and_overlap_decide_device_memory() -> None:
    def opd(devices: int, *changes: str) -> DeviceMemory:
        with prepared(find_recipe("pocket", [*TINY, *changes]), ["raw_teacher"], [0]) as (plan, inputs):
            assumed = Assumptions(devices=devices, device_memory=1e9)
            return next(row.memory for row in estimates(plan, inputs, assumed) if row.name.startswith("opd"))

    plain, ahead = opd(1), opd(1, "compute.overlap=1")
    assert plain.sampler == 0.0 and ahead.sampler == plain.weights  # a second model in float32
    assert ahead.peak == plain.peak - max(plain.kv_cache, plain.activations) + sum(
        (ahead.sampler, plain.kv_cache, plain.activations)
    )
    engine = opd(4, "compute.sampler=vllm", "compute.vllm.memory=0.3")
    assert engine.sampler == pytest.approx(0.3e9) and engine.kv_cache == 0.0 and not engine.both
    assert opd(4, "compute.sampler=vllm", "compute.vllm.sleep=false").both


def test_dry_run_and_stage_state_one_share_of_condition_c2() -> None:
    with prepared(find_recipe("pocket", TINY), ["raw_teacher"], [0]) as (plan, inputs):
        opd = plan.arms["raw_teacher"][0]
        _, share = condition_schedule(opd, plan, inputs, 2)
        estimate = next(row for row in estimates(plan, inputs) if row.name == plan.names[opd])
    assert estimate.condition_share == share > 0.5
    assert f" opd.s0 {share:.0%} (" in "\n".join(notes([estimate], DryRunOptions(None, 1, None), None))


def test_estimated_cache_holds_rollouts_read_by_stages() -> None:
    """Two warm-up steps of 16 rollouts, of the 64 of 16 prompts; 32 tokens each."""
    with prepared(find_recipe("pocket", TINY), ["raw_teacher"], [0]) as (plan, inputs):
        cache = next(row for row in estimates(plan, inputs) if row.name.startswith("teacher_rollouts"))
    assert cache.tokens_sampled == cache.tokens_teacher_scored == 2 * 16 * 32


def test_weights_gradients_and_optimizer_state_are_divided_by_devices() -> None:
    with prepared(find_recipe("pocket", TINY), ["bridge_rl"], [0]) as (plan, inputs):
        single, shared = (estimates(plan, inputs, Assumptions(devices=devices)) for devices in (1, 4))
    assert len(single) == 7
    for alone, divided in zip(single, shared, strict=True):
        single_memory, four = alone.memory, divided.memory
        assert (
            divided.bytes == alone.bytes == single_memory.weights + single_memory.optimizer + single_memory.frozen > 0
        )
        assert (four.weights, four.optimizer) == (single_memory.weights / 4, single_memory.optimizer / 4)
        assert (
            single_memory.frozen / 4 < four.frozen < single_memory.frozen or single_memory.frozen == four.frozen == 0
        )  # an output layer is not divided
        assert (
            four.activations == single_memory.activations
            and single_memory.gathered == single_memory.sampler == 0.0 < four.sampler
        )
        assert (four.gathered > 0.0) == (single_memory.activations > 0.0) == (single_memory.optimizer > 0.0)
    weights = load_file(Path(ModelFolder.open("pocket:qwen3-student", "models.student").path) / "model.safetensors")
    student = sum(tensor.numel() for tensor in weights.values())
    assert {estimate.bytes for estimate in shared if estimate.name.startswith("base_student.")} == {4.0 * student}


# Memory ---------------------------------------------------------------------------------------------------------------


MEASURED = {
    "all weights": ("grpo", {}, None),
    "distillation": ("opd", {}, None),
    "recomputed": ("grpo", {"gradient_checkpointing": True}, None),
    "distillation, recomputed": ("opd", {"gradient_checkpointing": True}, None),
    "adapter": ("grpo", {}, Lora(r=8, alpha=16)),
    "adapter, recomputed": ("opd", {"gradient_checkpointing": True}, Lora(r=8, alpha=16)),
    "bfloat16": ("grpo", {"dtype": "bfloat16"}, None),
    "experts": ("grpo", {}, None),
    "experts and latent attention": ("grpo", {}, None),
}
"""What is trained how, and held against what the tensor library's allocator then counts."""


ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192}),
    "experts and latent attention": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "moe_intermediate_size": 128, "first_k_dense_replace": 1, "q_lora_rank": 48, "kv_lora_rank": 32,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "head_dim": 16,
        },
    ),
}  # fmt: skip
"""Architecture and its own fields, of the cases that are not Qwen3."""


def most_allocated(do: Callable[[], object]) -> float:
    """Bytes of tensors at once, over those that were there before; what the allocator itself wrote down."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as read:
        do()
    assert read.profiler is not None and read.profiler.kineto_results is not None
    events = [event for event in read.profiler.kineto_results.events() if event.name() == "[memory]"]
    return float(max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))))


@pytest.mark.parametrize("case", MEASURED)
def test_update_memory_is_within_quarter_of_allocator_count(case: str, tmp_path: Path) -> None:
    objective, how, adapt = MEASURED[case]
    if adapt is not None and importlib.util.find_spec("peft") is None:
        pytest.skip("the extra `lora` is not installed")
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 32, "vocab_size": 2048}
    architecture, fields = ARCHITECTURES.get(case, ("qwen3", {}))
    folder = tiny_folder(tmp_path / "model", architecture, std=0.02, **sizes | fields)
    models, wanted = TINY_MODELS.model_copy(update=how), None if adapt is None else lora.AdapterSpec(adapt, (0,))
    policy = load_policy(
        ModelFolder.open(str(folder), "models.student"), LoadOptions(models, CPU, frozen=False, adapter=wanted)
    )
    stage, tokens = stage_of(objective, batch_size=8, group_size=4), 8 * 128
    made = [rollout_of((1, 6, 2, row % 9), tuple(3 + (row + at) % 20 for at in range(124))) for row in range(8)]
    rows = [Row(rollout, advantage=1.0 if row % 2 else -1.0) for row, rollout in enumerate(made)]
    if objective == "opd":
        rows = taught(
            rows,
            load_policy(ModelFolder.open(str(folder), "models.teacher"), LoadOptions(TINY_MODELS, CPU, frozen=True)),
        )
    there = sum(parameter.numel() * parameter.element_size() for parameter in policy.model.parameters())
    optimizer = make_optimizer(policy, stage.optim)
    grown = most_allocated(lambda: [update(policy, optimizer, rows, objective_of(stage), tokens) for _ in range(2)])
    width, logits = 2 if models.dtype == "bfloat16" else 4, 2 if objective == "opd" else 1
    more = 0 if policy.adapter is None else policy.adapter.parameters
    work = pass_bytes(policy.shape, tokens, width, models.gradient_checkpointing, cuda=False, logits=logits)
    result = model_bytes(policy.shape, more, False, (), width).total + work
    print(f"{case}: {result / 1e6:.1f} MB said, {(there + grown) / 1e6:.1f} MB measured")
    assert result == pytest.approx(there + grown, rel=0.25)
