"""Read the rows of data files: JSONL, JSON, Parquet, folders saved by `datasets`, and hub ids. Errors name the file and row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headwater.config.recipe import Source
from headwater.data.conversations import messages_of
from headwater.errors import UserError

MOST_BYTES, MOST_ROWS, PARQUET_ROWS = 4 << 30, 50_000_000, 256
"""Limits of a decompressed Parquet file, and the rows decompressed at once."""

Row = tuple[int, Mapping[str, Any]]


def read_rows(source: Source, where: str) -> Iterator[Row]:
    """Yield (number, row) pairs; the number is the line of a text file, else counted from 1."""
    assert source.path is not None
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _saved_folder(path, source.split, where)
    if path.suffix == ".parquet":
        return _parquet(path, where)
    if path.exists() or path.suffix in (".jsonl", ".json", ".txt", ".ndjson"):
        return json_rows(path, where)
    return _hub(source, where)


def json_rows(path: Path, where: str) -> Iterator[Row]:
    """Yield the objects of a JSONL file, or of a JSON file that is one list; blank lines are skipped."""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe has no end
            raise UserError(f"{where}: is not a file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise UserError(f"{where}, row {row}: is not UTF-8 text") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: is not JSON ({error})") from None
        yield from ((number, _object(value, f"{where}, row {number}")) for number, value in enumerate(values, 1))
        return
    # Only \n ends a row: U+2028 and the like may occur unescaped in JSON strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, row {number}: is not JSON ({error})") from None
        yield number, _object(value, f"{where}, row {number}")


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, list) and messages_of(value) is not None:  # a conversation alone, as in ORZ's files
        return {"conversation": value}
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object but {type(value).__name__}")
    return value


def _parquet(path: Path, where: str) -> Iterator[Row]:
    if not path.exists():
        raise UserError(f"{where}: no such file")
    import pyarrow.parquet  # comes with `datasets`; slow to import

    number = unpacked_bytes = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata = file.metadata
            declared = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
            if max(declared, 0) > MOST_BYTES or metadata.num_rows > MOST_ROWS:
                raise UserError(
                    f"{where}: unpacks to {metadata.num_rows:,} rows of {declared:,} bytes; that is no file of problems"
                )
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                unpacked_bytes += batch.nbytes  # repeated values are far smaller in the file than in memory
                if unpacked_bytes > MOST_BYTES:
                    raise UserError(f"{where}: unpacks to more than {MOST_BYTES:,} bytes; that is no file of problems")
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow raises many kinds
        raise UserError(f"{where}: cannot be read as Parquet ({_one_line(error)})") from None


def _saved_folder(path: Path, split: str, where: str) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{where}: is not a folder saved by datasets ({_one_line(error)})") from None
    yield from _rows_of_split(data, split, where)


def _hub(source: Source, where: str) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:
        raise UserError(f"{where}: is no file here and cannot be loaded from the hub ({_one_line(error)})") from None
    yield from enumerate(data, 1)


def _rows_of_split(data: Any, split: str, where: str) -> Iterator[Row]:
    import datasets

    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{where}: has no split {split!r}, only {', '.join(data)}")
        data = data[split]
    yield from enumerate(data, 1)


def _one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:200] or type(error).__name__}"
