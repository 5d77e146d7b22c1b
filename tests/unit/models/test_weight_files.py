"""Weights that do not fit their config.json, their index or one another are refused by name; what transformers recomputes is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from headwater.errors import UserError
from headwater.models import fsdp_weights
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from tiny import CPU, MODELS, tiny_folder

Weights = dict[str, Tensor]
IDS = torch.tensor([[1, 6, 15, 7, 2]])


def opened(folder: Path) -> ModelFolder:
    return ModelFolder.open(str(folder), "models.student")


def loaded(folder: Path, frozen: bool = True) -> Policy:
    return load_policy(opened(folder), LoadOptions(MODELS, CPU, frozen))


def with_weights(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def sharded(folder: Path, **more: Any) -> Path:
    """The same model in two shards with an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, tensors in shards.items():
        save_file({name: weights[name] for name in tensors}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# ------------------------------------------------------------------------------------- weights that no part of the model takes


def test_unexpected_bias_weights_are_refused(tmp_path: Path) -> None:
    folder = with_config(tiny_folder(tmp_path / "m", "qwen2"), model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(
        UserError,
        match=r"^models\.student: .* hold 6 weights that LlamaForCausalLM,.* such as .*k_proj\.bias; they would be",
    ):
        loaded(folder)


def test_unexpected_norm_weights_are_refused(tmp_path: Path) -> None:
    folder = with_config(tiny_folder(tmp_path / "m"), model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match=r"hold 4 weights that LlamaForCausalLM,.*self_attn\.k_norm\.weight"):
        loaded(folder)


def test_layers_beyond_config_are_refused(tmp_path: Path) -> None:
    folder = with_config(tiny_folder(tmp_path / "m", num_hidden_layers=3), num_hidden_layers=2, layer_types=None)
    with pytest.raises(UserError, match=r"hold 11 weights that Qwen3ForCausalLM,.* model\.layers\.2\."):
        loaded(folder)


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("qwen3", ("intermediate_size",)),
        ("llama", ("intermediate_size", "head_dim")),
        ("mistral", ("intermediate_size",)),
        ("gemma", ("intermediate_size", "hidden_size")),
    ],
)
def test_config_without_size_is_refused_before_allocation(
    kind: str, left_out: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path / "model", kind)
    path = folder / "config.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name not in left_out}
    path.write_text(json.dumps(kept | {"num_attention_heads": 4, "num_key_value_heads": 2}))
    with torch.device("meta"):
        wanted = sum(
            parameter.numel() for parameter in AutoModelForCausalLM.from_config(opened(folder).config).parameters()
        )
    count = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert wanted > 20 * count
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("reserves the memory"))
    with pytest.raises(UserError, match=rf"a model of {wanted:,} weights, and its files hold {count:,};"):
        loaded(folder)


@pytest.mark.parametrize("head", ["score.weight", "v_head.summary.weight", "classifier.weight"])
def test_reward_head_is_refused_beside_whole_language_model(head: str, tmp_path: Path) -> None:
    folder = with_weights(tiny_folder(tmp_path / "m"), lambda tensors: {**tensors, head: torch.ones(1, 32)})
    with pytest.raises(UserError, match=rf"such as {head} and would be a classifier's or a reward model's"):
        loaded(folder)


@pytest.mark.parametrize(
    "kind", ["Qwen3ForSequenceClassification", "LlamaForTokenClassification", "Qwen2ForRewardModel"]
)
def test_classifier_is_refused_by_class_before_reading_weights(kind: str, tmp_path: Path) -> None:
    folder = with_config(tiny_folder(tmp_path / "m"), architectures=[kind])
    with pytest.raises(
        UserError, match=rf"^models\.student: .* is no language model \(its config\.json names {kind}\)"
    ):
        _ = opened(folder).config


def test_architecture_of_other_type_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = with_config(tiny_folder(tmp_path / "m"), architectures=[["Qwen3ForSequenceClassification"]])
    with pytest.raises(UserError, match=r"is no language model \(its config\.json names \['Qwen3ForSeq"):
        _ = opened(folder).config


HARMLESS: dict[str, tuple[str, dict[str, Any], Weights]] = {
    "rotary frequencies": ("llama", {}, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    "masks of GPT-2": (
        "gpt2", {}, {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)},
    ),
    "masks of GPT-NeoX": (
        "gpt_neox", {},
        {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8), "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9)},
    ),
    "a tied head stored twice": ("qwen3", {}, {}),
    "prediction of further tokens": ("qwen3", {}, {"mtp.fc.weight": torch.ones(32, 64)}),
    "a further layer that the config announces": (
        "qwen3", {"num_nextn_predict_layers": 1}, {"model.layers.2.eh_proj.weight": torch.ones(32, 64)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_recomputed_or_unused_weights_are_accepted(name: str, tmp_path: Path) -> None:
    architecture, settings, extra = HARMLESS[name]
    folder = tiny_folder(tmp_path / "m", architecture, **settings)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    if not extra:
        extra = {"lm_head.weight": plain.lm_head.weight.detach().clone()}
    with_weights(folder, lambda tensors: {**tensors, **extra})
    policy = loaded(folder)
    assert torch.equal(policy.model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert policy.model.config.tie_word_embeddings is plain.config.tie_word_embeddings


def test_bias_named_like_mask_is_refused(tmp_path: Path) -> None:
    folder = with_weights(
        tiny_folder(tmp_path / "m"), lambda tensors: {**tensors, "model.layers.0.self_attn.bias": torch.ones(32)}
    )
    with pytest.raises(UserError, match=r"such as model\.layers\.0\.self_attn\.bias;"):
        loaded(folder)


# --------------------------------------------------------------------------------------------------------- files and index


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    wanted = AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits
    sharded(folder)
    (folder / "model.safetensors").unlink()
    save_file(
        {"model.norm.weight": torch.zeros(32)}, folder / "model-00001-of-00003.safetensors"
    )  # of an earlier download
    assert torch.equal(loaded(folder).model(input_ids=IDS).logits, wanted)


def stale_single_file(folder: Path) -> None:
    pass


def shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_of_another_checkpoint(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(path), "model.extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})


def tensor_twice(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    first, second = (folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    name = sorted(load_file(first))[0]
    save_file({**load_file(second), name: torch.zeros(3)}, second, metadata={"format": "pt"})


def tensor_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors.pop("model.norm.weight", None) or tensors.pop(sorted(tensors)[-1])
    save_file(tensors, path, metadata={"format": "pt"})


def stale_shards(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def no_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (stale_single_file, r"it holds model\.safetensors and also model\.safetensors\.index\.json, which lists other files"),
        (stale_shards, r"it holds model\.safetensors and also model-00001-of-00002\.safetensors, a shard without an index"),
        (shard_missing, r"index\.json lists model-00002-of-00002\.safetensors, which is not there: download it again"),
        (shard_of_another_checkpoint, r"says that model\.extra\.weight is in no file, and it is in model-00001-of"),
        (tensor_twice, r"model-00001-of-00002\.safetensors and model-00002-of-00002\.safetensors both hold"),
        (tensor_missing, r"is in model-00001-of-00002\.safetensors, and it is in no file"),
        (no_index, r"it holds model-00001-of-00002\.safetensors, and no model\.safetensors or model\.safetensors\.index\.json"),
    ],
)  # fmt: skip
def test_shard_index_mismatch_is_refused_at_open(spoil: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    folder = sharded(tiny_folder(tmp_path / "m"))
    spoil(folder)
    with pytest.raises(UserError, match=rf"^models\.student: .* cannot be loaded \(.*{sentence}"):
        opened(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_quantized_values_without_scales_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = with_weights(tiny_folder(tmp_path / "m"), lambda tensors: {**tensors, name: tensors[name].to(dtype)})
    with pytest.raises(
        UserError, match=rf"{name} is stored as [A-Z0-9_]+, and config\.json has no quantization_config"
    ):
        opened(folder)


# ---------------------------------------------------------------------------------------- the loader of shards for torchrun


def test_sharded_loader_refuses_ambiguous_folders(tmp_path: Path) -> None:
    """None means that every rank reads the whole model as a single process does, with its refusals."""

    def direct(folder: Path) -> bool:
        return fsdp_weights.build_without_weights(opened(folder), torch.float32) is not None

    assert direct(tiny_folder(tmp_path / "plain"))
    shards = sharded(tiny_folder(tmp_path / "shards"))
    (shards / "model.safetensors").unlink()
    assert direct(shards)
    save_file({"model.norm.weight": torch.zeros(32)}, shards / "model-00001-of-00003.safetensors")
    assert not direct(shards)  # it would read the stray file too
    head = torch.randn(len(opened(shards).tokenizer), 32)
    two_heads = with_weights(tiny_folder(tmp_path / "two"), lambda tensors: {**tensors, "lm_head.weight": head})
    assert not direct(two_heads)
    biased = with_weights(
        tiny_folder(tmp_path / "bias"), lambda tensors: {**tensors, "model.layers.0.mlp.bias": torch.ones(2)}
    )
    assert not direct(biased)
    old = with_weights(
        tiny_folder(tmp_path / "old", "llama"),
        lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    )
    assert direct(old)
