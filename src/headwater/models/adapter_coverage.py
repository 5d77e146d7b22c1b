"""Measure which weights of a model's layers an adapter covers, before any weights are read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from headwater.config.lora import Lora
from headwater.errors import UserError, require_package
from headwater.models.folder import ModelFolder
from headwater.models.lora import Adapter
from headwater.models.lora_targets import inject, peft_config, weight_name
from headwater.models.shape import empty_model
from headwater.models.untrusted_files import as_user_error


@dataclass(frozen=True)
class Coverage:
    """The weights of a model's layers (matrices, not embeddings, head and norms) that have an adapter, and the others.

    covered, total  numbers of weights
    others          the last two parts of a matrix' name -> its number of weights over all layers, largest first
    """

    covered: int
    total: int
    others: dict[str, int]

    @property
    def share(self) -> float:
        return self.covered / max(self.total, 1)


def coverage(folder: ModelFolder, lora: Lora) -> Coverage | None:
    """Build the model and its adapter without memory for weights, and compare their names.

    None if the architecture cannot be built without weights; checks that load them report what is wrong, if anything is.

    Raises UserError if peft is missing, the targets name layers that get no adapter here, or saving would lose a weight or an adapter.
    """
    require_package("models.lora", "peft", "lora")
    try:
        with as_user_error("cannot be built"):
            plain, adapted = _empty_model(folder), _empty_model(folder)
    except UserError:
        return None
    weights = _matrix_sizes(plain)
    layers = inject(adapted, peft_config(lora, adapted))
    adapter = Adapter(lora, folder.base.path, layers)
    names = {weight_name(path, layer) for path, layer in layers.items()}
    _refuse_lost(folder, plain, adapted, adapter)
    total = sum(weights.values())
    others = Counter[str]()
    for name, size in weights.items():
        if name not in names:
            others[".".join(name.removesuffix(".weight").split(".")[-2:])] += size
    return Coverage(total - others.total(), total, dict(others.most_common()))


def _empty_model(folder: ModelFolder) -> Any:
    return empty_model(folder.config, folder.trust_remote_code)


def _matrix_sizes(model: Any) -> dict[str, int]:
    """Number of weights of every matrix of the layers by name, fused experts included."""
    head = model.get_output_embeddings()
    outside = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return {
        f"{path}.{name}": parameter.numel()
        for path, module in model.named_modules()
        if not isinstance(module, (nn.Embedding, nn.Conv1d))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
        and min(parameter.shape) > 1
        and not name.endswith("bias")
        and id(parameter) not in outside
    }


def _refuse_lost(folder: ModelFolder, plain: Any, adapted: Any, adapter: Adapter) -> None:
    written = {name for name, _ in adapter.merged_weights(adapted)}
    lost = sorted(plain.state_dict().keys() - written)
    if lost:
        raise UserError(
            f"models.lora: a merged model of {folder.name} would lack {len(lost)} weights, such as {lost[0]}; name other layers in "
            "models.lora.targets"
        )
    reloaded = inject(_empty_model(folder), adapter.peft_config(adapted))
    differing = sorted(reloaded.keys() ^ adapter.layers.keys())
    if differing:
        raise UserError(
            f"models.lora: an adapter of {folder.name} would not reload as it was saved (at {differing[0]}); name other layers in "
            "models.lora.targets"
        )
