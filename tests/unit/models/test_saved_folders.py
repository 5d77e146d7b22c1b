"""What is written is the model that was trained: its head, its tokenizer and templates, whatever the files it came from say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from architectures import write_folder
from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.save import save_policy
from tiny import CPU, MODELS, tiny_folder

IDS = torch.tensor([[1, 6, 15, 7, 2]])


def loaded(folder: Path) -> Policy:
    return load_policy(ModelFolder.open(str(folder), "models.student"), LoadOptions(MODELS, CPU, False))


def with_own_head(folder: Path) -> Path:
    """The config still says that the head is the embedding."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    embedding = next(tensor for name, tensor in weights.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
    weights["lm_head.weight"] = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(9)) * 0.1
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def logits_by_the_config(folder: Path) -> torch.Tensor:
    """As an engine computes them that takes its word for it when a config says that the head is the embedding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if model.config.get_text_config().tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untied_head_is_saved_untied(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = loaded(with_own_head(tiny_folder(tmp_path / "m", architecture)))
    with torch.no_grad():
        for parameter in policy.model.parameters():  # as if it had trained, to values that bfloat16 holds
            parameter.copy_((parameter * 1.5).bfloat16().float())
        wanted = policy.model(input_ids=IDS).logits
    save_policy(policy, tmp_path / "saved", dtype)
    torch.testing.assert_close(logits_by_the_config(tmp_path / "saved"), wanted, rtol=0.0, atol=1e-5)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    assert policy.model.config.tie_word_embeddings is False  # and to an engine that is given the policy's weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_head_is_saved_once_and_declared_tied(dtype: torch.dtype, tmp_path: Path) -> None:
    save_policy(loaded(tiny_folder(tmp_path / "m")), tmp_path / "saved", dtype)
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is True


def test_float32_weights_of_bfloat16_model_stay_exact(tmp_path: Path) -> None:
    """DeepSeek-V3's routers choose experts by a score correction that transformers never rounds."""
    write_folder("deepseek_v3", tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    corrections = {
        name: 7.0 + 0.01 * torch.randn(tensor.shape) for name, tensor in weights.items() if "e_score_correction" in name
    }
    assert corrections
    save_file(weights | corrections, path, metadata={"format": "pt"})
    save_policy(loaded(tmp_path / "m"), tmp_path / "saved", torch.bfloat16)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, tensor in corrections.items():
        assert saved[name].dtype == torch.float32 and torch.equal(saved[name], tensor)
    assert {tensor.dtype for name, tensor in saved.items() if name not in corrections} == {torch.bfloat16}


def test_untied_config_without_head_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"lack 1 weights .* such as lm_head\.weight"):
        loaded(folder)


# ------------------------------------------------------------------------------------------------------------- tokenizers


def test_named_templates_and_added_tokens_survive_saving(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = {"default": words.chat_template, "tool_use": "{{ messages[0]['content'] }} with tools"}
    words.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    save_policy(loaded(folder), tmp_path / "saved", torch.float32)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.chat_template == words.chat_template
    assert again("17+45")["input_ids"] == words("17+45")["input_ids"]


def test_unsavable_tokenizer_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ messages[0]['content'] }}")
    policy, words = loaded(folder), AutoTokenizer.from_pretrained(folder)

    def refuse(*args: Any, **more: Any) -> None:
        raise ValueError("Custom PreTokenizer cannot be serialized")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)
    save_policy(policy, tmp_path / "saved", torch.float32)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("17+45")["input_ids"] == words("17+45")["input_ids"]
    assert again.chat_template == words.chat_template and set(again.chat_template) == {"default", "tool_use"}
    assert not (tmp_path / "saved" / "model.safetensors.index.json").exists()


def test_tokenizer_changed_by_saving_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "m")
    policy, words = loaded(folder), AutoTokenizer.from_pretrained(folder)
    plain = PreTrainedTokenizerFast.save_pretrained

    def lose_a_template(self: Any, target: Any, **more: Any) -> Any:
        written = plain(self, target, **more)
        (Path(target) / "chat_template.jinja").unlink()
        return written

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", lose_a_template)
    save_policy(policy, tmp_path / "saved", torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == words.chat_template is not None


def test_unnamed_unknown_token_is_none(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unk_token": ""}))
    policy = loaded(folder)
    assert policy.tokenizer.unk_token_id is None and policy.tokenizer.all_special_ids == [3, 0]
    assert policy.tokenizer("17+45")["input_ids"] == AutoTokenizer.from_pretrained(folder)("17+45")["input_ids"]
    save_policy(policy, tmp_path / "saved", torch.float32)
    assert loaded(tmp_path / "saved").tokenizer.all_special_ids == [3, 0]


def test_full_disk_is_not_reported_as_unsavable_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = loaded(tiny_folder(tmp_path / "m"))

    def full(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_policy(policy, tmp_path / "saved", torch.float32)


def test_config_of_folder_is_read_once_for_its_tokenizer(qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ModelFolder.open(str(qwen3_folder), "models.student")
    assert folder.config.model_type == "qwen3"

    def read_again(*args: Any, **more: Any) -> None:
        raise AssertionError("the config was read again")

    monkeypatch.setattr(AutoConfig, "from_pretrained", read_again)
    first, second = folder.tokenizer, folder.read_tokenizer()
    assert first is not second and first("17+45")["input_ids"] == second("17+45")["input_ids"] != []
