"""The doctor saves and loads each model that will train; what would be lost or changed at the end of a stage is a finding."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from headwater.config.builtin import find_recipe
from headwater.doctor import saving_checks
from headwater.doctor.checks import CHECKS, diagnose, examine
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding
from headwater.models.lora import Adapter
from headwater.models.policy import Policy
from headwater.runs.inputs import RunInputs
from runs import TINY
from tiny import tiny_folder

SAVING = [check for check in CHECKS if check.run is saving_checks.saving]


def folders(path: Path, *architectures: str) -> list[str]:
    student, teacher = architectures * 2 if len(architectures) == 1 else architectures
    return [
        f"models.student={tiny_folder(path / 'student', student)}",
        f"models.teacher={tiny_folder(path / 'teacher', teacher, seed=1)}",
    ]


def findings_of(*changes: str, arms: tuple[str, ...] = ("bridge_rl",)) -> list[Finding]:
    recipe = find_recipe("pocket", [*TINY, *changes])
    with RunInputs(recipe, need_answers=False) as inputs:
        return list(examine(DoctorContext(inputs, arms, (0,), Path("out")), SAVING).findings)


ADAPTER = "models.lora={r: 2, alpha: 4, roles: [student, teacher]}"


@pytest.mark.parametrize(
    "changes", [(), (ADAPTER,), (ADAPTER, "models.lora.output=adapter"), ("models.dtype=bfloat16",)]
)
@pytest.mark.parametrize("size", [saving_checks.ROUND_TRIP_PARAMETERS, 0])
def test_savable_model_has_no_finding(
    changes: tuple[str, ...], size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving_checks, "ROUND_TRIP_PARAMETERS", size)
    assert findings_of(*folders(tmp_path, "qwen3"), *changes) == []


def test_unwritable_generation_config_is_only_noted(tmp_path: Path) -> None:
    changes = folders(tmp_path, "llama")
    path = tmp_path / "student" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6}))
    examination = diagnose(find_recipe("pocket", [*TINY, *changes]), ("bridge_rl",), (0,), tmp_path / "out")
    assert examination.errors == ()
    corrected = [finding for finding in examination.findings if finding.name == "generation-config-corrected"]
    assert len(corrected) == 1 and corrected[0].severity == "note"
    assert "models.student" in corrected[0].evidence and "do_sample is set to true" in corrected[0].evidence


def test_unsavable_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise ValueError("Some generation parameters\nare set")

    changes = folders(tmp_path, "qwen3")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", refuse)
    findings = findings_of(*changes, arms=("direct_grpo",))  # which does not train the teacher
    assert [(finding.name, finding.severity) for finding in findings] == [("cannot-be-saved", "error")]
    assert "models.student" in findings[0].evidence
    assert "(ValueError: Some generation parameters are set)" in findings[0].evidence


@pytest.mark.parametrize("size", [saving_checks.ROUND_TRIP_PARAMETERS, 0])
def test_adapter_losing_weights_in_merge_is_named(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Adapter.merged_weights

    def without_one(self: Adapter, model: Any) -> Iterator[tuple[str, Tensor]]:
        return (pair for pair in whole(self, model) if "layers.1.mlp.up_proj" not in pair[0])

    monkeypatch.setattr(Adapter, "merged_weights", without_one)
    monkeypatch.setattr(saving_checks, "ROUND_TRIP_PARAMETERS", size)
    [finding] = findings_of(*folders(tmp_path, "qwen3"), ADAPTER, arms=("direct_grpo",))
    assert (finding.name, finding.severity) == ("cannot-be-saved", "error")
    assert ("lack 1 weights" in finding.evidence) is (size > 0)
    assert ("parameters would be saved" in finding.evidence) is (size == 0)


def test_wrong_merge_is_named_although_fresh_adapter_adds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def base_alone(self: Adapter, model: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.state_dict().items():
            if ".lora_" not in name:
                yield name.replace(".base_layer", ""), tensor

    monkeypatch.setattr(Adapter, "merged_weights", base_alone)
    [finding] = findings_of(*folders(tmp_path, "llama"), ADAPTER, arms=("direct_grpo",))
    assert (finding.name, finding.severity) == ("saved-model-differs", "error")


def test_adapter_is_fresh_again_after_check(tmp_path: Path) -> None:
    recipe = find_recipe("pocket", [*TINY, *folders(tmp_path, "qwen3"), ADAPTER])
    with RunInputs(recipe, need_answers=False) as inputs:
        context = DoctorContext(inputs, ("direct_grpo",), (0,), Path("out"))
        assert examine(context, SAVING).findings == ()
        adapter = context.policy("student", False).adapter
        assert adapter is not None
        assert not any(layer.lora_B["default"].weight.any() for layer in adapter.layers.values())


@pytest.mark.parametrize("size", [saving_checks.ROUND_TRIP_PARAMETERS, 0])
def test_tokenizer_changed_by_saving_is_named(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_another(tokenizer: Any, source: Any, folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder)
        again.eos_token = again.pad_token
        PreTrainedTokenizerFast.save_pretrained(again, folder)

    monkeypatch.setattr("headwater.models.save._write_tokenizer", write_another)
    monkeypatch.setattr(saving_checks, "ROUND_TRIP_PARAMETERS", size)
    [finding] = findings_of(*folders(tmp_path, "qwen3"), arms=("direct_grpo",))
    assert (finding.name, finding.severity) == ("saved-tokenizer-differs", "error")


def test_full_temporary_folder_is_not_reported_as_model_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving_checks, "save_policy", full)
    [finding] = findings_of(*folders(tmp_path, "qwen3"), arms=("direct_grpo",))
    assert (finding.name, finding.severity) == ("saving-not-tried", "warning")


@pytest.mark.parametrize(("role", "value"), [("student", torch.nan), ("teacher", torch.inf)])
def test_non_finite_weights_unused_by_samples_are_found(role: str, value: float, tmp_path: Path) -> None:
    """The teacher of a distillation is not sampled, and the embedding of an unused token shows in no log-prob."""
    changes = folders(tmp_path, "qwen3")
    path = tmp_path / role / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.self_attn.k_norm.weight"][3] = value
    save_file(weights, path, metadata={"format": "pt"})
    examination = diagnose(find_recipe("pocket", [*TINY, *changes]), ("raw_teacher",), (0,), tmp_path / "out")
    named = list(examination.errors)
    assert [finding.name for finding in named] == ["not-finite"]
    assert (
        f"models.{role}: 1 of the 8 numbers in its weight model.layers.1.self_attn.k_norm.weight" in named[0].evidence
    )


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "awq", "bitsandbytes"])
def test_quantized_trained_model_is_named_before_reading_weights(method: str, tmp_path: Path) -> None:
    changes = folders(tmp_path, "qwen3")
    for role in ("student", "teacher"):
        path = tmp_path / role / "config.json"
        quantization = {"quant_method": method, "load_in_4bit": True, "bits": 4}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    checks = [check for check in CHECKS if check.title == "weights that can be trained"]

    def named(*more: str, arm: str) -> list[str]:
        with RunInputs(find_recipe("pocket", [*TINY, *changes, *more]), need_answers=False) as inputs:
            findings = examine(DoctorContext(inputs, (arm,), (0,), Path("out")), checks).findings
        assert all(
            finding.name == "model-unsupported" and f"quantized weights ({method})" in finding.evidence
            for finding in findings
        )
        return [finding.evidence.partition(":")[0] for finding in findings]

    assert named(arm="bridge_rl") == ["models.student", "models.teacher"]
    assert named(arm="raw_teacher") == ["models.student"]  # this teacher does not train
    assert named(ADAPTER, arm="raw_teacher") == ([] if method == "bitsandbytes" else ["models.student"])
