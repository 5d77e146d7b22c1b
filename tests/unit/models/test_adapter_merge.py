"""Adapters made by peft itself: a merged one gives the log-probs of peft's own adapted model, or is refused by name."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from headwater.errors import UserError
from headwater.models import adapter_files
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.save import merge_adapter
from runs import load_json
from tiny import CPU, MODELS, tiny_folder
from tools.pretrain.pocket import make_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra `lora` is not installed")

FIELD = "models.student"
IDS = torch.tensor([[1, 6, 15, 7, 2, 9, 8, 4], [1, 5, 5, 15, 13, 11, 15, 6]])


def logp(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = torch.log_softmax(model(input_ids=IDS).logits.float(), dim=-1)
    return result


def made_by_peft(base: Path, out: Path, seed: int = 0, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Save an adapter whose every trained tensor is far from its start; returns peft's log-probs without and with it."""
    from peft import LoraConfig, get_peft_model

    wanted: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        plain = logp(model)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **wanted)).eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    change_config(out, base_model_name_or_path=str(base))
    return plain, logp(adapted)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / adapter_files.CONFIG
    path.write_text(json.dumps({**load_json(path), **changes}))


def opened(folder: Path) -> Policy:
    return load_policy(ModelFolder.open(str(folder), FIELD), LoadOptions(MODELS, CPU, frozen=True))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        opened(folder)
    assert str(raised.value).startswith(FIELD)
    return str(raised.value)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MERGED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gaussian": ("qwen3", {}, {"init_lora_weights": "gaussian"}),
    "orthogonal": ("qwen3", {}, {"init_lora_weights": "orthogonal"}),
    "mica": ("qwen3", {}, {"init_lora_weights": "mica"}),
    "eva": ("qwen3", {}, {"init_lora_weights": "eva"}),
    "rslora": ("qwen3", {}, {"use_rslora": True}),
    "patterns": (
        "qwen3",
        {},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {r".*layers\.1\..*": 32}},
    ),
    "one layer": ("qwen3", {}, {"layers_to_transform": [1]}),
    "excluded": ("qwen3", {}, {"exclude_modules": r".*layers\.0.*"}),
    "regex targets": ("qwen3", {}, {"target_modules": r".*\.(q|v)_proj"}),
    "dora": ("qwen3", {}, {"use_dora": True}),
    "dora on Conv1D": ("gpt2", GPT2, {"use_dora": True, "target_modules": ["c_attn", "c_proj"]}),
    "Conv1D": ("gpt2", GPT2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "biases": ("qwen2", {}, {"bias": "all"}),
    "biases of adapted layers": ("qwen2", {}, {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}),
    "a bias of the adapter": ("qwen2", {}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "head saved whole": ("qwen3", {"tied": False}, {"modules_to_save": ["lm_head"]}),
    "tied head saved whole": ("qwen3", {}, {"modules_to_save": ["lm_head"]}),
    "tied embedding saved whole": ("qwen3", {}, {"modules_to_save": ["embed_tokens"]}),
    "norms saved whole": ("qwen3", {}, {"modules_to_save": ["input_layernorm", "norm"]}),
    "head": ("qwen3", {"tied": False}, {"target_modules": ["q_proj", "lm_head"]}),
    "tied head": ("qwen3", {}, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("qwen3", {"tied": False}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding": ("qwen3", {}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tokens": ("qwen3", {"tied": False}, {"trainable_token_indices": [6, 9]}),
    "tied tokens": ("qwen3", {}, {"trainable_token_indices": [6, 9]}),
    "experts of Mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"target_modules": "all-linear"},
    ),
    "experts of Qwen3-MoE": ("qwen3_moe", MOE, {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("kind", MERGED)
def test_merge_equals_peft_outputs(tmp_path: Path, kind: str) -> None:
    architecture, config, settings = MERGED[kind]
    base = tiny_folder(tmp_path / "base", architecture, **config)
    plain, wanted = made_by_peft(base, tmp_path / "adapter", **settings)
    assert (wanted - plain).abs().max() > 0.05
    torch.testing.assert_close(logp(opened(tmp_path / "adapter").model), wanted, rtol=0, atol=2e-5)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", "float32")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logp(written), wanted, rtol=0, atol=2e-5)


def test_merge_refuses_trained_tokens_beside_adapter_on_tied_head(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [6, 9]}
    made_by_peft(tiny_folder(tmp_path / "base"), tmp_path / "adapter", **settings)
    assert "whose head is tied to its embedding" in refusal(tmp_path / "adapter")


@pytest.fixture(scope="module")
def plain_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    made_by_peft(tiny_folder(folder / "base", "qwen2"), folder / "adapter")
    return folder / "adapter"


CHANGED_BASE = ["olora", "OLoRA", "pissa", "pissa_niter_4", "corda", "loftq", "lora_ga", "an_unknown_one"]


@pytest.mark.parametrize("start", CHANGED_BASE)
def test_adapter_on_changed_base_is_refused_by_name(plain_adapter: Path, tmp_path: Path, start: str) -> None:
    shutil.copytree(plain_adapter, tmp_path / "adapter")
    change_config(tmp_path / "adapter", init_lora_weights=start)
    assert f"init_lora_weights is {start!r}" in refusal(tmp_path / "adapter")
    with pytest.raises(UserError, match="init_lora_weights"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", "float32")
    assert not (tmp_path / "merged").exists()


def test_pissa_adapter_converted_by_peft_merges(tmp_path: Path) -> None:
    """peft's path_initial_model_for_weight_conversion doubles the rank, so that the pair holds the change of the base too."""
    from peft import LoraConfig, get_peft_model

    base = tiny_folder(tmp_path / "base")
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings).eval()
    model.peft_config["default"].init_lora_weights = True  # so that the first pair is saved as it is
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    wanted = logp(model)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    assert load_json(tmp_path / "adapter" / adapter_files.CONFIG)["r"] == 8
    torch.testing.assert_close(logp(opened(tmp_path / "adapter").model), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}, "peft_type is 'PROMPT_TUNING'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"task_type": "FEATURE_EXTRACTION"}, "task_type is 'FEATURE_EXTRACTION'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config"),
        ({"monteclora_config": {"num_samples": 2}}, "monteclora_config"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"velora_config": {"num_groups": 4}}, "velora_config"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"a_setting_of_next_year": 1}, "a_setting_of_next_year"),
        ({"revision": "v2"}, "revision 'v2'"),
        ({"alpha_pattern": {"(a+)+b": 4}}, r"alpha_pattern holds '(a+)+b'"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern holds '('"),
        ({"rank_pattern": {"(.|.)" * 30 + "x": 4}}, "rank_pattern holds '(.|.)(.|.)"),  # 2^30 ways to fail
        ({"rank_pattern": {"q_proj": "many"}}, "rank_pattern gives 'many' for 'q_proj'"),
        ({"modules_to_save": 3}, "modules_to_save is 3, which must be a list of names"),
        ({"use_rslora": "no"}, "use_rslora is 'no', which must be true or false"),
        ({"bias": "some"}, "some"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is no mapping"),
        ({"alpha_pattern": {f"x{i}": 4 for i in range(5000)}}, "alpha_pattern holds 5,000 entries; at most 4,096"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"r": True}, "r True"),
        ({"r": 2}, "does not fit its base model"),
        ({"use_dora": True}, "does not fit its base model"),
        ({"lora_bias": True}, "does not fit its base model"),
        ({"modules_to_save": ["lm_head"]}, "says that it trained lm_head, but holds no weights of it"),
        ({"trainable_token_indices": [1]}, "holds no weights of it"),
        ({"rank_pattern": {"v_proj": 4, "q_proj": 8}}, "does not fit its base model"),
    ],
)  # fmt: skip
def test_unsupported_adapter_type_is_refused_by_name(
    plain_adapter: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(plain_adapter, tmp_path / "adapter")
    change_config(tmp_path / "adapter", **changes)
    assert message in refusal(tmp_path / "adapter")


def renamed(folder: Path, new: Callable[[str], str]) -> None:
    path = folder / adapter_files.WEIGHTS
    save_file({new(name): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "new",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: f"module.{name}",
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    ],
    ids=["no prefix", "adapter name", "data parallel", "checkpointing", "compiled"],
)
def test_adapter_names_of_other_programs_are_recognised(tmp_path: Path, new: Callable[[str], str]) -> None:
    base = tiny_folder(tmp_path / "base")
    _, wanted = made_by_peft(base, tmp_path / "adapter")
    renamed(tmp_path / "adapter", new)
    torch.testing.assert_close(logp(opened(tmp_path / "adapter").model), wanted, rtol=0, atol=2e-5)


def test_adapter_on_other_base_or_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_folder(tmp_path / "base")
    made_by_peft(base, tmp_path / "adapter")
    renamed(tmp_path / "adapter", lambda name: name.replace("model.layers", "transformer.h"))
    assert "does not fit its base model" in refusal(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(90)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "resized")
    make_tokenizer().save_pretrained(tmp_path / "resized")
    assert "resize_token_embeddings(90) on the base" in refusal(tmp_path / "resized")


def test_adapter_in_older_expert_layout_merges(tmp_path: Path) -> None:
    """transformers 4 kept Mixtral's experts as layers of their own; transformers 5 fuses them, and peft fuses the pairs."""
    base = tiny_folder(tmp_path / "base", "mixtral", num_local_experts=2, num_experts_per_tok=2)
    folder = tmp_path / "adapter"
    made_by_peft(base, folder, target_modules=["q_proj"])
    change_config(folder, target_modules=["w1", "w2", "w3"])
    sizes = {"w1": (32, 64), "w2": (64, 32), "w3": (32, 64)}
    prefix = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.{}"
    tensors = {}
    for layer in range(2):
        for expert in range(2):
            for matrix, (inputs, outputs) in sizes.items():
                path = prefix.format(layer, expert, matrix)
                tensors[f"{path}.lora_A.weight"] = 0.3 * torch.randn(4, inputs)
                tensors[f"{path}.lora_B.weight"] = 0.3 * torch.randn(outputs, 4)
    save_file(tensors, folder / adapter_files.WEIGHTS)
    # By hand: the fused matrix of an expert is the rows of w1, then those of w3.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for expert in range(2):
                update = {}
                for matrix in sizes:
                    path = prefix.format(layer, expert, matrix)
                    update[matrix] = 2.0 * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
                block.mlp.experts.gate_up_proj[expert] += torch.cat([update["w1"], update["w3"]])
                block.mlp.experts.down_proj[expert] += update["w2"]
    torch.testing.assert_close(logp(opened(folder).model), logp(model), rtol=0, atol=1e-4)


def test_adapter_folders_of_other_trainers_load(tmp_path: Path) -> None:
    """peft writes no tokenizer, some trainers the base's config.json; a whole model beside an adapter is refused."""
    base, folder = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    _, wanted = made_by_peft(base, folder)
    for path in folder.iterdir():
        if path.name not in (adapter_files.CONFIG, adapter_files.WEIGHTS):
            path.unlink()
    shutil.copy(base / "config.json", folder)
    policy = opened(folder)
    torch.testing.assert_close(logp(policy.model), wanted, rtol=0, atol=2e-5)
    assert policy.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    shutil.copy(base / "model.safetensors", folder)
    assert "holds a model and an adapter" in refusal(folder)
    (folder / "model.safetensors").unlink()
    (folder / adapter_files.WEIGHTS).rename(folder / "adapter_model.bin")
    assert "holds no *.safetensors" in refusal(folder)
