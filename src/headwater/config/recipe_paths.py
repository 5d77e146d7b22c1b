"""Relative paths in a recipe file: a file or folder in the recipe's folder, else one in the working directory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headwater.errors import UserError, similar_file

FIELDS = {"models": ("student", "teacher", "expert"), "data": ("labeled", "unlabeled", "evals", "validation")}
"""Section -> its fields that name files and folders."""
_BESIDE_PATH = ("split", "columns", "limit", "hash_range", "generate")
"""Fields of a data source that name none."""
_SURELY_PATH = re.compile(r"\.\.?/|[^:]+/[^:]+/|.*\.(jsonl?|csv|tsv|parquet|arrow)(\.(gz|bz2|zst))?$")
"""Names that are no hub id and no `pocket:NAME`: `./student`, `a/b/c`, `train.jsonl`."""


def with_paths(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe's plain values, in which paths that exist in its folder lead there from the working directory.

    Example: of `configs/my.yaml` with `data: {labeled: train.jsonl}` and a file `configs/train.jsonl`, `configs/train.jsonl`.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: inner if key in _BESIDE_PATH else moved(inner) for key, inner in value.items()}
        in_folder = os.path.normpath(folder / value) if isinstance(value, str) and not value.startswith("~") else ""
        return in_folder if in_folder and os.path.exists(in_folder) else value

    if os.path.realpath(folder) == os.getcwd():
        return dict(raw)
    sections = {section: raw[section] for section in FIELDS if isinstance(raw.get(section), dict)}
    return {**raw} | {
        section: {name: moved(value) if name in FIELDS[section] else value for name, value in fields.items()}
        for section, fields in sections.items()
    }


def refuse_missing(recipe: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError with both folders for a relative path of a recipe elsewhere that leads to nothing in either.

    A data file whose `limit` says how many problems a dry run may assume is left for the caller that reads it.
    """

    def names(value: Any, field: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, str):
            yield field, value
        elif isinstance(value, dict) and value.get("limit") is None:
            for key, inner in value.items():
                yield from () if key in _BESIDE_PATH else names(inner, field if key == "path" else f"{field}.{key}")

    here = os.getcwd()
    if os.path.realpath(folder) == here:
        return
    fields = [(section, name) for section, inside in FIELDS.items() for name in inside]
    for field, name in (pair for section, key in fields for pair in names(recipe[section][key], f"{section}.{key}")):
        relative = not os.path.isabs(name) and _SURELY_PATH.match(name)
        if relative and not (os.path.exists(name) or os.path.exists(os.path.join(folder, name))):
            places = [os.path.dirname(os.path.join(base, name)) for base in (folder, here)]
            files = [file for place in places if os.path.isdir(place) for file in os.listdir(place)]
            raise UserError(
                f"{field}: {name}: no such file or folder, neither in the recipe's folder {os.path.abspath(folder)} nor in the "
                f"working directory {here}{similar_file(name, files)}"
            )
