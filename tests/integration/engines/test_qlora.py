"""QLoRA through bitsandbytes: adapters on four-bit weights sample, train, resume and save as on full-precision weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from headwater.config.lora import Lora
from headwater.errors import UserError
from headwater.losses.objectives import objective_of
from headwater.models import adapter_files, lora
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.save import save_policy
from headwater.teachers.scoring import logp_of
from headwater.training.update import make_optimizer, update
from runs import assert_same, load_json, node, rows, tiny
from tests.integration.test_resume import Killed, killed_at
from tiny import CPU, MODELS, gradient_of, sampled_rows, stage_of, tiny_folder

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        any(importlib.util.find_spec(package) is None for package in ("peft", "bitsandbytes")),
        reason="peft and bitsandbytes are not installed here: `make test-engines` runs these",
    ),
]
GRPO = stage_of("grpo", optim={"lr": 3e-2, "grad_clip": 1e6})
FIELD = "models.student"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "base", hidden_size=64, intermediate_size=128, head_dim=16, std=0.15)


def adapted(where: Path, quantize: str | None = "nf4", **settings: Any) -> Policy:
    config = Lora.model_validate({"r": 4, "alpha": 8, "quantize": quantize, **settings})
    return load_policy(
        ModelFolder.open(str(where), FIELD),
        LoadOptions(MODELS, CPU, frozen=False, adapter=lora.AdapterSpec(config, (0, "test"))),
    )


def moved(policy: Policy) -> Policy:
    """The policy after one large optimizer step."""
    update(policy, make_optimizer(policy, GRPO.optim), sampled_rows(policy), objective_of(GRPO), 4096)
    return policy


def scores(policy: Policy, scored_rows: list[Any]) -> torch.Tensor:
    return torch.cat(logp_of(policy, [row.rollout for row in scored_rows], 4096))


def plain(where: Path) -> Policy:
    return load_policy(ModelFolder.open(str(where), FIELD), LoadOptions(MODELS, CPU, frozen=True))


def test_qlora_equals_lora_on_dequantized_weights(folder: Path, tmp_path: Path) -> None:
    """A full-precision base with the dequantized weights gives the same log-probs and gradients."""
    policy = adapted(folder)
    save_policy(policy, tmp_path / "rounded", torch.float32)  # a fresh adapter adds 0
    same, rows = adapted(tmp_path / "rounded", quantize=None), sampled_rows(policy)
    assert {type(layer.base_layer).__name__ for layer in policy.adapter.layers.values()} == {"Linear4bit"}  # type: ignore[union-attr]
    rounding = (scores(policy, rows) - scores(plain(folder), rows)).abs().mean()
    assert 1e-3 < rounding < 1.0
    torch.testing.assert_close(scores(policy, rows), scores(same, rows), rtol=0, atol=1e-4)
    ours, expected = gradient_of(policy, rows, GRPO), gradient_of(same, rows, GRPO)
    assert ours.keys() == expected.keys() and len(ours) == 28
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=1e-6)


def test_qlora_sampler_logp_equals_trainer(folder: Path) -> None:
    policy = moved(adapted(folder))
    rows = sampled_rows(policy, draw=1)
    drawn = torch.cat([torch.tensor(row.rollout.sampler_logp) for row in rows])
    assert (drawn - scores(policy, rows)).abs().max() < 1e-4


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_merged_qlora_student_is_saved_as_full_precision_weights(folder: Path, tmp_path: Path, targets: Any) -> None:
    """Including quantized matrices without an adapter."""
    policy = moved(adapted(folder, targets=targets))
    save_policy(policy, tmp_path / "out", torch.float32)
    ours, start_weights = (load_file(where / "model.safetensors") for where in (tmp_path / "out", folder))
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in start_weights.items()
    }
    assert "quantization_config" not in load_json(tmp_path / "out" / "config.json")
    rows = sampled_rows(policy, draw=2)
    torch.testing.assert_close(scores(plain(tmp_path / "out"), rows), scores(policy, rows), rtol=0, atol=1e-4)


def test_saved_adapter_continues_on_four_bit_weights_and_refuses_to_merge(folder: Path, tmp_path: Path) -> None:
    policy = moved(adapted(folder, output="adapter"))
    save_policy(policy, tmp_path / "out", torch.float32)
    rows = sampled_rows(policy, draw=3)
    again = adapted(tmp_path / "out", output="adapter")
    torch.testing.assert_close(scores(again, rows), scores(policy, rows), rtol=0, atol=1e-5)
    with pytest.raises(
        UserError, match=r"models\.student: .*out is an adapter, which cannot be added to weights in four"
    ):
        adapted(tmp_path / "out", output="merged")


def test_qlora_has_gradients_on_cpus_with_avx512_bf16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    policy = adapted(folder)
    rows = sampled_rows(policy)  # sampled without gradients; bitsandbytes then caches a layout that has none
    assert all(
        gradient.abs().max() > 0 for name, gradient in gradient_of(policy, rows, GRPO).items() if "lora_B" in name
    )


CHANGES = (
    "models.lora.r=4", "models.lora.alpha=8", "models.lora.quantize=nf4", "models.lora.output=adapter",
    "stages.student_rl.sparse.kl_coef=0.01", "stages.teacher_rl.optim.lr=0.01",
    *(f"stages.{stage}.checkpoint_every=1" for stage in ("teacher_rl", "warmup", "opd", "student_rl")),
)  # fmt: skip


@pytest.mark.timeout(400)
def test_qlora_recipe_resumes_bit_for_bit_after_kill(tmp_path: Path) -> None:
    synced: list[Any] = []
    with mock.patch("os.fsync", synced.append):
        result = tiny("run", tmp_path / "whole", changes=CHANGES)
    assert result.code == 0, result.err
    with mock.patch("os.fsync", killed_at(int(0.6 * len(synced)), lambda descriptor: None)), pytest.raises(Killed):
        tiny("run", tmp_path / "out", changes=CHANGES)
    assert tiny("run", tmp_path / "out", changes=CHANGES).code == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    for stage in ("teacher_rl", "opd", "student_rl"):
        metrics = rows(node(tmp_path / "out", "bridge_rl", stage) / "metrics.jsonl")
        assert max(row["sampler_gap"] for row in metrics) < 1e-4
    assert [row["kl_reference"] > 1e-6 for row in metrics] == [
        False,
        True,
    ]  # KL to the weights at the start of the stage
    assert (node(tmp_path / "out", "bridge_rl", "student_rl") / "model" / adapter_files.WEIGHTS).exists()
