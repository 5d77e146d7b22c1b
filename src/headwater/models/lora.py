"""Low-rank adapters on a frozen base (LoRA 2106.09685, QLoRA 2305.14314), through peft; the only file that imports it."""

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
from headwater.models.untrusted_files import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED, START = "default", "start"
PREFIX = "base_model.model."
"""What peft puts before every name in an adapter's file."""
KNOWN = frozenset({
    "r", "lora_alpha", "target_modules", "use_rslora", "bias", "peft_type", "task_type", "base_model_name_or_path",
    "peft_version", "inference_mode", "lora_dropout", "init_lora_weights", "revision",
})  # fmt: skip
"""Entries of an adapter's config that are read, or change nothing once it is trained; any other that says something is refused."""
HARMLESS = frozenset(
    {"layers_pattern", "megatron_core", "loftq_config", "runtime_config", "qalora_group_size", "auto_mapping"}
)
"""Entries that peft writes into every config and that act only while an adapter is made."""


@dataclass(frozen=True)
class Wanted:
    """An adapter to be trained; `draw` names the random numbers that it begins with."""

    lora: Lora
    draw: tuple[str | int, ...]


@dataclass(frozen=True)
class Adapter:
    """The adapter of a model, which stands in the model's own layers.

    base    what it stands on: a folder or hub id
    layers  name of a matrix in the model -> the layer that holds it with its low-rank pair
    """

    lora: Lora
    base: str
    layers: Mapping[str, Any]

    @property
    def plain(self) -> bool:
        """Whether what is under it are ordinary matrices, not quantised ones."""
        return all(type(layer.base_layer) is nn.Linear for layer in self.layers.values())

    @property
    def parameters(self) -> int:
        return sum(one.numel() for layer in self.layers.values() for one in low_rank(layer))

    def within(self, model: Any) -> Adapter:
        """The same adapter in the layers of another model of its kind."""
        return replace(self, layers=_layers(model))

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The model as it was when its training began: without the adapter, or with the one that it began from."""
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

    def merged(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        """A model's weights under their usual names with the adapter added to them, one at a time; none is changed in place.

        Sums are in float32, and what is quantised is made whole again.
        """
        modules = dict(model.named_modules())
        for name, tensor in model.state_dict().items():
            path, _, last = name.rpartition(".")
            if ".lora_" in name or path not in modules:
                continue  # the adapter itself, or the scales of what is quantised, which no module is named for
            usual = path.removesuffix(".base_layer")
            found = whole(modules[path]) if last == "weight" else tensor
            if last == "weight" and usual in self.layers:
                down, up = low_rank(self.layers[usual])
                found = found.float() + up.float() @ down.float()
            yield f"{usual}.{last}", found

    def save(self, folder: Path) -> None:
        """Write it as peft does: its config with the name of its base, and its weights in float32."""
        from peft import LoraConfig

        folder.mkdir(parents=True, exist_ok=True)
        held = {}
        for path, layer in self.layers.items():
            held[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A[TRAINED].weight.detach().float().contiguous()
            held[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B[TRAINED].weight.detach().float().contiguous()
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
        LoraConfig(
            base_model_name_or_path=self.base,
            task_type="CAUSAL_LM",
            r=self.lora.r,
            lora_alpha=self.lora.alpha,
            target_modules=sorted({path.rpartition(".")[2] for path in self.layers}),
            inference_mode=True,
        ).save_pretrained(str(folder))


def low_rank(layer: Any) -> tuple[Tensor, Tensor]:
    """(down (r, inputs), up (outputs, r)) of a layer's adapter, its scaling in `up`: y = x Wᵀ + x downᵀ upᵀ."""
    down, up = layer.lora_A[TRAINED].weight.detach(), layer.lora_B[TRAINED].weight.detach()
    return down, up * layer.scaling[TRAINED]


def whole(module: Any) -> Tensor:
    """A module's weight, made whole again where it is quantised."""
    from peft.utils.integrations import dequantize_module_weight

    found: Tensor = dequantize_module_weight(module)
    return found.detach()


def need_peft(field: str) -> None:
    """Raises UserError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{field}: needs peft, which is not installed; pip install 'headwater[lora]'")


def attach(model: Any, base: str, wanted: Wanted, field: str, start: Path | None) -> Adapter:
    """Put a trainable adapter into a frozen model: a fresh one, whose second matrix is 0, or what the folder `start` holds.

    Raises UserError when it names no matrix of the model, or `start` is of another shape.
    """
    need_peft("models.lora")
    from peft import LoraConfig, inject_adapter_in_model

    lora = wanted.lora
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    model.requires_grad_(False)
    keep_layout(model)
    try:
        inject_adapter_in_model(config, model, TRAINED)
    except ValueError as error:
        raise UserError(f"models.lora.targets: {' '.join(str(error).split())[:200]}") from None
    adapter = Adapter(lora, base, _layers(model))
    _widen(adapter)
    if start is None:
        _draw(adapter, wanted.draw)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are two is meant
            inject_adapter_in_model(config, model, START)
        _widen(adapter)
        held = read_object(start / CONFIG, field, str(start))
        if held.get("lora_alpha") != lora.alpha or not _filled(adapter, load_file(start / WEIGHTS)):
            raise UserError(
                f"{field}: {start} holds an adapter of another shape than models.lora asks for (r {held.get('r')}, alpha "
                f"{held.get('lora_alpha')}, targets {held.get('target_modules')!s:.100}); say the same, or merge it first "
                "(`headwater merge`)"
            )
    for layer in adapter.layers.values():
        layer.set_adapter(TRAINED)
    return adapter


def _widen(adapter: Adapter) -> None:
    """Steps of a small rate would be rounded away in bfloat16, so what trains is float32."""
    for layer in adapter.layers.values():
        for one in (*layer.lora_A.values(), *layer.lora_B.values()):
            if one.weight.is_meta:  # peft puts it where its matrix is, and that may be filled later (`shards`)
                one.to_empty(device="cpu")
            one.float()


def _layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A") and layer.lora_A}


@torch.no_grad()
def _draw(adapter: Adapter, draw: tuple[str | int, ...]) -> None:
    """The usual beginning, uniform within ±1/√inputs, from named draws: the same on every device and after every resume."""
    for path, layer in adapter.layers.items():
        down = layer.lora_A[TRAINED].weight
        bound = down.shape[1] ** -0.5
        drawn = seeds.generator(*draw, "lora", path).uniform(-bound, bound, tuple(down.shape))
        down.copy_(torch.from_numpy(drawn))
        layer.lora_B[TRAINED].weight.zero_()


@torch.no_grad()
def _filled(adapter: Adapter, held: dict[str, Tensor]) -> bool:
    """Copy an adapter's file into both adapters of the layers; False where it does not fit them."""
    for path, layer in adapter.layers.items():
        for part in ("lora_A", "lora_B"):
            tensor = held.pop(f"{PREFIX}{path}.{part}.weight", None)
            for name in (TRAINED, START):
                weight = getattr(layer, part)[name].weight
                if tensor is None or tensor.shape != weight.shape:
                    return False
                weight.copy_(tensor)
    return not held


# Adapters that were trained before ------------------------------------------------------------------------------------


def is_adapter(where: str) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    folder = Path(where)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_name(where: str, field: str) -> str:
    """What an adapter folder stands on. Raises UserError when it is no LoRA of the plain kind."""
    held = read_object(Path(where) / CONFIG, field, where)
    others = sorted(
        key for key, value in held.items() if key not in KNOWN | HARMLESS and value not in (None, False, [], {}, "", 0)
    )
    base, targets = held.get("base_model_name_or_path"), held.get("target_modules")
    wrong = (
        f"peft_type is {held.get('peft_type')!r:.40}" if held.get("peft_type") != "LORA"
        else f"it says {others[0]}, which is not read here" if others
        else "it trains biases" if held.get("bias", "none") != "none"
        else "it names no base model" if not isinstance(base, str) or not base
        else "its target_modules is no list" if not isinstance(targets, list)
        else "it holds no adapter_model.safetensors" if not (Path(where) / WEIGHTS).is_file()
        else ""
    )  # fmt: skip
    if wrong:
        raise UserError(f"{field}: {where} is an adapter that cannot be used ({wrong})")
    assert isinstance(base, str)
    return base


@torch.no_grad()
def fold_in(model: Any, folder: Path, field: str) -> None:
    """Add a trained adapter to the model's own weights, which then are plain ones. Raises UserError where it does not fit."""
    held = read_object(folder / CONFIG, field, str(folder))
    rank, alpha = held.get("r"), held.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        raise UserError(f"{field}: {folder / CONFIG} says r {rank!r:.40} and lora_alpha {alpha!r:.40}")
    scaling = alpha / (rank**0.5 if held.get("use_rslora") else rank)
    modules, tensors = dict(model.named_modules()), load_file(folder / WEIGHTS)
    while tensors:
        name = next(iter(tensors))
        path = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        down, up = (tensors.pop(f"{PREFIX}{path}.lora_{part}.weight", None) for part in "AB")
        weight = getattr(modules.get(path), "weight", None)
        if down is None or up is None or weight is None or (up.shape[0], down.shape[1]) != tuple(weight.shape):
            raise UserError(f"{field}: {folder / WEIGHTS} does not fit its base model (at {name:.120})")
        added = scaling * (up.float() @ down.float()).to(weight.device)
        if isinstance(weight, DTensor):
            weight.copy_(
                weight.float() + local_shard(added, weight)
            )  # in place: what gathers its parts knows this memory
        else:
            weight.data = (weight.float() + added).to(weight.dtype)


# Quantised bases ------------------------------------------------------------------------------------------------------


def quantisation(kind: str | None, compute: torch.dtype) -> Any:
    """What transformers is told to hold a frozen base in four bits; None for none. Raises UserError without bitsandbytes."""
    if kind is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "models.lora.quantize: needs bitsandbytes, which is not installed; pip install 'headwater[qlora]'"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def keep_layout(model: Any) -> None:
    """On some CPUs bitsandbytes lays its weights out anew when they first run without a gradient, and from then on gives none."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class Beneath(nn.Module):
    """A model's body as it was when its training began: the KL reference of an adapted policy, without weights of its own."""

    def __init__(self, body: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.body = (body,)  # in a tuple: not a submodule, whose mode or device might be changed through this one
        self.adapter = adapter

    def forward(self, **inputs: Any) -> Any:
        with self.adapter.off():
            return self.body[0](**inputs)
