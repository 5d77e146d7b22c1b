"""Find the safetensors files with a model's weights, and check them against their index, each other and the model.

The files are those that transformers reads: model.safetensors, or the shards that an index lists.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.errors import UserError
from headwater.models.untrusted_files import Stored, read_header, read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
INTEGERS = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
"""Types of quantized weights, which need scales."""
BUFFERS = re.compile(
    r"(^|\.)(inv_freq|cos_cached|sin_cached|position_ids|masked_bias|embed_positions\.weights|_extra_state)$"
)
"""Buffers that earlier versions of models stored and that later ones compute."""
CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.bias$")
"""A causal mask of four dimensions in GPT-2 and its relatives; a bias of one dimension elsewhere."""
NEXT_TOKENS = re.compile(r"(^|\.)(mtp|nextn)(_|\.)")
"""Layers that predict further tokens, for speculative decoding; the language model itself does not use them."""


@dataclass(frozen=True)
class WeightFiles:
    """The files with the weights of a folder. `field` and `name` begin every error message.

    Properties raise UserError for a damaged index or header.
    """

    folder: Path
    field: str
    name: str

    @property
    def shards(self) -> dict[str, str] | None:
        """Tensor -> file, as the index says; None without an index."""
        path = self.folder / INDEX
        if not path.is_file():
            return None
        listed = read_object(path, self.field, self.name).get("weight_map")
        return listed if isinstance(listed, dict) else {}

    @property
    def paths(self) -> list[Path]:
        shards = None if (self.folder / SINGLE).is_file() else self.shards
        return [self.folder / name for name in ([SINGLE] if shards is None else sorted(set(shards.values())))]

    @property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor of the weights by name."""
        return {
            tensor: stored for path in self.paths for tensor, stored in read_header(path, self.field, self.name).items()
        }

    def refuse_inconsistent(self) -> None:
        """Raises UserError if it is not certain which files hold the weights, or if an index and its shards differ."""
        problem = self._ambiguity() or self._difference() or self._quantized()
        if problem is not None:
            raise UserError(f"{self.field}: {self.name} cannot be loaded ({problem})")

    def _ambiguity(self) -> str | None:
        single, shards = (self.folder / SINGLE).is_file(), self.shards
        if shards is None:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
            if not single:
                return f"it holds {names[0]}, and no {SINGLE} or {INDEX} that would say what to read"
            shard = next((name for name in names if SHARD.fullmatch(name)), None)
            return None if shard is None else _two_readings(f"{shard}, a shard without an index")
        if not shards:
            return f"{INDEX} holds no weight_map"
        if single and set(shards.values()) != {SINGLE}:
            return _two_readings(f"{INDEX}, which lists other files")
        missing = sorted({shard for shard in shards.values() if not (self.folder / shard).is_file()})
        return f"{INDEX} lists {missing[0]}, which is not there: download it again" if missing else None

    def _difference(self) -> str | None:
        listed, stored = self.shards, dict[str, str]()
        if listed is None:
            return None
        for path in self.paths:
            for tensor in read_header(path, self.field, self.name):
                if tensor in stored:
                    return (
                        f"{stored[tensor]} and {path.name} both hold {tensor}: the files are of different checkpoints"
                    )
                stored[tensor] = path.name
        for tensor in sorted(stored.keys() | listed.keys()):
            if stored.get(tensor) != listed.get(tensor):
                says, is_ = listed.get(tensor, "no file"), stored.get(tensor, "no file")
                return f"{INDEX} says that {tensor} is in {says}, and it is in {is_}: the files are of different checkpoints"
        return None

    def _quantized(self) -> str | None:
        """Weights in a quantized type that config.json does not mention: transformers would read the bare numbers."""
        try:
            config = read_object(self.folder / "config.json", self.field, self.name)
        except UserError:
            return None  # the reader of the config refuses it
        if config.get("quantization_config") or config.get("compression_config"):
            return None
        for tensor, stored in self.tensors.items():
            if stored.dtype in INTEGERS and len(stored.shape) > 1 and tensor.endswith("weight"):
                return f"{tensor} is stored as {stored.dtype}, and config.json has no quantization_config that says how to read it"
        return None


def _two_readings(other: str) -> str:
    return f"it holds {SINGLE} and also {other}; programs differ in which they read: remove those that are out of date"


def unused_weights(unexpected: Collection[str], stored: Mapping[str, Stored], config: Any) -> list[str]:
    """Of the tensors that transformers did not load, those that are neither recomputed nor for speculative decoding.

    unexpected  `unexpected_keys` of the loading report
    stored      every tensor in the files
    """
    text = config.get_text_config()
    first, further = (int(getattr(text, name, 0) or 0) for name in ("num_hidden_layers", "num_nextn_predict_layers"))

    def harmless(name: str) -> bool:
        if BUFFERS.search(name) or NEXT_TOKENS.search(name):
            return True
        if CAUSAL_MASK.search(name):
            return name in stored and len(stored[name].shape) == 4
        layer = re.search(r"(^|\.)layers\.(\d+)\.", name)  # layers after the last one predict further tokens
        return layer is not None and first <= int(layer.group(2)) < first + further

    return sorted(name for name in unexpected if not harmless(name))
