"""Fuzz cases of tables: Parquet, Arrow and CSV with columns of every type, and damaged ones."""

from __future__ import annotations

import csv
import random
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet

from fuzz_data import QUICK, as_file, some_rows
from fuzz_recipes import WrongError
from headwater.config.recipe import Columns, Source
from headwater.data.sources import load
from headwater.data.validate import validate
from headwater.errors import UserError
from headwater.tasks.registry import TASKS
from malformed_inputs import spoiled

REFUSED = object()
"""A cell that is no answer."""


def column_cells(draw: random.Random, count: int) -> tuple[pyarrow.Array, list[Any]]:
    """(column of a drawn type, expected gold of each cell: text, None for no answer, or REFUSED)."""
    kind = draw.choice(list(COLUMNS))
    cells = [COLUMNS[kind](draw) for _ in range(count)]
    holes = [draw.random() < 0.1 for _ in cells]
    values = [None if hole else value for hole, (value, _) in zip(holes, cells, strict=True)]
    golds = [None if hole else gold for hole, (_, gold) in zip(holes, cells, strict=True)]
    return pyarrow.array(values, TYPES[kind]), golds


def integer(bits: int, signed: bool = True) -> Any:
    def cell(draw: random.Random) -> tuple[int, str]:
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        value = draw.choice([draw.randint(least, most), least, most, draw.randint(0, 99)])
        return value, str(value)

    return cell


def short_float(digits: int) -> Any:
    """Floats of few decimal digits, few enough for their width to keep them."""

    def cell(draw: random.Random) -> tuple[float, str]:
        whole = draw.randint(-(10**digits) + 1, 10**digits - 1)
        text = str(Decimal(whole).scaleb(-draw.randint(0, digits)))
        value = float(text)
        return value, str(int(value)) if value.is_integer() else repr(value)

    return cell


def half_float(draw: random.Random) -> Any:
    value, gold = short_float(3)(draw)
    return numpy.float16(value), gold


def decimal(draw: random.Random) -> tuple[Decimal, str]:
    value = Decimal(draw.randint(-(10**9), 10**9)).scaleb(-4)
    return value, str(int(value)) if value == int(value) else f"{value:f}"


def text_bytes(draw: random.Random) -> tuple[bytes, Any]:
    if draw.random() < 0.1:
        return b"\xff\xfe\x00", REFUSED
    text = draw.choice(["42", "x + 1", "Zürich", "½", "1,080", "", " ", "A"])
    return text.encode(), text.strip() or None


def text_cell(draw: random.Random) -> tuple[str, Any]:
    return draw.choice(
        [
            ("#### 42", "42"),
            ("so\n#### 1,080", "1,080"),
            ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
            ("####", None),
            ("7", "7"),
        ]
    )


def one_of_a_list(draw: random.Random) -> tuple[Any, Any]:
    value = draw.choice(["42", "x", "1/2"])
    return draw.choice([([value], value), ([value, "other"], REFUSED)])


def moment(draw: random.Random) -> tuple[datetime, str]:
    value = datetime(2024, 1, 1) + timedelta(days=draw.randint(0, 700), minutes=draw.choice([0, 0, 61, 721]))
    return value, value.strftime("%Y-%m-%d" if value.time() == time() else "%Y-%m-%d %H:%M:%S")


def day(draw: random.Random) -> tuple[date, str]:
    value = date(2024, 1, 1) + timedelta(days=draw.randint(0, 700))
    return value, value.strftime("%Y-%m-%d")


TYPES: dict[str, Any] = {
    **{f"{sign}int{bits}": getattr(pyarrow, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float16": pyarrow.float16(), "float32": pyarrow.float32(), "float64": pyarrow.float64(),
    "decimal128": pyarrow.decimal128(20, 4), "decimal256": pyarrow.decimal256(40, 4), "binary": pyarrow.binary(),
    "large_binary": pyarrow.large_binary(), "string": pyarrow.string(), "large_string": pyarrow.large_string(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), "list": pyarrow.list_(pyarrow.string()),
    "large_list": pyarrow.large_list(pyarrow.string()), "bool": pyarrow.bool_(), "date32": pyarrow.date32(),
    "timestamp": pyarrow.timestamp("us"), "null": pyarrow.null(), "duration": pyarrow.duration("s"),
    "struct": pyarrow.struct([("x", pyarrow.int32())]), "map": pyarrow.map_(pyarrow.string(), pyarrow.int32()),
    "list of lists": pyarrow.list_(pyarrow.list_(pyarrow.int64())),
}  # fmt: skip
COLUMNS: dict[str, Any] = {
    **{f"int{bits}": integer(bits) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": integer(bits, signed=False) for bits in (8, 16, 32, 64)},
    "float16": half_float, "float32": short_float(6), "float64": short_float(15), "decimal128": decimal, "decimal256": decimal,
    "binary": text_bytes, "large_binary": text_bytes, "string": text_cell, "large_string": text_cell, "dictionary": text_cell,
    "list": one_of_a_list, "large_list": one_of_a_list, "bool": lambda draw: draw.choice([(True, "True"), (False, "False")]),
    "date32": day, "timestamp": moment, "null": lambda draw: (None, None),
    "duration": lambda draw: (timedelta(seconds=draw.randint(0, 9)), REFUSED), "struct": lambda draw: ({"x": 1}, REFUSED),
    "map": lambda draw: ([("a", 1), ("b", 2)], REFUSED), "list of lists": lambda draw: ([[1, 2], [3]], REFUSED),
}  # fmt: skip
"""Type of a column -> a drawn cell of it, with its gold."""


def table(draw: random.Random, folder: Path) -> str:
    """A Parquet, Arrow or CSV file whose answers have a drawn type, alone or within an object."""
    count = draw.choice([1, 3, 8])
    answers, golds = column_cells(draw, count)
    kind, column = str(answers.type), "answer"
    if draw.random() < 0.2:
        answers, column = pyarrow.StructArray.from_arrays([answers], ["ground_truth"]), "reward_model"
    problems = pyarrow.array(
        [f"What is number {n}?" for n in range(count)], draw.choice([pyarrow.string(), pyarrow.large_string()])
    )
    made = pyarrow.table({"question": problems, column: answers, "other": column_cells(draw, count)[0]})
    path = folder / draw.choice(["d.parquet", "d.arrow", "d.feather"])
    as_file(made, path)
    source = Source(path=str(path), columns=Columns(answer="reward_model.ground_truth" if column != "answer" else None))
    refused = next((n for n, gold in enumerate(golds, 1) if gold is REFUSED), None)
    try:
        loaded = load(source, "data.labeled", need_answers=False)
    except UserError as error:
        if refused is None or f"row {refused}:" not in str(error):
            raise WrongError(f"{kind} {answers.to_pylist()}: {error}") from None
        raise
    read = [loaded.gold.get(problem.id) for problem in loaded.problems]
    if read != golds:
        raise WrongError(f"{kind} {answers.to_pylist()}: read {read}, not {golds}")
    return "read"


def separated(draw: random.Random, folder: Path) -> str:
    """A CSV or TSV file: every cell is text."""
    mark = draw.choice([",", ";", "\t"])
    texts = ["42", "a, b", 'say "hi"', "x;y", "line\nline", "½", "0.10", "007", "1e5", "TRUE", "tab\there"]
    rows = [(f"What is {draw.choice(texts)} ({n})?", draw.choice(texts)) for n in range(draw.choice([1, 3, 8]))]
    path = folder / ("d.tsv" if mark == "\t" and draw.random() < 0.5 else "d.csv")
    with path.open("w", encoding=draw.choice(["utf-8", "utf-8-sig"]), newline="") as file:
        writer = csv.writer(
            file, delimiter=mark, lineterminator=draw.choice(["\n", "\r\n"]), quoting=draw.choice([0, 1])
        )
        writer.writerows([("problem", "answer"), *rows])
    if draw.random() < 0.4:
        path.write_bytes(spoiled(draw, path.read_bytes()))
        load(Source(path=str(path)), "data.labeled", need_answers=False, gold=TASKS["exact"].gold)
        return "read damaged"
    loaded = load(Source(path=str(path)), "data.labeled", need_answers=True, gold=TASKS["exact"].gold)
    read = [(problem.text, loaded.gold[problem.id]) for problem in loaded.problems]
    if read != rows:
        raise WrongError(f"{path.read_text(encoding='utf-8')!r}: read {read}")
    return "read"


def typed_cells(draw: random.Random) -> Any:
    """An Arrow array of a random type with random bytes as its values."""
    kinds = [
        pyarrow.float16(),
        pyarrow.float32(),
        pyarrow.float64(),
        pyarrow.int8(),
        pyarrow.uint64(),
        pyarrow.decimal128(9, 3),
        pyarrow.binary(),
        pyarrow.date32(),
    ]
    kinds += [
        pyarrow.timestamp("ns"),
        pyarrow.duration("s"),
        pyarrow.time32("s"),
        pyarrow.bool_(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.binary()),
    ]
    kind, count = draw.choice(kinds), draw.randint(1, 5)
    if pyarrow.types.is_dictionary(kind):
        cells = pyarrow.array([draw.randbytes(3) for _ in range(count)], pyarrow.binary()).dictionary_encode()
    elif pyarrow.types.is_binary(kind):
        cells = pyarrow.array([draw.randbytes(draw.randint(0, 4)) for _ in range(count)], kind)
    else:
        width = max(1, kind.bit_width * count // 8 + 1)
        cells = pyarrow.Array.from_buffers(kind, count, [None, pyarrow.py_buffer(draw.randbytes(width))])
    if draw.random() < 0.3:
        cells = pyarrow.ListArray.from_arrays(pyarrow.array(range(count + 1), pyarrow.int32()), cells)
    return cells


def parquet(draw: random.Random, folder: Path) -> str:
    path = folder / "d.parquet"
    rows = [row for row in some_rows(draw, ["problem", "answer"]) if isinstance(row, dict)]
    flat = [
        {
            str(key): value if isinstance(value, str) and value.isascii() else repr(value)[:50]
            for key, value in row.items()
        }
        for row in rows
    ]
    table = pyarrow.Table.from_pylist(flat or [{"problem": "1+1", "answer": "2"}])
    shape = draw.random()
    if shape < 0.2:
        table = pyarrow.table({"problem": [[1], None], "answer": [{"a": 1}, {"a": 2}]})
    elif shape < 0.6:
        answers = typed_cells(draw)
        table = pyarrow.table({"problem": [f"{n}+1" for n in range(len(answers))], "answer": answers})
    form = draw.choice(["parquet", "parquet", "arrow", "stream", "csv"])
    if form == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif form == "csv":
        path = folder / draw.choice(["d.csv", "d.tsv"])
        path.write_text(
            "\n".join(
                draw.choice(",;\t").join(map(str, row if draw.random() < 0.5 else row.values()))
                for row in [{"problem": 0, "answer": 0}, *flat]
            ),
            "utf-8",
        )
    else:
        path = folder / "d.arrow"
        make = pyarrow.ipc.new_file if form == "arrow" else pyarrow.ipc.new_stream
        with make(path, table.schema) as file:
            file.write_table(table)
    if draw.random() < 0.4:
        path.write_bytes(spoiled(draw, path.read_bytes()))
    validate(Source(path=str(path)), draw.choice(QUICK), workers=1)
    return "validated"
