"""Adapters: they begin as nothing, train what full training would move, are sampled as they stand, and resume to the bit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from headwater.config.dense import StartUpdate
from headwater.config.lora import Lora
from headwater.config.recipe import parse_recipe
from headwater.config.stage import Sampling
from headwater.errors import UserError
from headwater.losses.batch import Row
from headwater.losses.objectives import objective_of
from headwater.models import adapter_files, lora
from headwater.models.folder import ModelFolder
from headwater.models.fsdp import copy_weights
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.save import save_policy
from headwater.models.shape import Shape
from headwater.sampling import fast_weights
from headwater.sampling.decoder import CacheDecoder, decoder_for
from headwater.sampling.fast_decoder import FastDecoder
from headwater.sampling.torch_sampler import TorchSampler
from headwater.storage.node_dir import NodeDir
from headwater.teachers.scoring import logp_of
from headwater.training.checkpoint import load_checkpoint, save_checkpoint
from headwater.training.lagged_copy import lagged_copy
from headwater.training.update import make_optimizer, update
from runs import load_json
from tests.unit.sampling.test_decoder import hidden_states
from tiny import CPU, MODELS, gradient_of, same_bits, sampled_rows, stage_of, tiny_folder, weights_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra `lora` is not installed")

FIELD = "models.student"
GRPO = stage_of("grpo", optim={"lr": 3e-2, "grad_clip": 1e6})


def adapted(folder: Path, draw: int = 0, dtype: str = "float32", **settings: Any) -> Policy:
    config = Lora.model_validate({"r": 4, "alpha": 8, **settings})
    models = MODELS.model_copy(update={"dtype": dtype})
    return load_policy(
        ModelFolder.open(str(folder), FIELD),
        LoadOptions(models, CPU, frozen=False, adapter=lora.AdapterSpec(config, (draw, "test"))),
    )


def trained(folder: Path, steps: int = 2, **settings: Any) -> Policy:
    """An adapter some large steps away from where it began."""
    policy = adapted(folder, **settings)
    optimizer = make_optimizer(policy, GRPO.optim)
    for step in range(steps):
        update(policy, optimizer, sampled_rows(policy, draw=step), objective_of(GRPO), 4096)
    return policy


def base(folder: Path, dtype: str = "float32") -> Policy:
    return load_policy(
        ModelFolder.open(str(folder), FIELD), LoadOptions(MODELS.model_copy(update={"dtype": dtype}), CPU, frozen=True)
    )


def scores(policy: Policy, rows_: list[Row]) -> torch.Tensor:
    return torch.cat(logp_of(policy, [row.rollout for row in rows_], 4096))


def furthest_apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# What trains ----------------------------------------------------------------------------------------------------------


def test_fresh_adapter_changes_nothing_and_is_reproducible(
    qwen3_folder: Path,
) -> None:
    policy, same, other = adapted(qwen3_folder), adapted(qwen3_folder), adapted(qwen3_folder, draw=1)
    rows = sampled_rows(policy)
    assert furthest_apart(scores(policy, rows), scores(base(qwen3_folder), rows)) < 1e-5
    first, again, others = (
        {path: layer.lora_A["default"].weight for path, layer in trained_policy.adapter.layers.items()}  # type: ignore[union-attr]
        for trained_policy in (policy, same, other)
    )
    assert same_bits(first, again) and not any(torch.equal(first[path], others[path]) for path in first)


def test_adapter_gradient_equals_full_gradient_times_other_half(qwen3_folder: Path) -> None:
    """W + s·B·A at B = 0: dL/dB = s · dL/dW · Aᵀ, and dL/dA = 0."""
    policy = adapted(qwen3_folder)
    whole = load_policy(ModelFolder.open(str(qwen3_folder), FIELD), LoadOptions(MODELS, CPU, frozen=False))
    rows = sampled_rows(whole)
    ours, full = gradient_of(policy, rows, GRPO), gradient_of(whole, rows, GRPO)
    assert policy.adapter is not None and len(policy.adapter.layers) == 14
    assert all(".lora_" in name for name in ours)
    for path, layer in policy.adapter.layers.items():
        expected = 8 / 4 * full[f"{path}.weight"] @ layer.lora_A["default"].weight.T
        torch.testing.assert_close(ours[f"{path}.lora_B.default.weight"], expected, rtol=1e-3, atol=1e-6)
        assert not ours[f"{path}.lora_A.default.weight"].any()


def test_only_named_targets_get_adapters(qwen3_folder: Path) -> None:
    policy = adapted(qwen3_folder, targets=["q_proj", "down_proj"])
    assert policy.adapter is not None
    assert {path.rpartition(".")[2] for path in policy.adapter.layers} == {"q_proj", "down_proj"}
    assert policy.adapter.parameters == Shape.from_config(policy.model.config).adapter_parameters(
        4, ("q_proj", "down_proj")
    )
    everything = adapted(qwen3_folder).adapter
    assert everything is not None
    assert everything.parameters == Shape.from_config(policy.model.config).adapter_parameters(4, None)


def test_bfloat16_base_is_rounded_and_adapter_is_not(qwen3_folder: Path) -> None:
    policy = adapted(qwen3_folder, dtype="bfloat16")
    types = {(parameter.requires_grad, parameter.dtype) for parameter in policy.model.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("wanted", [None, Lora(r=4, alpha=8)], ids=["all weights", "adapter"])
def test_lora_update_flops_equal_torch_count(tmp_path: Path, wanted: Lora | None) -> None:
    folder = tiny_folder(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    adapt = None if wanted is None else lora.AdapterSpec(wanted, (0,))
    policy = load_policy(ModelFolder.open(str(folder), FIELD), LoadOptions(MODELS, CPU, frozen=False, adapter=adapt))
    rows = sampled_rows(policy, max_tokens=24)
    with FlopCounterMode(display=False) as counter:
        gradient_of(policy, rows, GRPO)
    # Counted are matrix products; embedding rows and attention's own softmax are not in either figure.
    assert policy.pass_flops(rows, passes=3) == pytest.approx(counter.get_total_flops(), rel=0.15)


# What is sampled and compared with ------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "phi3", "olmo2"])
def test_fast_decoder_uses_adapted_weights(
    architecture: str, tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small models have the adapter folded into copied weights, large ones keep it apart: the same words either way."""
    if large:
        monkeypatch.setattr(fast_weights, "FUSED_PARAMETERS", 0)
    folder = tiny_folder(tmp_path / "model", architecture, seed=4)
    policy = trained(folder)
    decoder = decoder_for(policy)
    assert isinstance(decoder, FastDecoder)
    fast, general = hidden_states(policy, decoder, 12), hidden_states(policy, CacheDecoder(policy), 12)
    plain = base(folder)
    unadapted = hidden_states(plain, CacheDecoder(plain), 12)
    for ours, expected in zip(fast, general, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert furthest_apart(torch.cat(general), torch.cat(unadapted)) > 0.1


def test_sampler_logp_equals_trainer_with_adapter(qwen3_folder: Path) -> None:
    for dtype, near in (("float32", 1e-4), ("bfloat16", 0.05)):
        policy = trained(qwen3_folder, dtype=dtype)
        rows = sampled_rows(policy, draw=9)
        drawn = torch.cat([torch.tensor(row.rollout.sampler_logp) for row in rows])
        assert (drawn - scores(policy, rows)).abs().mean().item() < near


def test_copy_of_adapter_follows_on_same_base(qwen3_folder: Path) -> None:
    """A lagged copy: it scores as the policy did when it was copied, whatever the policy trains meanwhile."""
    policy = trained(qwen3_folder)
    follower, rows = policy.following(), sampled_rows(policy, draw=5)
    copy = lagged_copy(policy, follower, StartUpdate(every=2))
    assert follower.model is policy.model
    before, optimizer = scores(policy, rows), make_optimizer(policy, GRPO.optim)
    assert torch.equal(scores(follower, rows), before)
    for step in (1, 2):
        update(policy, optimizer, sampled_rows(policy, draw=step), objective_of(GRPO), 4096)
        after = scores(policy, rows)
        assert furthest_apart(after, before) > 1e-3
        copy.follow(step)
        assert torch.equal(scores(follower, rows), before if step == 1 else after)
        assert torch.equal(scores(policy, rows), after)


def test_copy_of_weights_scores_as_adapted_policy(qwen3_folder: Path) -> None:
    policy, copy = trained(qwen3_folder), base(qwen3_folder)
    rows_ = sampled_rows(policy, groups=2, max_tokens=6)
    assert furthest_apart(scores(copy, rows_), scores(policy, rows_)) > 1e-3
    copy_weights(policy, copy)
    assert furthest_apart(scores(copy, rows_), scores(policy, rows_)) < 1e-5


def test_kl_reference_is_frozen_base_without_copy(qwen3_folder: Path) -> None:
    policy = trained(qwen3_folder)
    reference, rows = policy.reference(), sampled_rows(policy, draw=5)
    assert reference.model is policy.model
    assert furthest_apart(scores(reference, rows), scores(base(qwen3_folder), rows)) < 1e-5
    assert furthest_apart(scores(policy, rows), scores(reference, rows)) > 0.1
    # And the policy trains on as if nobody had asked.
    config = gradient_of(policy, rows, GRPO)
    scores(reference, rows)
    assert same_bits(gradient_of(policy, rows, GRPO), config) and len(config) == 28


def test_gradient_checkpointing_keeps_lora_gradient(qwen3_folder: Path) -> None:
    policy, rows = adapted(qwen3_folder), sampled_rows(base(qwen3_folder))
    models = MODELS.model_copy(update={"gradient_checkpointing": True})
    again = load_policy(
        ModelFolder.open(str(qwen3_folder), FIELD),
        LoadOptions(models, CPU, frozen=False, adapter=lora.AdapterSpec(Lora(r=4, alpha=8), (0, "test"))),
    )
    assert again.model.is_gradient_checkpointing
    ours, expected = gradient_of(policy, rows, GRPO), gradient_of(again, rows, GRPO)
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-7)


# What is left behind --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["merged", "adapter"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_adapter_keeps_log_probs_in_transformers(tmp_path: Path, output: str, tied: bool) -> None:
    policy = trained(tiny_folder(tmp_path / "base", tied=tied), output=output)
    rows, out = sampled_rows(policy, draw=7), tmp_path / "out"
    save_policy(policy, out, torch.float32)
    assert (out / "config.json").exists() is (output == "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for row, ours in zip(rows, logp_of(policy, [row.rollout for row in rows], 4096), strict=True):
        prompt, completion = row.rollout.prompt_ids, row.rollout.completion_ids
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logp = torch.log_softmax(reloaded(input_ids=ids).logits[0, len(prompt) - 1 : -1], dim=-1)
        torch.testing.assert_close(logp.gather(1, torch.tensor(completion)[:, None])[:, 0], ours, rtol=0, atol=1e-4)
    assert furthest_apart(scores(base(out), rows), scores(policy, rows)) < 1e-4
    if output == "merged":  # a model folder like any other: nothing in it tells of adapters
        assert load_file(out / "model.safetensors").keys() == load_file(tmp_path / "base" / "model.safetensors").keys()


def test_next_stage_continues_adapter_with_its_start_as_reference(qwen3_folder: Path, tmp_path: Path) -> None:
    first = trained(qwen3_folder, output="adapter")
    save_policy(first, tmp_path / "first", torch.float32)
    second = adapted(tmp_path / "first", draw=1, output="adapter")
    rows = sampled_rows(first, draw=3)
    assert furthest_apart(scores(second, rows), scores(first, rows)) < 1e-5
    optimizer = make_optimizer(second, GRPO.optim)
    update(second, optimizer, sampled_rows(second, draw=4), objective_of(GRPO), 4096)
    assert furthest_apart(scores(second.reference(), rows), scores(first, rows)) < 1e-5
    assert furthest_apart(scores(second, rows), scores(first, rows)) > 0.1
    # What it leaves behind depends on the first base and is no larger than the first adapter.
    save_policy(second, tmp_path / "second", torch.float32)
    assert load_json(tmp_path / "second" / "adapter_config.json")["base_model_name_or_path"] == str(qwen3_folder)
    shapes = [
        {key: tensor.shape for key, tensor in load_file(tmp_path / name / "adapter_model.safetensors").items()}
        for name in ("first", "second")
    ]
    assert shapes[0] == shapes[1]
    assert furthest_apart(scores(base(tmp_path / "second"), rows), scores(second, rows)) < 1e-4
    # Where the output is merged, the adapter that a stage starts from becomes part of its base.
    third = adapted(tmp_path / "second", output="merged")
    assert furthest_apart(scores(third.reference(), rows), scores(second, rows)) < 1e-4


def test_adapter_fingerprint_depends_on_base(tmp_path: Path) -> None:
    policy = trained(tiny_folder(tmp_path / "base"), output="adapter")
    save_policy(policy, tmp_path / "out", torch.float32)
    before = ModelFolder.open(str(tmp_path / "out"), "models.student").fingerprint
    tiny_folder(tmp_path / "base", seed=5)
    assert ModelFolder.open(str(tmp_path / "out"), "models.student").fingerprint != before


# Checkpoints and whole runs -------------------------------------------------------------------------------------------


def test_checkpoint_holds_adapter_only_and_loads_bitwise(qwen3_folder: Path, tmp_path: Path) -> None:
    policy, place = adapted(qwen3_folder), NodeDir(tmp_path / "nodes" / "opd")
    optimizer, rows = make_optimizer(policy, GRPO.optim), sampled_rows(policy)
    update(policy, optimizer, rows, objective_of(GRPO), 4096)
    save_checkpoint(place, 1, policy.model, optimizer)
    kept = load_file(place.checkpoint(1) / "adapter.safetensors")
    assert len(kept) == 28 and all(".lora_" in name for name in kept)
    assert not (place.checkpoint(1) / "model.safetensors").exists()
    other = adapted(qwen3_folder, draw=1)
    restored = make_optimizer(other, GRPO.optim)
    assert load_checkpoint(place, other.model, restored) == 1
    for trained_policy, its in ((policy, optimizer), (other, restored)):
        update(trained_policy, its, rows, objective_of(GRPO), 4096)
    assert same_bits(weights_of(other), weights_of(policy))


def data(folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps({"problem": f"1{n}+21", "answer": str(31 + n)}) for n in range(4)))
    return path


# Sentences ------------------------------------------------------------------------------------------------------------


RECIPE: dict[str, Any] = {
    "name": "x", "task": "sums", "models": {"student": "a/b", "teacher": "a/c"},
    "data": {"labeled": "x.jsonl", "evals": {"y": "y.jsonl"}},
    "stages": {
        "teacher_rl": {"objective": "grpo", "steps": 1}, "warmup": {"objective": "forward_kl", "steps": 1},
        "opd": {"objective": "opd", "steps": 1}, "student_rl": {"objective": "grpo", "steps": 1},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dropout": 0.1}, "models.lora: dropout must be 0"),
        ({"targets": ["lm_head"]}, "lm_head gets no adapter here"),
        ({"targets": []}, "targets is empty"),
        ({"r": 0}, "models.lora.r: "),
        ({"roles": []}, "models.lora.roles: "),
    ],
)
def test_unsupported_lora_recipe_is_refused_by_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe({**RECIPE, "models": {**RECIPE["models"], "lora": config}}, "recipe")


def test_missing_lora_targets_are_named(qwen3_folder: Path) -> None:
    with pytest.raises(UserError, match=r"models\.lora\.targets: .*nowhere"):
        adapted(qwen3_folder, targets=["nowhere"])


def test_missing_package_is_refused_in_one_sentence(qwen3_folder: Path) -> None:
    with mock.patch("importlib.util.find_spec", return_value=None):
        with pytest.raises(UserError, match=r"needs peft, which is not installed; pip install 'headwater\[lora\]'"):
            adapted(qwen3_folder)
        with pytest.raises(UserError, match=r"needs bitsandbytes, which is not installed; .*headwater\[qlora\]"):
            adapted(qwen3_folder, quantize="nf4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"modules_to_save": ["lm_head"]}, "says that it trained lm_head, but holds no weights of it"),
        ({"use_dora": True}, "does not fit its base model"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all is no folder here"),
        ({"lora_alpha": "many"}, "lora_alpha 'many'"),
    ],
)
def test_unsupported_adapter_type_is_refused_by_name(
    qwen3_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save_policy(trained(qwen3_folder, steps=1, output="adapter"), tmp_path / "out", torch.float32)
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps({**load_json(path), **change}))
    with pytest.raises(UserError) as raised:
        base(tmp_path / "out")
    assert message in str(raised.value) and str(raised.value).startswith(FIELD)


def test_damaged_adapter_file_is_refused_by_name(qwen3_folder: Path, tmp_path: Path) -> None:
    save_policy(trained(qwen3_folder, steps=1, output="adapter"), tmp_path / "out", torch.float32)
    file = tmp_path / "out" / "adapter_model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    twice = {**tensors, **{f"module.{name}": tensor.clone() for name, tensor in tensors.items()}}
    for damaged in (whole[:-100], whole + bytes(30), save(twice)):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"^{FIELD}: {file} cannot be read \("):
            trained(tmp_path / "out", steps=0, output="adapter")


def test_mismatched_adapter_is_refused(qwen3_folder: Path, tmp_path: Path) -> None:
    save_policy(trained(qwen3_folder, steps=1, output="adapter"), tmp_path / "out", torch.float32)
    with pytest.raises(UserError, match=r"of another shape than models.lora asks for \(r 4, alpha 8"):
        adapted(tmp_path / "out", output="adapter", r=2)
    path = tmp_path / "out" / adapter_files.WEIGHTS
    tensors = load_file(path)
    save_file({name: tensor[:, :3].contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(UserError, match="does not fit its base model"):
        base(tmp_path / "out")


def test_general_decoder_samples_other_adapted_models(tmp_path: Path) -> None:
    policy = trained(tiny_folder(tmp_path / "model", "stablelm"))
    assert isinstance(decoder_for(policy), CacheDecoder)
    rows = sampled_rows(policy, draw=2)
    drawn = torch.cat([torch.tensor(row.rollout.sampler_logp) for row in rows])
    assert furthest_apart(drawn, scores(policy, rows)) < 1e-4
    again = TorchSampler(policy).sample([], Sampling(max_tokens=4))
    assert again == []
