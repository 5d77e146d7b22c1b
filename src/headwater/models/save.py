"""Save a policy as a plain Hugging Face folder or a LoRA adapter; merge an adapter into its base."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from headwater.config.recipe import Models
from headwater.errors import UserError
from headwater.models import fsdp
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.tokenizer import read_tokenizer, reads_alike
from headwater.storage.files import atomic_folder, disk_errno

CUSTOM_GENERATE, CHAT_TEMPLATES = "custom_generate", "additional_chat_templates"
"""Folders inside a model's folder: transformers' code for `generate`, and chat templates by name."""
TOKENIZER_FILES = (
    "tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja", "*.model",
    "*.tiktoken",
)  # fmt: skip
"""Patterns of the names of a tokenizer's files."""


def save_policy(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Write config, safetensors and tokenizer; or an adapter's files if the recipe asks for `output: adapter`.

    All ranks must call it: the first gathers sharded weights in CPU memory and writes. The model in memory is unchanged.
    """
    is_main = policy.ranks.is_main
    with fsdp.unsharded(policy, torch.device("cpu" if is_main else "meta")) as whole:
        if is_main:
            _write(whole, folder, dtype)


def merge_adapter(folder: Path, out: Path, dtype: str) -> None:
    """Write an adapter and its base as one plain model folder; summed in float32 and rounded once.

    Raises UserError if `folder` holds no adapter, `out` exists, or the adapter does not fit its base.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"merge --dtype {dtype}: must be float32 or bfloat16")
    if not ModelFolder(str(folder), "merge", str(folder)).is_adapter:
        raise UserError(f"merge {folder}: holds no adapter (adapter_config.json, and no config.json)")
    if out.exists():
        raise UserError(f"merge {folder}: {out} exists already")
    models = Models(student=str(folder), teacher=str(folder), dtype="float32")
    policy = load_policy(ModelFolder.open(str(folder), "merge"), LoadOptions(models, torch.device("cpu"), frozen=True))
    with atomic_folder(out) as aside:
        save_policy(policy, aside, getattr(torch, dtype))


def _write(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    source = policy.folder
    if policy.adapter is not None and policy.adapter.lora.output == "adapter":
        policy.adapter.save(policy.model, folder)
    else:
        exact = _float32_weights(policy.model)
        weights = {
            name: tensor.float() if exact.search(name) else tensor.to(dtype) for name, tensor in policy.merged_weights()
        }
        config = _written_config(policy.model, weights, dtype)
        model = policy.model if policy.adapter is None else _without_adapter(policy.model, config)
        loaded_config, model.config = model.config, config
        try:
            model.save_pretrained(folder, state_dict=weights)
            config.dtype = dtype  # save_pretrained wrote the type in memory, not the one in the file
            config.save_pretrained(folder)
        finally:
            model.config = loaded_config
        generate = Path(source.base.path, CUSTOM_GENERATE)
        if source.trust_remote_code and generate.is_dir():
            shutil.copytree(generate, folder / CUSTOM_GENERATE)
    _write_tokenizer(policy.tokenizer, source, folder)


def save_without_weights(policy: Policy, folder: Path, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Write what `save_policy` writes besides the weights; return the name and shape of each tensor that it would write.

    One merged matrix at a time is in memory.
    """
    shapes = {name: tensor.to("meta") for name, tensor in policy.merged_weights()}
    config = _written_config(policy.model, {}, dtype)
    config.save_pretrained(folder)
    if policy.model.can_generate():
        policy.model.generation_config.save_pretrained(folder)
    _write_tokenizer(policy.tokenizer, policy.folder, folder)
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(policy.model, shapes).items()}


def _float32_weights(model: Any) -> re.Pattern[str]:
    """Names of the weights that transformers keeps in float32 in a bfloat16 model, such as the routers' score corrections."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return re.compile("|".join(rf"(?:^|\.){re.escape(part)}(?:\.|$)" for part in sorted(kept)) or r"(?!)")


def _written_config(model: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """A copy of the model's config that describes these weights and that transformers agrees to write.

    Weights that are tied become one tensor in `weights`, so that they are written once.
    """
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in config._get_generation_parameters():  # refused in config.json; the generation config has them
        delattr(config, name)
    names = {id(module): name for name, module in model.named_modules()}
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding, head = (f"{names.get(id(module))}.weight" for module in pair)
    tied = any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))
    if tied and embedding in weights and head in weights and torch.equal(weights[embedding], weights[head]):
        weights[head] = weights[embedding]
    return config


def _without_adapter(model: Any, config: Any) -> Any:
    """A model of the same kind without adapters or quantization, its weights on the meta device."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(config))
    plain.generation_config = model.generation_config
    # From names in memory to those in the files.
    plain._weight_conversions = getattr(model, "_weight_conversions", None)
    return plain


def _write_tokenizer(tokenizer: Any, source: ModelFolder, folder: Path) -> None:
    """Write a tokenizer that reads back as the same one: as transformers saves it or, where that fails, as copies of its files.

    Raises what transformers raised if the disk is full, or if the tokenizer is from no local folder whose files could be copied.
    """
    files = Path(source.tokenizer_path)
    try:
        tokenizer.save_pretrained(folder)
        if not files.is_dir() or reads_alike(tokenizer, read_tokenizer(str(folder), source.trust_remote_code)):
            return
    except Exception as error:
        if not files.is_dir() or disk_errno(error) is not None:
            raise
    for path in files.iterdir():
        if path.is_dir() and path.name == CHAT_TEMPLATES:
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.is_file() and any(path.match(pattern) for pattern in TOKENIZER_FILES):
            shutil.copyfile(path, folder / path.name)
