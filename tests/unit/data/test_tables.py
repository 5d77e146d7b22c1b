"""Cells of Parquet, Arrow, `datasets` folders and CSV give the gold answers that a person would write."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from headwater.config.recipe import Columns, Source
from headwater.data.cells import plain_value
from headwater.data.sources import load
from headwater.errors import UserError
from headwater.tasks.golds import cell_as_is

Write = Callable[[pa.Table, Path], str]


def as_parquet(table: pa.Table, folder: Path) -> str:
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return str(folder / "a.parquet")


def as_feather(table: pa.Table, folder: Path) -> str:
    with pa.ipc.new_file(folder / "a.arrow", table.schema) as file:
        file.write_table(table)
    return str(folder / "a.arrow")


def as_stream(table: pa.Table, folder: Path) -> str:
    with pa.ipc.new_stream(folder / "b.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=2)
    return str(folder / "b.arrow")


def as_folder(table: pa.Table, folder: Path) -> str:
    import datasets

    datasets.Dataset(table).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


WRITERS: list[Write] = [as_parquet, as_feather, as_stream, as_folder]


def golds(path: str, gold: Any = None, **columns: str) -> list[str | None]:
    loaded = load(Source(path=path, columns=Columns(**columns)), "data.labeled", need_answers=False, gold=gold)
    return [loaded.gold.get(problem.id) for problem in loaded.problems]


def table(answers: pa.Array, name: str = "answer") -> pa.Table:
    return pa.table({"question": [f"What is number {n}?" for n in range(len(answers))], name: answers})


# What was written, the type of its column, and what a person would write.
CELLS: list[tuple[list[Any], pa.DataType, list[str | None]]] = [
    ([0.1, 0.3, 2.5, 3.0, None, -0.07], pa.float32(), ["0.1", "0.3", "2.5", "3", None, "-0.07"]),
    ([1e20, 16777216.0, 1.5e-7], pa.float32(), ["1e+20", "16777216", "1.5e-07"]),
    ([np.float16(0.1), np.float16(3.0), np.float16(0.3)], pa.float16(), ["0.1", "3", "0.3"]),
    ([0.1, 27.0, 1 / 3, float("nan")], pa.float64(), ["0.1", "27", "0.3333333333333333", None]),
    ([Decimal("12.50"), Decimal("72.00"), None], pa.decimal128(10, 2), ["12.50", "72", None]),
    ([Decimal("1E+3"), Decimal("-0.000001")], pa.decimal256(40, 6), ["1000", "-0.000001"]),
    ([2**64 - 1, 0], pa.uint64(), ["18446744073709551615", "0"]),
    ([-(2**63), 2**53 + 1], pa.int64(), ["-9223372036854775808", "9007199254740993"]),
    ([7, 8], pa.int8(), ["7", "8"]),
    ([b"42", "Zürich".encode(), b""], pa.binary(), ["42", "Zürich", None]),
    ([b"42"], pa.large_binary(), ["42"]),
    ([b"12", b"13"], pa.binary(2), ["12", "13"]),
    (["x", "y", "x"], pa.dictionary(pa.int32(), pa.string()), ["x", "y", "x"]),
    (["1/2"], pa.large_string(), ["1/2"]),
    ([[0.1], [3.0]], pa.list_(pa.float32()), ["0.1", "3"]),
    ([["42"]], pa.large_list(pa.string()), ["42"]),
    ([[b"42"]], pa.list_(pa.binary(), 1), ["42"]),
    ([True, False], pa.bool_(), ["True", "False"]),
    ([date(2024, 5, 1)], pa.date32(), ["2024-05-01"]),
    ([datetime(2024, 5, 1), datetime(2024, 5, 1, 15, 45)], pa.timestamp("us"), ["2024-05-01", "2024-05-01 15:45:00"]),
    ([time(15, 45), time(3, 5, 20)], pa.time32("s"), ["15:45", "03:05:20"]),
    ([None, None], pa.null(), [None, None]),
]


@pytest.mark.parametrize("write", WRITERS)
def test_each_column_type_gives_its_written_gold(write: Write, tmp_path: Path) -> None:
    for number, (written, kind, wanted) in enumerate(CELLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        if write is as_folder and (pa.types.is_decimal256(kind) or pa.types.is_null(kind)):
            continue  # datasets has no such feature, or reads it back as another
        assert golds(write(table(pa.array(written, kind)), folder)) == wanted, kind


def test_narrow_floats_run_ends_and_unions_give_shortest_decimal(tmp_path: Path) -> None:
    narrow = pa.array([0.1, 0.7], pa.float32())
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), narrow)
    union = pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [narrow, pa.array([b"x", b"1/2"])])
    assert golds(as_stream(table(runs), tmp_path)) == ["0.1", "0.1", "0.7"]
    assert golds(as_stream(table(union), tmp_path)) == ["0.1", "1/2"]


def test_short_decimals_survive_float32(tmp_path: Path) -> None:
    written = [f"{n / 1000:.3f}" for n in range(1, 3000, 7)]
    path = as_parquet(table(pa.array([float(text) for text in written], pa.float32())), tmp_path)
    assert [Decimal(gold) for gold in golds(path) if gold is not None] == [Decimal(text) for text in written]


def test_json_and_parquet_numbers_give_same_golds(tmp_path: Path) -> None:
    numbers = [0.1, 27.0, 3, 1e-9, 123456789012]
    rows = [{"question": f"What is number {n}?", "answer": number} for n, number in enumerate(numbers)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    in_table = as_parquet(table(pa.array([float(number) for number in numbers], pa.float64())), tmp_path)
    assert golds(str(tmp_path / "a.jsonl")) == golds(in_table) == ["0.1", "27", "3", "1e-09", "123456789012"]


def test_other_tasks_get_same_text_and_objects_keep_numbers(tmp_path: Path) -> None:
    assert golds(as_parquet(table(pa.array([0.1, 27.0], pa.float32())), tmp_path), gold=cell_as_is) == ["0.1", "27"]
    fields = pa.struct([("value", pa.float32()), ("abs", pa.decimal128(6, 3)), ("unit", pa.binary())])
    answers = pa.array([{"value": 0.1, "abs": Decimal("0.010"), "unit": b"m"}], fields)
    (gold,) = golds(as_parquet(table(answers), tmp_path), gold=cell_as_is)
    assert gold is not None and json.loads(gold) == {"value": 0.1, "abs": 0.01, "unit": "m"}


@pytest.mark.parametrize(
    ("written", "kind", "sentence"),
    [
        ([b"42", b"\xff\xfe"], pa.binary(), "row 2: 'answer' holds bytes that are not UTF-8 text"),
        ([b"42", b"*\x00\x00\x00"], pa.binary(), "row 2: 'answer' holds bytes that are not UTF-8 text"),
        ([1.0, 123456792.0], pa.float32(), "row 2: 'answer' cannot be read .*32-bit float does not hold every integer near 123456792"),
        ([timedelta(seconds=5)], pa.duration("s"), "row 1: 'answer' is no answer but timedelta; store it as text"),
        ([["1", "2"]], pa.list_(pa.string()), "row 1: 'answer' is not an answer but list"),
        ([{"x": 1}], pa.struct([("x", pa.int32())]), "row 1: 'answer' is not an answer but dict"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("write", [as_parquet, as_stream])
def test_non_answer_cell_is_refused_by_row(
    write: Write, written: list[Any], kind: pa.DataType, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        golds(write(table(pa.array(written, kind)), tmp_path))


def test_unreadable_cell_matters_only_if_needed(tmp_path: Path) -> None:
    made = table(pa.array(["1", "2"])).append_column("score", pa.array([123456792.0, 1.0], pa.float32()))
    path = as_parquet(made, tmp_path)
    assert golds(path) == ["1", "2"]
    with pytest.raises(UserError, match="row 1: 'score' cannot be read"):
        golds(path, answer="score")


def test_duplicate_columns_are_refused_if_used(tmp_path: Path) -> None:
    made = pa.Table.from_arrays([pa.array(["a?"]), pa.array(["1"]), pa.array(["2"])], ["question", "answer", "answer"])
    with pytest.raises(UserError, match="'answer' is the name of several columns; rename all but one"):
        golds(as_stream(made, tmp_path))


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet", "a.feather"])
def test_damaged_table_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"ARROW1 and nothing else")
    with pytest.raises(UserError, match=f"{name}: cannot be read as (Arrow|Parquet)") as refused:
        golds(str(tmp_path / name))
    assert "\n" not in str(refused.value)


def test_selected_rows_of_saved_folder_are_read(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset(table(pa.array([0.1, 0.2, 0.3, 0.4], pa.float32()))).select([2, 0])
    made.save_to_disk(str(tmp_path / "some"))
    assert golds(str(tmp_path / "some")) == ["0.3", "0.1"]


def test_saved_folder_format_and_json_columns_keep_golds(tmp_path: Path) -> None:
    import datasets

    plain = datasets.Dataset(table(pa.array([0.1, 3.0], pa.float32())))
    plain.with_format("numpy", columns=["answer"]).save_to_disk(str(tmp_path / "numpy"))
    assert golds(str(tmp_path / "numpy")) == ["0.1", "3"]
    features = datasets.Features(question=datasets.Value("string"), answer=datasets.Json())
    rows = [{"question": f"{n}?", "answer": answer} for n, answer in enumerate(["1/2", 27.0, ["8"], None])]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "json"))
    assert golds(str(tmp_path / "json")) == ["1/2", "27", "8", None]


# CSV ------------------------------------------------------------------------------------------------------------------


def csv_golds(
    tmp_path: Path, content: str | bytes, name: str = "a.csv", gold: Any = None
) -> list[tuple[str, str | None]]:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    loaded = load(Source(path=str(tmp_path / name)), "data.labeled", need_answers=False, gold=gold)
    return [(problem.text, loaded.gold.get(problem.id)) for problem in loaded.problems]


@pytest.mark.parametrize(
    ("content", "name", "rows"),
    [
        ("question,answer\n1+1?,2\n1+2?,3\n", "a.csv", [("1+1?", "2"), ("1+2?", "3")]),
        ("\ufeffquestion,answer\r\n1+1?,2\r\n", "a.csv", [("1+1?", "2")]),  # as Excel writes it
        ('question,answer\n"Add 1, 2\nand ""3"".","1,080"\n', "a.csv", [('Add 1, 2\nand "3".', "1,080")]),
        ("question;answer\nWas ist 7/2?;3,5\n", "a.csv", [("Was ist 7/2?", "3,5")]),
        ("question\tanswer\nA, B or C?\tB\n", "a.tsv", [("A, B or C?", "B")]),
        ('question, answer\nWhat?, "2"\n', "a.csv", [("What?", "2")]),
        (
            "answer,note,question\n007,,1+6?\n\n08,x,1+7?",
            "a.CSV",
            [("1+6?", "007"), ("1+7?", "08")],
        ),  # text, not numbers
        ("question,answer\n1+1?,\n", "a.csv", [("1+1?", None)]),
        ("question,answer\n1+1?,1e3\n", "a.csv", [("1+1?", "1e3")]),
    ],
)
def test_csv_golds_are_read_as_text(
    content: str, name: str, rows: list[tuple[str, str | None]], tmp_path: Path
) -> None:
    assert csv_golds(tmp_path, content, name) == rows


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("question,answer\n1+1?,2\nAdd 1, 2.,3\n", "row 3: has 3 cells, but the header names 2 columns; put cells that contain ','"),
        ('question,answer\n"a\nb?",1\nshort\n', "row 4: has 1 cells"),
        ('question,answer\na?,1\n"open,2\n', "row 3: cannot be read as CSV"),
        ('question,answer\n"a" b?,1\n', "row 2: cannot be read as CSV"),
        ("1+1?,2\n1+2?,3\n", "has no column problem|question|prompt.* its columns are 1\\+1\\?, 2"),
        ("question,answer,answer\na?,1,2\n", "row 1: several columns are named 'answer'"),
        ("", "is empty"),
        ("question,answer\n", "is empty"),
        (b"question,answer\na\xe9?,1\n", "row 2: is not UTF-8 text; data files are JSONL, JSON, CSV"),
    ],
)  # fmt: skip
def test_malformed_csv_is_refused_in_one_sentence(content: str | bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        csv_golds(tmp_path, content)
    assert "\n" not in str(refused.value)


def test_compressed_text_is_read_and_truncated_file_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = b"".join(json.dumps({"question": f"{n}?", "answer": str(n * n)}).encode() + b"\n" for n in range(500))
    packed = {
        ".gz": gzip.compress(plain),
        ".bz2": bz2.compress(plain),
        ".zst": pa.compress(plain, "zstd", asbytes=True),
    }
    for ending, data in packed.items():
        (tmp_path / f"a.jsonl{ending}").write_bytes(data)
        assert golds(str(tmp_path / f"a.jsonl{ending}")) == [str(n * n) for n in range(500)]
        (tmp_path / f"cut.jsonl{ending}").write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match=f"cut.jsonl{ending}: cannot be read"):
            golds(str(tmp_path / f"cut.jsonl{ending}"))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"question,answer\na?,1\n"))
    assert golds(str(tmp_path / "b.csv.gz")) == ["1"]
    with pytest.raises(UserError, match="is a compressed parquet file; decompress it"):
        golds(str(tmp_path / "a.parquet.gz"))
    monkeypatch.setattr("headwater.data.rows.MOST_BYTES", 5000)
    with pytest.raises(UserError, match="unpacks to more than 5,000 bytes"):
        golds(str(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize("name", ["gone.csv", "gone.tsv", "gone.arrow", "gone.jsonl.gz"])
def test_missing_file_of_each_format_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name}: no such file"):
        golds(str(tmp_path / name))


def test_duplicate_key_in_row_is_refused(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", '{"question": "a?", "answer": "1"}\n{"question": "b?", "answer": "1", "answer": "2"}\n'),
        ("a.json", '[{"question": "a?", "answer": "1", "answer": "2"}]'),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="is not JSON \\(the key 'answer' is given twice\\)"):
            golds(str(tmp_path / name))


def test_deeply_nested_cell_is_refused_in_one_sentence() -> None:
    cell: Any = "7"
    for _ in range(5000):
        cell = [cell]
    with pytest.raises(ValueError, match="nested too deeply"):
        plain_value(cell)
