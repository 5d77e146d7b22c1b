"""Load a policy from a model folder: all weights, an adapter, or FSDP2 shards."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from headwater.config import recipe as config
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import UnsupportedModelError, UserError
from headwater.models import fsdp, fsdp_weights, lora
from headwater.models.adapter_merge import merge_into
from headwater.models.architecture import attention_of, keep_weights_in_place
from headwater.models.batching_probe import with_measured_batching
from headwater.models.folder import ModelFolder
from headwater.models.packed_attention import enable_packing
from headwater.models.policy import Policy, split_head, with_root_weights
from headwater.models.training_mode import checkpoint_activations, disable_dropout
from headwater.models.untrusted_files import as_user_error
from headwater.models.weight_files import unused_weights

SCORES = re.compile(r"(^|\.)(score|v_head|value_head|classifier|reward_head|regression_head)\.")
"""Weights of models that score texts."""

SMALL_MODEL = 1_000_000
"""Weights that a config may describe beyond those in the files: so small a model is built, and the missing weights are named."""

LARGE_BUFFERS = 1 << 30
"""Bytes that a model may always keep in tables that it computes, such as causal masks."""


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model.

    models       the recipe's precision and gradient checkpointing
    frozen       whether none of the weights will train
    adapter      train an adapter of this kind and freeze the weights; None trains all weights
    fingerprint  name of the weights; None hashes the folder
    ranks        processes that load the model together; each keeps its shard of every weight
    """

    models: config.Models
    device: torch.device
    frozen: bool
    adapter: lora.AdapterSpec | None = None
    fingerprint: str | None = None
    ranks: ProcessGroup = SINGLE_PROCESS


def load_policy(folder: ModelFolder, options: LoadOptions) -> Policy:
    """Load a model and its tokenizer. With several ranks, all must call it.

    A model that will train keeps float32 weights even if it computes in bfloat16: steps of 1e-6 vanish when rounded to
    bfloat16. A frozen one is held in the compute type.

    Raises UserError that names the field if the folder, hub id or tokenizer cannot be loaded, UnsupportedModelError if the model
    is of a kind that cannot be trained or sampled.
    """
    spec, ranks, device = options.adapter, options.ranks, options.device
    if not ranks.single_process and spec is not None and spec.lora.quantize is not None:
        raise UserError(
            "models.lora.quantize: four-bit weights run in one process; leave torchrun out, or leave it out"
        )
    folder.require_weights()
    folder.require_trusted()
    if not options.frozen:
        folder.require_trainable(adapter=spec is not None)
    base, compute_dtype = folder.base, getattr(torch, options.models.dtype)
    base_frozen = options.frozen or spec is not None
    quantization = None if spec is None else lora.quantization_config(spec.lora.quantize, compute_dtype)
    # An adapter that starts a stage is continued if the stage writes one, else added to the base first.
    continues = spec is not None and spec.lora.output == "adapter" and folder.is_adapter
    merges = folder.is_adapter and not continues
    if merges and quantization is not None:
        raise UserError(
            f"{folder.field}: {folder.name} is an adapter, which cannot be added to weights in four bits; set models.lora.output: "
            "adapter to continue training it, or merge it first (`headwater merge`)"
        )
    tokenizer = folder.read_tokenizer()
    with as_user_error(f"{folder.field}: {folder.name} cannot be loaded"):
        dtype = compute_dtype if base_frozen else torch.float32
        model = None if ranks.single_process else fsdp_weights.build_without_weights(base, dtype)
        if model is None:
            model = _read_model(folder, dtype, quantization, device)
    disable_dropout(model)
    keep_weights_in_place(model)
    if merges and ranks.single_process:
        merge_into(model, folder)
    _declare_head(model)
    model.requires_grad_(not base_frozen)
    adapter = None if spec is None else lora.attach_adapter(model, base.path, spec, folder if continues else None)
    if adapter is not None and adapter.on_parameters and not ranks.single_process:
        raise UserError(
            "models.lora: adapters on experts or routers train in one process; leave torchrun out, or name linear layers in "
            "models.lora.targets"
        )
    if options.models.gradient_checkpointing and not options.frozen:
        checkpoint_activations(model)
    else:
        model.eval()
    meta_model = None
    if ranks.single_process:
        _move(model, device)
    else:
        meta_model = fsdp.shard_model(model, ranks, device)
        fsdp_weights.load_shards(model, base, device, ranks)
        if merges:
            merge_into(model, folder)
    kind = model.config.model_type
    adapted = "" if adapter is None else " with adapters on these layers; name others in models.lora.targets"
    with as_user_error(
        f"{folder.field}: {folder.name} is a {kind} model, which transformers cannot run on plain token ids{adapted}",
        UnsupportedModelError,
    ):
        body, head = split_head(model, device)
        packs = with_root_weights(model, lambda: enable_packing(model, body, device))
        fingerprint = options.fingerprint or folder.fingerprint
        policy = Policy(
            model, tokenizer, folder, fingerprint, device, compute_dtype, body, head, packs, ranks=ranks, meta_model=meta_model,
            adapter=adapter,
        )  # fmt: skip
        policy = with_root_weights(model, lambda: with_measured_batching(policy))
    if not ranks.single_process:
        model.reshard()
    return policy


def _read_model(folder: ModelFolder, dtype: torch.dtype, quantization: Any, device: torch.device) -> Any:
    """The model with its weights. Raises UserError if the files lack weights, which transformers would draw at random."""
    _refuse_far_larger(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder.base.path,
        dtype=dtype,
        trust_remote_code=folder.trust_remote_code,
        use_safetensors=True,
        attn_implementation=attention_of(folder.config),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with the name
        generation_config=folder.generation_config,  # transformers would refuse to save the file's, or to load it
        quantization_config=quantization,
        device_map=None if quantization is None else {"": device},  # quantized while they are read, on their device
    )
    model, info = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{folder.field}: {folder.name} is an adapter, which is read from a folder only; download it (`hf download`) and name "
            "that folder"
        )
    random = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if random:
        raise UserError(
            f"{folder.field}: {folder.name} cannot be loaded (its files lack {len(random)} weights that its config.json asks for, "
            f"such as {random[0]}, or hold them in another shape; they would be random)"
        )
    if info["unexpected_keys"]:
        _refuse_unused(folder, info["unexpected_keys"], model)
    return model


def _refuse_far_larger(folder: ModelFolder) -> None:
    """Raises UserError for a config that describes a far larger model than the files hold, before memory for it is reserved.

    Sizes that a config leaves out are those of a large model. Files of quantized weights hold several in one number.
    """
    if not folder.base.is_local:
        return
    stored_numbers = sum(math.prod(stored.shape) for stored in folder.weight_files.tensors.values())
    per_number = 32 if getattr(folder.config, "quantization_config", None) else 2
    described = folder.shape.parameters
    if described > per_number * stored_numbers + SMALL_MODEL:
        raise UserError(
            f"{folder.field}: {folder.name} cannot be loaded (its config.json describes a model of {described:,} weights, and its "
            f"files hold {stored_numbers:,}; sizes missing from config.json default to those of a large model)"
        )
    buffers = folder.shape.buffer_bytes
    if buffers > per_number * 4 * stored_numbers + LARGE_BUFFERS:
        raise UserError(
            f"{folder.field}: {folder.name} cannot be loaded (its config.json asks for {buffers:,} bytes of tables besides the "
            f"weights, of which its files hold {stored_numbers:,}; is its number of positions right?)"
        )


def _refuse_unused(folder: ModelFolder, unexpected: Collection[str], model: Any) -> None:
    """Raises UserError if the files hold weights that no part of the model takes, so that it is not the model they belong to."""
    unused = unused_weights(unexpected, folder.weight_files.tensors, model.config)
    if unused:
        kind = " and would be a classifier's or a reward model's" if SCORES.search(unused[0]) else ""
        raise UserError(
            f"{folder.field}: {folder.name} cannot be loaded (its files hold {len(unused)} weights that {type(model).__name__}, which "
            f"its config.json asks for, does not take, such as {unused[0]}{kind}; they would be dropped)"
        )


def _declare_head(model: Any) -> None:
    """Let the config say that the head is not the embedding where the files hold a head of its own in spite of their config.

    An engine that believed the config would drop the head, of the base model as of the trained one.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(embedding, "weight", None):
        for part in (model.config, model.config.get_text_config()):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


def _move(model: Any, device: torch.device) -> None:
    model.to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Weights mapped from a file may have unaligned addresses, on which some kernels round differently.
            parameter.data = parameter.data.clone()
