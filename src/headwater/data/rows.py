"""Read the rows of data files: JSONL, JSON, CSV, TSV, Parquet, Arrow, folders saved by `datasets`, and hub ids.

Text files may be compressed (`.gz`, `.bz2`, `.zst`). Errors name the file and the row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from headwater.config.recipe import Source
from headwater.data.arrow_rows import ArrowRow
from headwater.data.conversations import messages_of
from headwater.errors import UserError, error_text, similar_file
from headwater.storage import hub

MOST_BYTES, MOST_ROWS, BATCH_ROWS = 4 << 30, 50_000_000, 256
"""Limits of a decompressed file, and the rows of a table decompressed at once."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
FORMATS = "JSONL, JSON, CSV, TSV, Parquet, Arrow, or a folder saved by datasets"

Row = tuple[int, Mapping[str, Any]]


def read_rows(source: Source, where: str) -> Iterator[Row]:
    """Yield (number, row) pairs of a source; the number is the line of a text file, else counted from 1."""
    assert source.path is not None
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _saved_folder(path, source.split, where)
    if path.exists() or _format(path) in (*_TEXT_READERS, *_TABLE_READERS):
        return file_rows(path, where)
    return _hub(source, where)


def file_rows(path: Path, where: str) -> Iterator[Row]:
    """Yield the rows of a file; its name tells the format, and a name without a known ending is JSONL."""
    suffix = _format(path)
    if suffix not in _TABLE_READERS:
        return _TEXT_READERS.get(suffix, _json_lines)(_text(path, where), where)
    if path.suffix.lower() in COMPRESSIONS:
        raise UserError(f"{where}: is a compressed {suffix[1:]} file; decompress it")
    if not path.is_file():
        raise UserError(f"{where}: {'is not a file' if path.exists() else no_such_file(path)}")
    return _TABLE_READERS[suffix](path, where)


def _format(path: Path) -> str:
    """The ending of a file's name without its compression. Example: `.csv` of `a.csv.gz`."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def no_such_file(path: Path) -> str:
    """Sentence that a file is missing, with the nearest name in its folder.

    Example: `no such file in /home/me; did you mean data/train.jsonl?`
    """
    missing = "no such file" if path.is_absolute() else f"no such file in {Path.cwd()}"
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    return missing + similar_file(str(path), [str(other) for other in siblings if other.is_file()])


# Text files -----------------------------------------------------------------------------------------------------------


def _text(path: Path, where: str) -> str:
    try:
        if path.exists() and not path.is_file():  # a device or a pipe has no end
            raise UserError(f"{where}: is not a file")
        if path.exists() and path.stat().st_size > MOST_BYTES:
            raise UserError(f"{where}: has over {MOST_BYTES:,} bytes; that is no file of problems")
        data = _decompressed(path, where) if path.suffix.lower() in COMPRESSIONS else path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{where}: {no_such_file(path)}") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error_text(error)})") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise UserError(f"{where}, row {row}: is not UTF-8 text; data files are {FORMATS}") from None


def _decompressed(path: Path, where: str) -> bytes:
    import pyarrow  # comes with `datasets`; slow to import

    with pyarrow.input_stream(str(path), compression=COMPRESSIONS[path.suffix.lower()]) as file:
        data: bytes = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"{where}: unpacks to more than {MOST_BYTES:,} bytes; that is no file of problems")
    return data


def _json_file(text: str, where: str) -> Iterator[Row]:
    """Yield the objects of a JSON file that is one list; any other is read as JSONL."""
    if not text.lstrip().startswith("["):
        if re.match(r"\s*\{\s*\n", text):  # indented, so not one object a line
            raise UserError(
                f"{where}: begins with an object over several lines; write a list of objects, or one object a line"
            )
        yield from _json_lines(text, where)
        return
    try:
        values = json.loads(text, object_pairs_hook=_object_of_pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None
    yield from ((number, _object(value, f"{where}, row {number}")) for number, value in enumerate(values, 1))


def _json_lines(text: str, where: str) -> Iterator[Row]:
    # Only \n ends a row: U+2028 and the like may occur unescaped in JSON strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object_of_pairs)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, row {number}: is not JSON ({error})") from None
        yield number, _object(value, f"{where}, row {number}")


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a repeated key: Python's reader would keep the last value without a word."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return made


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, list) and messages_of(value) is not None:  # a conversation alone, as in ORZ's files
        return {"conversation": value}
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object but {type(value).__name__}")
    return value


def _comma_separated(text: str, where: str) -> Iterator[Row]:
    """Rows of a CSV file; its delimiter is the one of `,`, `;` and tab that divides the header most."""
    header = text.lstrip("\r\n").splitlines()[:1]
    widths = {mark: len(next(csv.reader(header, delimiter=mark), [])) for mark in ",;\t"}
    return _delimited(text, where, max(widths, key=lambda mark: widths[mark]))


def _delimited(text: str, where: str, delimiter: str = "\t") -> Iterator[Row]:
    """Rows of a table whose first line names the columns; every cell is text, also one that looks like a number."""
    csv.field_size_limit(MOST_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{where}, row {number}: cannot be read as CSV ({error})") from None
        if cells is None:
            return
        if not cells or cells == [""]:
            continue
        if not header:
            header = [name.strip() for name in cells]
            repeated = [name for name in header if name and header.count(name) > 1]
            if repeated:
                raise UserError(f"{where}, row {number}: several columns are named {repeated[0]!r}; rename all but one")
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{where}, row {number}: has {len(cells)} cells, but the header names {len(header)} columns; "
                f"put cells that contain {delimiter!r} or a line break in double quotes"
            )
        yield number, dict(zip(header, cells, strict=True))


# Tables ---------------------------------------------------------------------------------------------------------------


def _parquet(path: Path, where: str) -> Iterator[Row]:
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata = file.metadata
            declared = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
            if max(declared, 0) > MOST_BYTES or metadata.num_rows > MOST_ROWS:
                raise UserError(
                    f"{where}: unpacks to {metadata.num_rows:,} rows of {declared:,} bytes; that is no file of problems"
                )
            yield from file.iter_batches(batch_size=BATCH_ROWS)

    return _table_rows(batches(), where, f"{where}: cannot be read as Parquet")


def _arrow(path: Path, where: str) -> Iterator[Row]:
    """Rows of an Arrow file in either of its two forms: with a footer (Feather), or a stream, as `datasets` writes it."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as file:
            footer = file.read(6) == b"ARROW1"
            file.seek(0)
            table = pyarrow.ipc.open_file(file) if footer else pyarrow.ipc.open_stream(file)
            made = (table.get_batch(index) for index in range(table.num_record_batches)) if footer else table
            for batch in made:
                batch.validate(full=True)  # offsets of a damaged file would lead outside the memory
                yield batch

    return _table_rows(batches(), where, f"{where}: cannot be read as Arrow")


def _table_rows(batches: Iterator[Any], where: str, failure: str, json_columns: Collection[str] = ()) -> Iterator[Row]:
    """Rows of Arrow batches. Raises UserError that begins with `failure` if one cannot be read or all are too large."""
    number = unpacked_bytes = 0
    try:
        for batch in batches:
            unpacked_bytes += batch.nbytes  # repeated values are far smaller in the file than in memory
            if unpacked_bytes > MOST_BYTES:
                raise UserError(f"{where}: unpacks to more than {MOST_BYTES:,} bytes; that is no file of problems")
            for index in range(batch.num_rows):
                number += 1
                yield number, ArrowRow(batch, index, json_columns)
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow raises many kinds
        raise UserError(f"{failure} ({error_text(error)})") from None


def _saved_folder(path: Path, split: str, where: str) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{where}: is not a folder saved by datasets ({error_text(error)})") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{where}: has no split {split!r}, only {', '.join(data)}")
        data = data[split]
    yield from _dataset_rows(data, where)


def _hub(source: Source, where: str) -> Iterator[Row]:
    name = source.path or ""
    if "/" in name and not hub.HUB_ID.match(name) and not name.startswith("hf://"):
        raise UserError(f"{where}: no such file or folder")
    reason = hub.unreachable()
    if reason is None and hub.HUB_ID.match(name):
        hub.refuse_absent(where.removesuffix(f": {name}"), name, "data set")
    import datasets  # after the probe: it reads whether the hub is offline only once

    try:
        data = datasets.load_dataset(name, split=source.split)
    except Exception as error:
        if reason is not None and hub.in_local_folder(name):
            raise UserError(f"{where}: no such file or folder") from None
        if reason is not None:
            raise UserError(
                f"{where}: is no file here, and the hub cannot be reached {hub.remedy('it', reason)}"
            ) from None
        raise UserError(f"{where}: is no file here and cannot be loaded from the hub ({error_text(error)})") from None
    yield from _dataset_rows(data, where)


def _dataset_rows(data: Any, where: str) -> Iterator[Row]:
    """Rows of a `datasets` table, read as Arrow: its own Python rows have lost the width of each float."""
    batches = data.with_format("arrow").iter(batch_size=BATCH_ROWS)
    json_columns = [name for name, feature in (data.features or {}).items() if type(feature).__name__ == "Json"]
    return _table_rows(batches, where, f"{where}: cannot be read", json_columns)


_TEXT_READERS: Mapping[str, Callable[[str, str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".txt": _json_lines,
    ".json": _json_file,
    ".csv": _comma_separated,
    ".tsv": _delimited,
}
_TABLE_READERS: Mapping[str, Callable[[Path, str], Iterator[Row]]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}
