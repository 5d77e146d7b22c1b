"""Model folders from people we do not know: what is looked at before a library opens anything in them.

Weights are read from safetensors alone, which hold numbers and nothing else. A pickle is a program; it is refused by name,
not read. So is code that a config would have imported, unless the recipe says so.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headwater.errors import HeadwaterError, UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


def refuse_unsafe(folder: Path, field: str, name: str) -> None:
    """Raises UserError for a folder with a pickle in it, also one that calls itself safetensors."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICKLES:
            raise UserError(
                f"{field}: {name} holds {path.name}, a pickle, which can run any program when it is read; it was not read: keep "
                "only *.safetensors there"
            )
        if path.suffix == ".safetensors" and path.is_file():
            wrong = _not_safetensors(path)
            if wrong:
                raise UserError(
                    f"{field}: {name} cannot be loaded ({path.name} is no safetensors file: {wrong}; it was not read)"
                )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_object(index, field, name).get("weight_map", {})
        outside = [one for one in shards.values() if not _plain(one)] if isinstance(shards, dict) else []
        if outside:
            raise UserError(
                f"{field}: {index.name} in {name} names {str(outside[0])!r:.80}, which is not a file of the folder"
            )


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")


def _not_safetensors(path: Path) -> str:
    """What a file is instead; "" where it begins as safetensors do: a length, then a JSON object of that length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    if len(head) == 9 and length <= min(LONGEST_HEADER, size - 8) and head[8:] == b"{":
        return ""  # also where the length happens to begin with the byte that a pickle begins with
    return "it is a pickle" if head[:2] == b"PK" or head[:1] == b"\x80" else "its header is not one"


def refuse_code(folder: Path, field: str, name: str) -> None:
    """Raises UserError where a config names Python code of the folder to be imported (`auto_map`)."""
    for path in (folder / one for one in CONFIGS):
        if not path.is_file():
            continue
        held = read_object(path, field, name)
        for key in ("auto_map", "custom_pipelines"):
            if held.get(key):
                raise UserError(
                    f"{field}: {key} in {path} names code that would be imported and run; set models.trust_remote_code to true only "
                    "if you have read it, or remove the entry"
                )


def read_object(path: Path, field: str, name: str) -> dict[str, Any]:
    """A JSON object. Raises UserError that names field and file."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{field}: {name} cannot be loaded ({path.name} is not JSON: {error})") from None
    if not isinstance(held, dict):
        raise UserError(f"{field}: {name} cannot be loaded ({path.name} is no JSON object but {type(held).__name__})")
    return held


def refuse_unlike_weights(folder: Path, field: str, name: str) -> None:
    """Raises UserError where config.json describes a model far larger than the weights beside it: it would be made up.

    A config of a few bytes may ask for a billion layers, and the missing ones would be filled with random numbers.
    """
    held = read_object(folder / "config.json", field, name)
    counts, numbers = 0, 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        try:
            tensors = {key: one for key, one in json.loads(header).items() if key != "__metadata__"}
            counts += len(tensors)
            numbers += sum(_product(one["shape"]) for one in tensors.values())
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{field}: {path.name} in {name} has a header that cannot be read ({error!r:.100})"
            ) from None
    for section in (held, *(one for one in held.values() if isinstance(one, dict))):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if _number(section.get(key)) > counts:
                raise UserError(
                    f"{field}: {name} has weights of {counts} tensors, and its config.json says {key} {section[key]}"
                )
        for key in ("vocab_size", "hidden_size", "intermediate_size", "n_embd", "n_inner"):
            if _number(section.get(key)) > max(numbers, 1):
                raise UserError(
                    f"{field}: {name} has weights of {numbers:,} numbers, and its config.json says {key} {section[key]}"
                )


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a library raises over a damaged or hostile folder becomes one sentence that begins with `what`.

    Damage shows itself in any way: a wrong type deep in a constructor, a shape, a panic of a tokenizer's native code, which is
    not even an Exception. A model that does not fit into memory is not the folder's fault and is left alone.
    """
    try:
        yield
    except (HeadwaterError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        said = " ".join(str(error).split()) or type(error).__name__
        plain = isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
        raise UserError(
            f"{what} ({said[:200]})" if plain else f"{what} ({type(error).__name__}: {said[:200]})"
        ) from None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0


def _product(shape: list[int]) -> int:
    found = 1
    for one in shape:
        found *= int(one)
    return found
