"""LoRA and QLoRA adapters on a frozen base (2106.09685, 2305.14314), through peft; only this file imports peft."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headwater import seeds
from headwater.config.recipe import Lora
from headwater.distributed.checkpoint_io import local_shard
from headwater.errors import UserError
from headwater.models.adapter_files import CONFIG, WEIGHTS
from headwater.models.folder import ModelFolder

TRAINED, START = "default", "start"
"""peft's names for the adapter that trains, and for a frozen copy of the one that training started from."""
PREFIX = "base_model.model."
"""What peft puts before every name in an adapter's file."""


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter to train. `draw` names the random stream of its initial weights."""

    lora: Lora
    draw: tuple[str | int, ...]

    @property
    def continues(self) -> bool:
        """Whether training continues the adapter that it starts from, instead of merging it into the base first."""
        return self.lora.output == "adapter"


@dataclass(frozen=True)
class Adapter:
    """A trained adapter inside a model's own layers.

    base    folder or hub id of the base model
    layers  name of an adapted matrix -> the peft layer that holds it with its low-rank pair
    """

    lora: Lora
    base: str
    layers: Mapping[str, Any]

    @property
    def is_unquantized(self) -> bool:
        """Whether all base matrices are ordinary ones."""
        return all(type(layer.base_layer) is nn.Linear for layer in self.layers.values())

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for layer in self.layers.values() for tensor in low_rank_pair(layer))

    def in_model(self, model: Any) -> Adapter:
        """The same adapter in the layers of another model of this architecture."""
        return replace(self, layers=_adapted_layers(model))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the model as it was before training: without an adapter, or with the one that training started from."""
        for layer in self.layers.values():
            if START in layer.lora_A:
                layer.set_adapter(START, inference_mode=True)
            else:
                layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.set_adapter(TRAINED)
                layer.enable_adapters(True)

    def merged_weights(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        """The model's weights under their usual names with the adapter added, one at a time; none is changed in place.

        Sums are in float32; quantized weights are dequantized.
        """
        modules = dict(model.named_modules())
        for name, tensor in model.state_dict().items():
            path, _, attribute = name.rpartition(".")
            if ".lora_" in name or path not in modules:
                continue  # the adapter itself, or quantization scales, which belong to no module of their own
            plain_path = path.removesuffix(".base_layer")
            weight = dequantized_weight(modules[path]) if attribute == "weight" else tensor
            if attribute == "weight" and plain_path in self.layers:
                down, up = low_rank_pair(self.layers[plain_path])
                weight = weight.float() + up.float() @ down.float()
            yield f"{plain_path}.{attribute}", weight

    def save(self, folder: Path) -> None:
        """Write peft's files: a config that names the base, and weights in float32."""
        from peft import LoraConfig

        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            f"{PREFIX}{path}.{part}.weight": getattr(layer, part)[TRAINED].weight.detach().float().contiguous()
            for path, layer in self.layers.items()
            for part in ("lora_A", "lora_B")
        }
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        LoraConfig(
            base_model_name_or_path=self.base,
            task_type="CAUSAL_LM",
            r=self.lora.r,
            lora_alpha=self.lora.alpha,
            target_modules=sorted({path.rpartition(".")[2] for path in self.layers}),
            inference_mode=True,
        ).save_pretrained(str(folder))


def low_rank_pair(layer: Any) -> tuple[Tensor, Tensor]:
    """(down (r, inputs), up (outputs, r)) of a layer's adapter, with its scaling in `up`: y = x Wᵀ + x downᵀ upᵀ."""
    down, up = layer.lora_A[TRAINED].weight.detach(), layer.lora_B[TRAINED].weight.detach()
    return down, up * layer.scaling[TRAINED]


def dequantized_weight(module: Any) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(module)
    return weight.detach()


def require_peft(field: str) -> None:
    """Raises UserError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{field}: needs peft, which is not installed; pip install 'headwater[lora]'")


def attach_adapter(model: Any, base: str, spec: AdapterSpec, start: ModelFolder | None) -> Adapter:
    """Freeze a model and add a trainable adapter: a new one, whose second matrix is 0, or the one in the folder `start`.

    Raises UserError if the targets match no matrix of the model, or `start` has another shape.
    """
    require_peft("models.lora")
    from peft import LoraConfig, inject_adapter_in_model

    lora = spec.lora
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    model.requires_grad_(False)
    _keep_weight_layout(model)
    try:
        inject_adapter_in_model(config, model, TRAINED)
    except ValueError as error:
        raise UserError(f"models.lora.targets: {' '.join(str(error).split())[:200]}") from None
    adapter = Adapter(lora, base, _adapted_layers(model))
    _to_float32(adapter)
    if start is None:
        _initialize(adapter, spec.draw)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a second adapter is intended
            inject_adapter_in_model(config, model, START)
        _to_float32(adapter)
        saved = start.json(CONFIG)
        if saved.get("lora_alpha") != lora.alpha or not _load(adapter, load_file(Path(start.path, WEIGHTS))):
            raise UserError(
                f"{start.field}: {start.path} holds an adapter of another shape than models.lora asks for (r {saved.get('r')}, "
                f"alpha {saved.get('lora_alpha')}, targets {saved.get('target_modules')!s:.100}); set the same values, or merge "
                "it first (`headwater merge`)"
            )
    for layer in adapter.layers.values():
        layer.set_adapter(TRAINED)
    return adapter


def _to_float32(adapter: Adapter) -> None:
    """Train in float32: bfloat16 would round small steps away."""
    for layer in adapter.layers.values():
        for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
            if matrix.weight.is_meta:  # peft uses the base matrix's device, which may still be meta (`fsdp_weights`)
                matrix.to_empty(device="cpu")
            matrix.float()


def _adapted_layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A") and layer.lora_A}


@torch.no_grad()
def _initialize(adapter: Adapter, draw: tuple[str | int, ...]) -> None:
    """LoRA's usual start, uniform in ±1/√inputs and 0, from named draws: equal on every device and after every resume."""
    for path, layer in adapter.layers.items():
        down = layer.lora_A[TRAINED].weight
        bound = down.shape[1] ** -0.5
        values = seeds.generator(*draw, "lora", path).uniform(-bound, bound, tuple(down.shape))
        down.copy_(torch.from_numpy(values))
        layer.lora_B[TRAINED].weight.zero_()


@torch.no_grad()
def _load(adapter: Adapter, weights: dict[str, Tensor]) -> bool:
    """Copy an adapter file's weights into both adapters of the layers; False if they do not fit."""
    for path, layer in adapter.layers.items():
        for part in ("lora_A", "lora_B"):
            saved = weights.pop(f"{PREFIX}{path}.{part}.weight", None)
            for name in (TRAINED, START):
                weight = getattr(layer, part)[name].weight
                if saved is None or saved.shape != weight.shape:
                    return False
                weight.copy_(saved)
    return not weights


@torch.no_grad()
def merge_into(model: Any, folder: ModelFolder) -> None:
    """Add a saved adapter to the model's own weights, in place. Raises UserError if it does not fit."""
    config, weights = folder.json(CONFIG), Path(folder.path, WEIGHTS)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        raise UserError(f"{folder.field}: {Path(folder.path, CONFIG)} says r {rank!r:.40} and lora_alpha {alpha!r:.40}")
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    modules, tensors = dict(model.named_modules()), load_file(weights)
    while tensors:
        name = next(iter(tensors))
        path = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        down, up = (tensors.pop(f"{PREFIX}{path}.lora_{part}.weight", None) for part in "AB")
        weight = getattr(modules.get(path), "weight", None)
        if down is None or up is None or weight is None or (up.shape[0], down.shape[1]) != tuple(weight.shape):
            raise UserError(f"{folder.field}: {weights} does not fit its base model (at {name:.120})")
        update = scaling * (up.float() @ down.float()).to(weight.device)
        if isinstance(weight, DTensor):
            weight.copy_(weight.float() + local_shard(update, weight))  # in place: FSDP2 gathers from this memory
        else:
            weight.data = (weight.float() + update).to(weight.dtype)


def quantization_config(kind: str | None, compute_dtype: torch.dtype) -> Any:
    """transformers' setting for a frozen base in four bits; None for no quantization. Raises UserError without bitsandbytes."""
    if kind is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "models.lora.quantize: needs bitsandbytes, which is not installed; pip install 'headwater[qlora]'"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _keep_weight_layout(model: Any) -> None:
    """On some CPUs bitsandbytes repacks weights on their first pass without a gradient, after which they give no gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class ReferenceBody(nn.Module):
    """An adapted model's body with the adapter disabled: a KL reference without weights of its own."""

    def __init__(self, body: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.body = (body,)  # in a tuple: not a submodule, whose mode or device could be changed through this one
        self.adapter = adapter

    def forward(self, **inputs: Any) -> Any:
        with self.adapter.disabled():
            return self.body[0](**inputs)
