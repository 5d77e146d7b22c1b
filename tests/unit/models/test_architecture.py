from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headwater.errors import UnsupportedModelError
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.training_mode import checkpoint_activations, disable_dropout
from tests.support.tiny import CPU, MODELS, tiny_folder, tiny_model

IDS = torch.tensor([[1, 6, 15, 7, 2, 9, 3]])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", "an encoder, with bidirectional attention"),
        ("xlm-roberta", "an encoder, with bidirectional attention"),
        ("t5", "an encoder-decoder"),
        ("bart", "an encoder-decoder"),
        ("vit", "for which transformers"),
        ("qwen2_vl", "for which transformers"),
        ("gemma3", "which reads more than text"),
        ("reformer", "which is random wherever it computes gradients"),
        ("unheard_of", "does not know; upgrade transformers"),
    ],
)
def test_non_causal_model_is_refused_from_its_config(kind: str, reason: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedModelError) as refused:
        assert ModelFolder.open(str(folder), "models.teacher").config
    assert str(refused.value).startswith(f"models.teacher: {folder} is a {kind} model, ") and reason in str(
        refused.value
    )


@pytest.mark.parametrize("kind", ["mistral", "phi3", "starcoder2", "llama"])
@pytest.mark.parametrize("window", [0, -1])
def test_window_of_zero_tokens_is_refused_with_remedy(kind: str, window: int, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", kind, sliding_window=window)
    opened = ModelFolder.open(str(folder), "models.student")
    with pytest.raises(UnsupportedModelError, match=rf"a {kind} model whose sliding_window is {window}, .* write null"):
        assert opened.config
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    assert ModelFolder.open(str(folder), "models.student").config.sliding_window is None


def test_decoder_configuration_of_encoder_is_accepted(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "bert", is_decoder=True)
    assert ModelFolder.open(str(folder), "models.teacher").config.is_decoder


def test_missing_package_is_not_reported_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("This model needs the package `speedy`, which is not installed")

    folder = tiny_folder(tmp_path / "model")
    monkeypatch.setattr("headwater.models.load.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(UnsupportedModelError, match=r"models\.student: .* cannot be loaded \(.*`speedy`"):
        load_policy(ModelFolder.open(str(folder), "models.student"), LoadOptions(MODELS, CPU, frozen=True))


def test_model_without_causal_mask_is_refused_despite_its_config(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "cpmant", dim_head=8, dim_ff=64, prompt_length=4)
    with pytest.raises(UnsupportedModelError, match=r"is a cpmant model"):
        load_policy(ModelFolder.open(str(folder), "models.student"), LoadOptions(MODELS, CPU, frozen=True))


def test_quantized_weights_are_not_trained(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(UnsupportedModelError, match=r"models\.student: .* holds quantized weights"):
        load_policy(ModelFolder.open(str(folder), "models.student"), LoadOptions(MODELS, CPU, frozen=False))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "word_embed_proj_dim": 32, "layerdrop": 0.5}),
        ("gpt_bigcode", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("gpt_neox", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("biogpt", {"hidden_dropout_prob": 0.5, "activation_dropout": 0.5, "layerdrop": 0.5}),
        ("bloom", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("mixtral", {"router_jitter_noise": 0.5, "attention_dropout": 0.5, "num_local_experts": 4}),
        ("phimoe", {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5, "num_local_experts": 4}),
        ("granite", {"attention_dropout": 0.5}),
    ],
)
@torch.no_grad()
def test_training_mode_equals_inference_mode(kind: str, settings: dict[str, Any]) -> None:
    model = tiny_model(kind, **settings)
    expected = model(input_ids=IDS, use_cache=False).logits
    model.train()
    assert (model(input_ids=IDS, use_cache=False).logits - expected).abs().max() > 1e-2  # the settings have an effect
    disable_dropout(model)
    checkpoint_activations(model)
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, expected, rtol=0, atol=1e-5)


def test_attention_softcap_is_computed(tmp_path: Path) -> None:
    """Under transformers' own choice, `sdpa`, Gemma 2 computes no cap."""
    folder = tiny_folder(tmp_path / "model", "gemma2", std=1.0, attn_logit_softcapping=1.0)
    policy = load_policy(ModelFolder.open(str(folder), "models.student"), LoadOptions(MODELS, CPU, frozen=True))
    eager, sdpa = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kind).eval() for kind in ("eager", "sdpa")
    )
    with torch.no_grad():
        actual, capped, uncapped = (model(input_ids=IDS).logits for model in (policy.model, eager, sdpa))
    torch.testing.assert_close(actual, capped, rtol=0, atol=1e-5)
    assert (uncapped - capped).abs().max() > 1e-2
