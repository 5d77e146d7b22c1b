"""LoRA and QLoRA adapters on a frozen base (2106.09685, 2305.14314), through peft: attach, initialize, merge, save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headwater import seeds
from headwater.config.lora import Lora
from headwater.distributed.process_group import full_tensor, local_tensor
from headwater.errors import UserError, require_package
from headwater.models import adapter_files
from headwater.models.adapter_files import CONFIG, PREFIX, WEIGHTS
from headwater.models.folder import ModelFolder
from headwater.models.lora_targets import (
    BASE,
    START,
    TRAINED,
    adapted_layers,
    inject,
    layer_name,
    peft_config,
    saved_targets,
    weight_name,
)
from headwater.models.untrusted_files import as_user_error


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter to train. `draw` names the random stream of its initial weights."""

    lora: Lora
    draw: tuple[str | int, ...]


@dataclass(frozen=True)
class Adapter:
    """A trained adapter inside a model's own layers.

    base    folder or hub id of the base model
    layers  name of a module of the adapted model -> the peft layer of that name: it holds a linear layer, or a module one of whose
            parameters it adapts (a router, or fused experts), and the low-rank pair
    """

    lora: Lora
    base: str
    layers: Mapping[str, Any]

    @property
    def is_unquantized(self) -> bool:
        """Whether all base matrices are ordinary ones."""
        return all(type(layer.base_layer) is nn.Linear for layer in self.layers.values())

    @property
    def on_parameters(self) -> bool:
        """Whether it adapts a parameter of a module that is no linear layer, such as fused experts or their router."""
        return any(hasattr(layer, "parameter_name") for layer in self.layers.values())

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for layer in self.layers.values() for tensor in low_rank_pair(layer))

    def active_parameters(self, experts_per_token: float) -> float:
        """Number of its weights that one token uses: of adapters on experts, only those of the routed experts."""
        counts = ((layer, getattr(layer, "num_experts", 1)) for layer in self.layers.values())
        return sum(
            tensor.numel() * (min(1.0, experts_per_token / count) if count > 1 else 1)
            for layer, count in counts
            for tensor in low_rank_pair(layer)
        )

    def in_model(self, model: Any) -> Adapter:
        """The same adapter in the layers of another model of this architecture."""
        return replace(self, layers=adapted_layers(model))

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

    def matrices(self) -> list[Tensor]:
        """The weights that train: both matrices of each layer, in order."""
        return [getattr(layer, part)[TRAINED].weight for layer in self.layers.values() for part in adapter_files.PAIRED]

    @contextlib.contextmanager
    def exchanged(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Run the model with other values of `matrices()`, without a gradient.

        Values change places in memory: FSDP2 gathers a sharded matrix from the memory that it began with.
        """

        @torch.no_grad()
        def exchange() -> None:
            for own, other in zip(self.matrices(), values, strict=True):
                mine, others = local_tensor(own), local_tensor(other)
                kept = mine.clone()
                mine.copy_(others)
                others.copy_(kept)

        exchange()
        try:
            yield
        finally:
            exchange()

    def merged_weights(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        """The model's weights under their usual names with the adapter added, one at a time; none is changed in place.

        Sums are in float32; quantized weights are dequantized. Sharded weights are gathered: all ranks must read them all.
        """
        from peft.utils.integrations import dequantize_module_weight

        modules = dict(model.named_modules())
        adapted = {weight_name(path, layer): layer for path, layer in self.layers.items()}
        for name, tensor in model.state_dict().items():
            path, _, attribute = name.rpartition(".")
            if ".lora_" in name or path not in modules:
                continue  # the adapter itself, or quantization scales, which belong to no module of their own
            plain_name = name.replace(BASE, "")
            weight = full_tensor(dequantize_module_weight(modules[path]).detach() if attribute == "weight" else tensor)
            if plain_name in adapted:
                weight = weight.float() + update_of(adapted[plain_name])
            if attribute == "weight" and issubclass(getattr(modules[path], "source_cls", nn.Linear), Conv1D):
                weight = weight.t()  # transformers transposes GPT-2's to quantize them
            yield plain_name, weight

    def save(self, model: Any, folder: Path) -> None:
        """Write peft's files for the adapter in `model`: a config that names the base, and weights in float32."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            f"{PREFIX}{path}.{part}.weight": getattr(layer, part)[TRAINED].weight.detach().float().contiguous()
            for path, layer in self.layers.items()
            for part in adapter_files.PAIRED
        }
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        self.peft_config(model).save_pretrained(str(folder))

    def peft_config(self, model: Any) -> Any:
        """peft's config with which it adapts the same layers of the plain model, and no others."""
        from peft import LoraConfig

        return LoraConfig(
            base_model_name_or_path=self.base,
            task_type="CAUSAL_LM",
            r=self.lora.r,
            lora_alpha=self.lora.alpha,
            inference_mode=True,
            **saved_targets(model, self.layers, self.lora),
        )


def update_of(layer: Any) -> Tensor:
    """What a layer's adapter adds to the weight, in float32 and in the weight's layout."""
    down, up = (full_tensor(matrix).float() for matrix in low_rank_pair(layer))
    if not hasattr(layer, "parameter_name"):
        product = up @ down
        return product.t() if layer.fan_in_fan_out else product
    shape, count = layer.get_param().shape, layer.num_experts
    # peft's layout of the pairs of E experts: down (E · r, inputs), up (outputs, r · E).
    down_ERI, up_ORE = down.reshape(count, -1, down.shape[1]), up.reshape(len(up), -1, count)
    product = torch.einsum("ore,eri->eoi", up_ORE, down_ERI)
    if getattr(layer.get_base_layer(), "is_transposed", False):  # weights of (E, inputs, outputs)
        product = product.transpose(1, 2)
    return product.reshape(shape)


def low_rank_pair(layer: Any) -> tuple[Tensor, Tensor]:
    """(down (r, inputs), up (outputs, r)) of a layer's adapter, with its scaling in `up`: y = x Wᵀ + x downᵀ upᵀ."""
    down, up = layer.lora_A[TRAINED].weight.detach(), layer.lora_B[TRAINED].weight.detach()
    return down, up * layer.scaling[TRAINED]


def attach_adapter(model: Any, base: str, spec: AdapterSpec, start: ModelFolder | None) -> Adapter:
    """Freeze a model and add a trainable adapter: a new one, whose second matrix is 0, or the one in the folder `start`.

    Raises UserError if the targets match no matrix of the model, or `start` has another shape.
    """
    require_package("models.lora", "peft", "lora")
    lora, config = spec.lora, peft_config(spec.lora, model)
    model.requires_grad_(False)
    _keep_weight_layout(model)
    adapter = Adapter(lora, base, inject(model, config))
    if start is not None:
        inject(model, config, START)
    _to_float32(adapter)
    if start is None:
        _initialize(adapter, spec.draw)
    elif not _load(adapter, start):
        saved = start.json(CONFIG)
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


@torch.no_grad()
def _initialize(adapter: Adapter, draw: tuple[str | int, ...]) -> None:
    """LoRA's usual start, uniform in ±1/√inputs and 0, from named draws: equal on every device and after every resume."""
    for path, layer in adapter.layers.items():
        down = layer.lora_A[TRAINED].weight
        bound = down.shape[1] ** -0.5
        values = seeds.generator(*draw, "lora", layer_name(path, layer)).uniform(-bound, bound, tuple(down.shape))
        down.copy_(torch.from_numpy(values))
        layer.lora_B[TRAINED].weight.zero_()


@torch.no_grad()
def _load(adapter: Adapter, start: ModelFolder) -> bool:
    """Copy a saved adapter's weights into both adapters of the layers; False if they do not fit."""
    file = Path(start.path, WEIGHTS)
    with as_user_error(f"{start.field}: {file} cannot be read"):
        weights = adapter_files.read_weights(file)
    config = start.json(CONFIG)
    for path, layer in adapter.layers.items():
        if adapter_files.rank_and_scaling(config, layer_name(path, layer))[1] != layer.scaling[TRAINED]:
            return False
        for part in adapter_files.PAIRED:
            saved = weights.pop(f"{path}.{part}.weight", None)
            for adapter_name in (TRAINED, START):
                weight = getattr(layer, part)[adapter_name].weight
                if saved is None or saved.shape != weight.shape:
                    return False
                weight.copy_(saved)
    return not weights


def quantization_config(kind: str | None, compute_dtype: torch.dtype) -> Any:
    """transformers' setting for a frozen base in four bits; None for no quantization. Raises UserError without bitsandbytes."""
    if kind is None:
        return None
    require_package("models.lora.quantize", "bitsandbytes", "qlora")
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
    """An adapted model's body as it was before training, or as a copy of its adapter has it: a reference on the same weights.

    values  a copy of the adapter's matrices, which can follow those that train (`training.lagged_copy`); None disables the adapter
    """

    def __init__(self, body: nn.Module, adapter: Adapter, values: nn.ParameterList | None = None) -> None:
        super().__init__()
        self.body = (body,)  # in a tuple: not a submodule, whose mode or device could be changed through this one
        self.adapter, self.values = adapter, values

    def forward(self, **inputs: Any) -> Any:
        with self.adapter.disabled() if self.values is None else self.adapter.exchanged(list(self.values)):
            return self.body[0](**inputs)
