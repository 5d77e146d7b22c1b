"""Fuzz cases of model folders: damaged ones, and adapters that peft made."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fuzz_recipes import WrongError, prepare, small
from headwater.config.builtin import find_recipe
from headwater.config.lora import Lora
from headwater.config.recipe import Models
from headwater.models.device import device_of
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.lora import AdapterSpec
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.types import Problem
from malformed_inputs import NASTY, TEMPLATES, leaf, mutated, spoiled
from tools.pretrain.pocket import make_tokenizer

POCKET = ModelFolder.open("pocket:qwen3-student", "models.student").path
GAP = 1e-3
"""Largest difference of log-probs, in nats, that rounding may cause in these small models."""


def opened(folder: Path, frozen: bool = True, adapter: AdapterSpec | None = None) -> Policy:
    models = Models(student=str(folder), teacher=str(folder))
    return load_policy(
        ModelFolder.open(str(folder), "models.student"), LoadOptions(models, device_of("cpu"), frozen, adapter)
    )


PARTS = ["config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
PARTS += ["chat_template.jinja", "model.safetensors", "extra"]
EXTRAS = ["pytorch_model.bin", "x.pt", "adapter_config.json", "model.safetensors.index.json", "code.py"]
EXTRAS += ["special_tokens_map.json", "added_tokens.json", "vocab.json"]


def model_folder(draw: random.Random, folder: Path) -> str:
    target = folder / "m"
    shutil.copytree(POCKET, target)
    for _ in range(draw.randint(1, 2)):
        name = draw.choice(PARTS)
        path = target / name
        if name == "extra":
            extra = draw.choice(EXTRAS)
            (target / extra).write_text(
                json.dumps(mutated(draw, {"weight_map": {"a": "../../x"}, "auto_map": "a.b"})), encoding="utf-8"
            )
        elif not path.is_file():
            continue
        elif draw.random() < 0.1:
            path.unlink()
        elif name == "chat_template.jinja":
            path.write_text(draw.choice(TEMPLATES), encoding="utf-8")
        elif name.endswith(".json") and draw.random() < 0.75:
            with contextlib.suppress(ValueError, RecursionError):
                path.write_text(json.dumps(mutated(draw, json.loads(path.read_bytes()))), encoding="utf-8")
        else:
            path.write_bytes(spoiled(draw, path.read_bytes()))
    raw = small("pocket")
    raw["models"]["student"] = str(target)
    if draw.random() < 0.3:
        raw["models"]["teacher"] = str(target)
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    read = find_recipe(str(path), [])
    prepare(read, "direct_grpo", folder, draw.random() < 0.2)
    policy = opened(target)
    Prompter(policy.tokenizer, read.prompt).ids(Problem.of("17+45", "fuzz"))
    return "loaded"


# Adapters -------------------------------------------------------------------------------------------------------------

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "qwen3": ({}, [*LINEAR, "embed_tokens", "lm_head"]),
    "qwen2": ({"tie_word_embeddings": True}, [*LINEAR, "embed_tokens", "lm_head"]),
    "gpt2": ({}, ["c_attn", "c_proj", "c_fc", "wte", "lm_head"]),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, ["q_proj", "v_proj"]),
    "opt": ({"word_embed_proj_dim": 32}, ["q_proj", "fc1", "fc2", "out_proj"]),
}  # fmt: skip
"""Model type -> settings of its config, and the modules that may be adapted."""
ROWS = torch.tensor([[1, 6, 15, 7, 2, 9, 8, 4], [1, 5, 5, 15, 13, 11, 15, 6]])
STARTS = [
    True,
    False,
    "gaussian",
    "orthogonal",
    "pissa",
    "pissa_niter_2",
    "olora",
    "mica",
    "eva",
    "corda",
    "loftq",
    "lora_ga",
]
TYPES = [
    "IA3",
    "LOHA",
    "LOKR",
    "ADALORA",
    "OFT",
    "BOFT",
    "VERA",
    "PROMPT_TUNING",
    "XLORA",
    "lora",
    "LORA ",
    None,
    3,
    ["LORA"],
]


def small_model(kind: str, settings: dict[str, Any]) -> Any:
    """A random model whose distributions are far from uniform."""
    tokenizer = make_tokenizer()
    common = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common | settings)).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or (name.endswith("bias") and "norm" not in name):
                weight.normal_(0.0, 0.2)
    return model


def adapter_settings(draw: random.Random, targets: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"r": draw.choice([1, 2, 4]), "lora_alpha": draw.choice([1, 4, 16])}
    settings["target_modules"] = draw.choice(
        [draw.sample(targets, draw.randint(1, 3)), "all-linear", rf".*\.({targets[0]})"]
    )
    choices: dict[str, list[Any]] = {
        "use_rslora": [True], "use_dora": [True], "bias": ["all", "lora_only"], "lora_bias": [True], "lora_dropout": [0.3],
        "init_lora_weights": STARTS, "rank_pattern": [{targets[0]: 3}, {rf".*\.1\..*{targets[0]}": 1}],
        "alpha_pattern": [{targets[0]: 3}], "layers_to_transform": [[0], 1], "exclude_modules": [[targets[0]]],
        "modules_to_save": [["lm_head"], [targets[-2]], ["nothing"]], "trainable_token_indices": [[3, 5]],
        "layer_replication": [[[0, 2], [1, 2]]], "fan_in_fan_out": [True], "use_qalora": [True],
        "alora_invocation_tokens": [[3]],
        "target_parameters": [["mlp.experts.gate_up_proj"], ["mlp.gate.weight"]],
    }  # fmt: skip
    for name in draw.sample(list(choices), draw.choice([0, 1, 1, 2, 3])):
        settings[name] = draw.choice(choices[name])
    return settings


def made_by_peft(draw: random.Random, model: Any, base: Path, out: Path, targets: list[str]) -> Tensor | None:
    """Save an adapter of drawn settings, far from its start; returns the adapted model's log-probs, None if peft refuses."""
    from peft import LoraConfig, get_peft_model

    try:
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **adapter_settings(draw, targets))).eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        wanted = log_probs(adapted)
        adapted.save_pretrained(out)
    except Exception:  # whatever peft says of settings that do not go together
        return None
    path = out / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_bytes()), "base_model_name_or_path": str(base)}), encoding="utf-8"
    )
    return wanted


def log_probs(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ROWS).logits.float().log_softmax(-1)
    return result


def spoil_adapter(draw: random.Random, adapter: Path) -> str:
    """Damage an adapter's files. Returns what was done to its tensors, if anything."""
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    settings = json.loads(config.read_bytes())
    kind = draw.choice(["config", "config", "field", "type", "base", "tensors", "tensors", "tensors", "bytes", "extra"])
    if kind == "config":
        settings = mutated(draw, settings)
    elif kind == "field":
        settings[draw.choice(list(settings))] = leaf(draw)
    elif kind == "type":
        settings["peft_type"] = draw.choice(TYPES)
    elif kind == "base":
        settings["base_model_name_or_path"] = draw.choice([None, str(adapter), "a/b", "base", *NASTY])
    elif kind == "extra":
        name = draw.choice(
            ["config.json", "tokenizer_config.json", "model.safetensors.index.json", "x.bin", "added_tokens.json"]
        )
        (adapter / name).write_text(
            json.dumps(mutated(draw, {"weight_map": {"a": "b"}, "model_type": "qwen3"})), encoding="utf-8"
        )
    elif draw.random() < 0.1:
        weights.unlink()
    elif kind == "bytes":
        weights.write_bytes(spoiled(draw, weights.read_bytes()))
    else:
        kind, tensors = spoiled_tensors(draw, load_file(weights))
        save_file(tensors, weights)
    with contextlib.suppress(ValueError, RecursionError, UnicodeEncodeError):
        config.write_text(json.dumps(settings), encoding="utf-8")
    return kind


def spoiled_tensors(draw: random.Random, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    types = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn]
    changes: dict[str, Any] = {
        "dropped": {}, "renamed": {name.replace(".layers.", ".layer.") + "x": tensor}, "in a wrapper": {f"module.{name}": tensor},
        "of another layer": {name.replace(".0.", ".7."): tensor}, "transposed": {name: tensor.t().contiguous()},
        "flat": {name: tensor.flatten()}, "twice": {name: tensor, f"module.{name}": tensor.clone()},
        "empty": {name: tensor[:0].clone()}, "wider": {name: torch.cat([tensor, tensor], -1)},
        "of another type": {name: tensor.to(draw.choice(types))}, "not a number": {name: tensor * float("nan")},
        "and more": {name: tensor, draw.choice(["", "a", "base_model.model.x.lora_A.weight"]): tensor.clone()},
    }  # fmt: skip
    kind = draw.choice(list(changes))
    return kind, tensors | changes[kind]


def placement(config: Path) -> dict[str, Any]:
    """Fields of an adapter's config that place it in the model; empty if the config cannot be read."""
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        settings = json.loads(config.read_bytes())
        return {field: settings.get(field) for field in fields}
    return {}


def adapter(draw: random.Random, folder: Path) -> str:
    """An adapter that peft made, perhaps damaged. One that loads gives the log-probs that peft gives with it."""
    from peft import PeftModel

    torch.manual_seed(draw.randrange(2**31))
    kind = draw.choice(list(ADAPTED))
    settings, targets = ADAPTED[kind]
    model = small_model(kind, settings)
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = made_by_peft(draw, model, folder / "base", folder / "adapter", targets)
    if wanted is None:
        return "unlike peft"
    config = folder / "adapter" / "adapter_config.json"
    places = placement(config)
    damage = spoil_adapter(draw, folder / "adapter") if draw.random() < 0.6 else ""
    if draw.random() < 0.25:
        raw = small("pocket")
        raw["models"]["student"] = raw["models"]["teacher"] = str(folder / "adapter")
        (folder / "r.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        prepare(find_recipe(str(folder / "r.yaml"), []), "direct_grpo", folder, draw.random() < 0.1)
    continues = draw.random() < 0.2
    spec = AdapterSpec(Lora(output="adapter"), (0, "fuzz")) if continues else None
    policy = opened(folder / "adapter", not continues, spec)
    if placement(config) != places:  # peft leaves out tensors of the file that the changed config does not place
        return "read here alone"
    if damage not in ("", "in a wrapper"):  # peft leaves out a tensor with a wrapper in its name
        try:
            plain = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wanted = log_probs(PeftModel.from_pretrained(plain, str(folder / "adapter")).eval())
        except Exception:  # read here, and not by peft
            return "read here alone"
    compare(
        log_probs(policy.model),
        wanted,
        f"{kind} with {(folder / 'adapter/adapter_config.json').read_text(encoding='utf-8')}",
    )
    return "loaded"


def compare(actual: Tensor, wanted: Tensor, what: str) -> None:
    gap = (actual.double() - wanted.double()).abs().nan_to_num(0.0)
    if not torch.equal(actual.isnan(), wanted.isnan()) or float(gap.max()) > GAP:
        raise WrongError(f"log-probs differ by up to {float(gap.max()):.2g} nats: {what}")


ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"],
    "bias": "none", "use_rslora": False, "use_dora": False, "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "layers_to_transform": None, "target_parameters": None, "trainable_token_indices": None,
    "lora_bias": False, "fan_in_fan_out": False, "layer_replication": None, "revision": None, "base_model_name_or_path": POCKET,
}  # fmt: skip
"""What peft writes of an adapter, as far as it matters for merging."""


def adapter_values(draw: random.Random) -> Any:
    """Values of an adapter's config that are likely, possible or hostile."""
    likely: list[Any] = ["pissa", "olora", "eva", "gaussian", "all", "lora_only", ["lm_head"], ["norm"], {"q_proj": 2}]
    return (
        draw.choice([*likely, {"(a+)+$": 3}, [1, 2], True, 2, 1e30, "SEQ_CLS", "IA3"])
        if draw.random() < 0.6
        else leaf(draw)
    )


def adapter_folder(draw: random.Random, folder: Path) -> str:
    """An adapter of the pocket student, its config and its tensors changed, merged as every command merges it."""
    target = folder / "a"
    model = json.loads(Path(POCKET, "config.json").read_bytes())
    hidden = model["hidden_size"]
    sizes = {
        "self_attn.q_proj": (hidden, model["num_attention_heads"] * model["head_dim"]),
        "mlp.down_proj": (model["intermediate_size"], hidden),
    }
    tensors = {}
    for layer in range(model["num_hidden_layers"]):
        for name, (inputs, outputs) in sizes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.ones(2, inputs)
            tensors[f"{path}.lora_B.weight"] = torch.ones(outputs, 2)
    for _ in range(draw.choice([0, 0, 1, 2])):
        name = draw.choice(list(tensors))
        tensor = tensors.pop(name)
        tensor = draw.choice(
            [tensor, tensor[:1], tensor.reshape(-1), tensor.to(torch.int8), tensor.bfloat16(), tensor[None]]
        )
        new = draw.choice(["lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "bias", "base_layer", "x"])
        name = draw.choice(
            [name, name.replace("lora_A", new), f"module.{name}", name.removeprefix("base_model.model.")]
        )
        tensors[name] = tensor.contiguous()
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    config = mutated(draw, ADAPTER, 3, adapter_values)
    config["base_model_name_or_path"] = POCKET if draw.random() < 0.9 else config.get("base_model_name_or_path")
    (target / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    if draw.random() < 0.1:
        path = target / draw.choice(["adapter_config.json", "adapter_model.safetensors"])
        path.write_bytes(spoiled(draw, path.read_bytes()))
    models = Models(student=str(target), teacher=str(target))
    load_policy(ModelFolder.open(str(target), "models.student"), LoadOptions(models, device_of("cpu"), frozen=True))
    return "merged"
