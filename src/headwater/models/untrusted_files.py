"""Check model folders from unknown sources before any library opens a file in them.

Weights are read from safetensors only, which hold nothing but numbers. A pickle can run code, so a folder with one is refused
without reading it. Code that a config would import is refused unless the recipe trusts it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from headwater.errors import HeadwaterError, UnsupportedModelError, UserError, error_text

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
SMALL_FILES = (*CONFIGS, "special_tokens_map.json", "added_tokens.json", "adapter_config.json")
MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""

MAX_SMALL_BYTES, MAX_JSON_VALUES = 8 << 20, 6_000_000
"""Largest file of SMALL_FILES, and most values in any JSON; parsed, a value takes up to 170 bytes. A vocabulary of 262,144 tokens
with twice as many merges has 2 million."""
MAX_BYTES = {".json": 64 << 20, ".model": 128 << 20, ".txt": 128 << 20, ".jinja": 1 << 20}
"""Largest file that is read whole, by its ending."""
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "n_embd", "n_inner", "num_labels")
"""Entries of a config.json that can be no larger than the number of tensors, and of the numbers in them."""


class TooManyValuesError(ValueError):
    """JSON that would take gigabytes of memory."""


def refuse_unsafe(folder: Path, field: str, name: str) -> None:
    """Raises UserError for a folder with a pickle in it (also one named *.safetensors), with a pipe, device or absurdly large file, or
    with an index that points outside."""
    for path in sorted([*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]):
        if path.suffix in (*MAX_BYTES, ".safetensors"):
            _refuse_irregular(path, field, name)
        if path.suffix.lower() in PICKLES:
            raise UserError(
                f"{field}: {name} holds {path.name}, a pickle, which can run any program when it is read; it was not read: keep "
                "only *.safetensors there"
            )
        if path.suffix == ".safetensors" and path.is_file():
            problem = _not_safetensors(path)
            if problem:
                raise UserError(
                    f"{field}: {name} cannot be loaded ({path.name} is no safetensors file: {problem}; it was not read)"
                )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_object(index, field, name).get("weight_map", {})
        for file in shards.values() if isinstance(shards, dict) else ():
            if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
                raise UserError(
                    f"{field}: {index.name} in {name} names {str(file)!r:.80}, which is not a file of the folder"
                )


def _refuse_irregular(path: Path, field: str, name: str) -> None:
    """Raises UserError for a device, a pipe or a broken link, whose reading may never end, and for a file of absurd size."""
    if not path.is_file():
        raise UserError(f"{field}: {name} holds {path.name}, which is not a regular file; it was not read: remove it")
    size = path.stat().st_size
    most = MAX_SMALL_BYTES if path.name in SMALL_FILES else MAX_BYTES.get(path.suffix)
    if most is not None and size > most:
        raise UserError(
            f"{field}: {name} holds {path.name} of {size:,} bytes, over the {most:,} that such a file may have; it was not read"
        )


def _not_safetensors(path: Path) -> str:
    """What a file is instead; "" if it starts as safetensors do: a length, then a JSON object of that length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    if len(head) == 9 and length <= min(MAX_HEADER_BYTES, size - 8) and head[8:] == b"{":
        return ""  # even if the length happens to start with the byte that starts a pickle
    return "it is a pickle" if head[:2] == b"PK" or head[:1] == b"\x80" else "its header is not one"


def parse_json(data: bytes) -> Any:
    """The value of JSON in UTF-8. Raises TooManyValuesError, and ValueError or RecursionError for what is no JSON."""
    if sum(map(data.count, b",[{")) > MAX_JSON_VALUES:
        raise TooManyValuesError(f"has over {MAX_JSON_VALUES:,} values")
    return json.loads(data.decode("utf-8"))


def parse_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError with a sentence that begins with the file's name."""
    try:
        value = parse_json(path.read_bytes())
    except TooManyValuesError as error:
        raise ValueError(f"{path.name} {error}") from None
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no JSON object but {type(value).__name__}")
    return value


def read_object(path: Path, field: str, name: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError that names field and file."""
    try:
        return parse_object(path)
    except ValueError as error:
        raise UserError(f"{field}: {name} cannot be loaded ({error})") from None


def refuse_code(config: Mapping[str, Any], path: Path, field: str) -> None:
    """Raises UserError if a config (read from `path`) names Python code to import."""
    for key in ("auto_map", "custom_pipelines"):
        if config.get(key):
            raise UserError(
                f"{field}: {key} in {path} names code that would be imported and run; set models.trust_remote_code to true only "
                "if you have read it, or remove the entry"
            )


def refuse_kernels(config: Any, field: str, name: str) -> None:
    """Raises UserError if a config names a hub repository as its attention: transformers would download and run its code."""
    for part in (config, *(getattr(config, key, None) for key in type(config).sub_configs)):
        implementation = getattr(part, "_attn_implementation", None)
        if isinstance(implementation, str) and "/" in implementation:
            raise UserError(
                f"{field}: the config of {name} asks for attention by {implementation!r:.80}, code that would be downloaded and run; "
                "remove the entry, or set models.trust_remote_code to true only if you have read it"
            )


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its shape and the format's name of its type."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path, field: str, name: str) -> dict[str, Stored]:
    """Every tensor in a safetensors file by name. Raises UserError that names field and file."""
    try:
        status = path.stat()
        return dict(_parse_header(path, status.st_size, status.st_mtime_ns))
    except TooManyValuesError as error:
        raise UserError(f"{field}: {name} cannot be loaded (the header of {path.name} {error})") from None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{field}: {path.name} in {name} has a header that cannot be read ({error!r:.100})") from None


@lru_cache(maxsize=512)
def _parse_header(path: Path, size: int, changed: int) -> dict[str, Stored]:
    """The header of a file of this size and time of change; a preflight reads each about forty times."""
    with path.open("rb") as file:
        header = parse_json(file.read(int.from_bytes(file.read(8), "little")))
    return {
        tensor: Stored(tuple(int(extent) for extent in entry["shape"]), str(entry["dtype"]))
        for tensor, entry in header.items()
        if tensor != "__metadata__"
    }


def refuse_unlike_weights(config: Mapping[str, Any], folder: Path, field: str, name: str) -> None:
    """Raises UserError if config.json describes a model much larger than the folder's weights.

    A config of a few bytes can request a billion layers, and the missing weights would be filled with random numbers.
    """
    headers = [read_header(path, field, name) for path in folder.glob("*.safetensors")]
    tensors = sum(map(len, headers))
    numbers = sum(math.prod(stored.shape) for header in headers for stored in header.values())
    limits = (
        (LAYERS, tensors, f"{tensors} tensors"),
        (SIZES, max(numbers, 1), f"{numbers:,} numbers"),
    )
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for keys, limit, weights in limits:
            for key in keys:
                value = section.get(key)
                if isinstance(value, (int, float)) and not isinstance(value, bool) and value > limit:
                    raise UserError(f"{field}: {name} has weights of {weights}, and its config.json says {key} {value}")


@contextlib.contextmanager
def as_user_error(message: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn any error that a library raises over a damaged or hostile folder into a UserError (`kind`) that starts with `message`.

    Damage shows in many ways: a wrong type deep in a constructor, a shape, a panic in a tokenizer's native code, which is not
    even an Exception. Running out of memory is not the folder's fault and passes through.
    """
    try:
        yield
    except (HeadwaterError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        detail = error_text(error)
        if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
            detail = f"{type(error).__name__}: {detail}"
        if isinstance(error, ImportError):
            kind = UnsupportedModelError  # a package that is missing is no damage to the files
        raise kind(f"{message} ({detail})") from None
