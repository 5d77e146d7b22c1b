"""Read a model's generation config so that it can be saved again.

transformers reads entries that contradict each other, such as a temperature without `do_sample`, and refuses to write them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import cached_file

from headwater.models.untrusted_files import parse_object

FILE = "generation_config.json"
MODES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")
"""Entries that decide which others are valid."""
SAMPLING = frozenset({
    "temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "num_return_sequences",
})  # fmt: skip
"""Entries that are valid only with `do_sample`."""
MAX_ENTRIES, MAX_CHARACTERS = 500, 1 << 18
"""Bounds of a generation config, and of the ids that end a completion: each entry may be tried with a copy of all others, and every
such id is compared with every token."""


def read_generation_config(path: str, config: Mapping[str, Any]) -> tuple[GenerationConfig, tuple[str, ...]]:
    """(generation config, what had to be changed so that it can be saved) of a folder or hub id.

    config  contents of config.json, from which transformers derives the generation config of a folder that has none

    A sampling setting without `do_sample` turns `do_sample` on: engines such as vLLM sample with the setting whatever `do_sample`
    says. Every other entry that transformers refuses to write is left out; no such entry affects training or evaluation here.
    Raises ValueError for ids that end a completion and are none, and for a file of absurd size.
    """
    file = cached_file(path, FILE, _raise_exceptions_for_missing_entries=False)
    try:
        entries = _derived(config) if file is None else parse_object(Path(file))
    except ValueError:
        entries = _derived(config)  # as transformers does
    _refuse_unusual({"eos_token_id": config.get("eos_token_id")})  # these end a completion, too
    _refuse_unusual(entries)
    valid = _valid(entries)
    if valid is not None:
        return valid, ()
    kept: dict[str, Any] = {}
    dropped = []
    for name in sorted(entries, key=lambda name: name not in MODES):
        added = {**kept, name: entries[name]}
        if _valid(added) is None and name in SAMPLING and entries[name]:  # a temperature of 0 means no sampling
            added["do_sample"] = True
        if _valid(added) is None:
            dropped.append(name)
        else:
            kept = added
    changes = ["do_sample is set to true"] if kept.get("do_sample") != entries.get("do_sample") else []
    changes += [f"{name} is left out" for name in dropped]
    return GenerationConfig.from_dict(kept), tuple(changes)


def _refuse_unusual(entries: Mapping[str, Any]) -> None:
    if len(entries) > MAX_ENTRIES or len(json.dumps(entries, default=str)) > MAX_CHARACTERS:
        raise ValueError(
            f"it has over {MAX_ENTRIES} entries or {MAX_CHARACTERS:,} characters, eos_token_id of the config included"
        )
    ids = entries.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(value) is int and abs(value) < 1 << 31 for value in listed):
        raise ValueError("eos_token_id must be a token id or a list of them")


def _derived(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that transformers takes from a config.json, where older models keep them."""
    known = GenerationConfig().to_dict()
    try:
        derived = GenerationConfig.from_model_config(copy.deepcopy(dict(config)))
    except (ValueError, TypeError, AttributeError):  # its entries contradict each other
        return {name: value for name, value in config.items() if name in known and value is not None}
    return {name: value for name, value in derived.to_dict().items() if value is not None}


def _valid(entries: Mapping[str, Any]) -> GenerationConfig | None:
    """The generation config with these entries; None if transformers refuses to make or to write it."""
    try:
        made = GenerationConfig.from_dict(copy.deepcopy(dict(entries)))
        made.validate(strict=True)
        made.to_json_string(keys_to_pop=["compile_config"])
    except Exception:  # entries of a wrong type raise errors of many types
        return None
    return made
