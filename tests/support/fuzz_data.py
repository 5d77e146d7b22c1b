"""Fuzz cases of data files: damaged ones, conversations of every usual shape, and tables of every type of column."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fuzz_recipes import WrongError
from headwater.config.recipe import Columns, Source
from headwater.data.sources import LoadedProblems, load
from headwater.data.validate import grade_file, validate
from headwater.errors import UserError
from headwater.tasks.registry import TASKS
from malformed_inputs import CELLS, LINES, leaf, mutated, spoiled


def cell(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(CELLS)) if draw.random() < 0.8 else leaf(draw)


def some_rows(draw: random.Random, names: list[str]) -> list[Any]:
    rows, share = [], draw.choice([0.0, 0.0, 0.1, 0.5])
    for number in range(draw.choice([0, 1, 3, 12, 12])):
        good: Any = {names[0]: f"{number:02d}+11", names[1]: f"{number + 11}"}
        if draw.random() < 0.2:
            good[names[1]] = cell(draw)
        rows.append(mutated(draw, good, 2, cell) if draw.random() < share else good)
    return rows


def as_bytes(draw: random.Random, rows: list[Any]) -> bytes:
    end = draw.choice(["\n", "\n", "\n", "\r\n", "\r", "\n\n"])
    data = "".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) + end for row in rows).encode(
        "utf-8", "surrogatepass"
    )
    if draw.random() < 0.25:
        data = draw.choice([data + draw.choice(LINES), draw.choice(LINES) + data])
    return spoiled(draw, data) if draw.random() < 0.15 else data


QUICK = ["numeric", "exact", "choice", "sums", "countdown", "words"]


def jsonl(draw: random.Random, folder: Path) -> str:
    path = folder / draw.choice(["d.jsonl", "d.jsonl", "d.json", "d.txt"])
    rows = some_rows(draw, [draw.choice(["problem", "question", "prompt"]), draw.choice(["answer", "solution"])])
    path.write_bytes(json.dumps(rows).encode() if draw.random() < 0.1 else as_bytes(draw, rows))
    columns = Columns(
        problem=draw.choice([None, None, None, "problem", "", "a\nb"]), answer=draw.choice([None, None, "answer"])
    )
    source = Source(path=str(path), columns=columns)
    found = load(source, "data.labeled", need_answers=draw.random() < 0.5, gold=TASKS[draw.choice(sorted(TASKS))].gold)
    json.dumps([problem.text for problem in found.problems], ensure_ascii=False).encode()
    task = draw.choice(QUICK) if draw.random() < 0.85 else draw.choice(["regex", "json", "python", "maths"])
    validate(source, task, seconds=2.0, workers=1)
    return "validated"


def graded(draw: random.Random, folder: Path) -> str:
    path = folder / "g.jsonl"
    rows = [
        {"id": cell(draw), **row} if isinstance(row, dict) else row for row in some_rows(draw, ["completion", "gold"])
    ]
    path.write_bytes(as_bytes(draw, rows).replace(b'"problem"', b'"completion"').replace(b'"answer"', b'"gold"'))
    task = draw.choice(QUICK) if draw.random() < 0.85 else draw.choice(["regex", "json", "python", "maths"])
    for row in grade_file(path, task=task, seconds=2.0, workers=1):
        json.dumps(row, ensure_ascii=False)
    return "graded"


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
    if draw.random() < 0.2:
        table = pyarrow.table({"problem": [[1], None], "answer": [{"a": 1}, {"a": 2}]})
    pyarrow.parquet.write_table(table, path)
    if draw.random() < 0.8:
        path.write_bytes(spoiled(draw, path.read_bytes()))
    validate(Source(path=str(path)), draw.choice(QUICK), workers=1)
    return "validated"


# Conversations --------------------------------------------------------------------------------------------------------

Turns = tuple[tuple[str, str], ...]
SAID = [
    "What is 2+2?", "Find $x$ with $\\frac12 x = 3$.", "Ja.", "三加四等于几？", "<think>hm</think> 7",
    "<|im_end|> is a token", " padded ",
    "line\nline", "\\boxed{3}", "#### 4", "[INST] no [/INST]", "[1, 2]", '{"role": "user"}', "🙂", "{{ 7 * 7 }}", "%s {problem}", "9",
]  # fmt: skip
SPELLINGS = {
    "system": ["system", "developer", "System"],
    "user": ["user", "human", "User"],
    "assistant": ["assistant", "gpt", "model", "bot"],
}


def some_turns(draw: random.Random, number: int) -> Turns:
    """A conversation that no other number has, and that ends with the user's turn."""
    turns = [("system", draw.choice(SAID))] if draw.random() < 0.4 else []
    for _ in range(draw.choice([0, 0, 1, 2])):
        turns += [("user", draw.choice(SAID)), ("assistant", draw.choice([*SAID, "", " "]))]
    return (*turns, ("user", f"{draw.choice(SAID)} ({number})"))


def spelt(turns: Turns, style: str, names: dict[str, str]) -> Any:
    """Turns in one of the ways that files hold them."""
    keys = ("from", "value") if style == "sharegpt" else ("role", "content")
    messages: list[dict[str, Any]] = [dict(zip(keys, (names[role], said), strict=True)) for role, said in turns]
    if style == "parts":
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    if style == "padded":
        return [{**turn, "name": None, "tool_calls": None, "weight": 1.0} for turn in messages]
    if style == "text":
        return json.dumps(messages)
    return {key: [turn[key] for turn in messages] for key in keys} if style == "columns" else messages


def not_a_prompt(draw: random.Random, row: dict[str, Any], column: str) -> None:
    """Make a row of messages one that no text prompt can hold."""
    turns = row[column]
    place = draw.randrange(len(turns))
    kind = draw.choice(
        ["tool", "calls", "picture", "blank", "column", "no content", "number", "order", "lone surrogate"]
    )
    if kind == "tool":
        turns[place]["role"] = draw.choice(["tool", "function", "ipython", "", "narrator"])
    elif kind == "calls":
        turns[place] |= {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    elif kind == "picture":
        turns[place]["content"] = [
            {"type": "text", "text": "See"},
            {"type": "image_url", "image_url": {"url": "x.png"}},
        ]
    elif kind == "blank":
        turns[-1]["content"] = draw.choice(["", " \n", [{"type": "text", "text": ""}]])
    elif kind == "column":
        row[draw.choice(["images", "tools", "videos"])] = draw.choice([["a.png"], [{"name": "f"}]])
    elif kind == "no content":
        turns[place]["content"] = draw.choice([None, [], {}])
    elif kind == "number":
        turns[place]["content"] = draw.choice([7, 1.5, True, [3]])
    elif kind == "lone surrogate":
        turns[place]["content"] = "\ud800"
    else:
        turns.append({"role": draw.choice(["system", "developer"]), "content": "Now answer."})


def conversation(draw: random.Random, folder: Path) -> str:
    """Rows of one shape. Whole ones are read as they are; a row that is none is refused by its number."""
    style = draw.choice(["messages", "sharegpt", "parts", "padded", "text", "columns"])
    column = draw.choice(["prompt", "messages", "conversations", "conversation", "Prompt", "query"])
    names = {role: draw.choice(spellings) for role, spellings in SPELLINGS.items()}
    said_answer = column in ("messages", "conversations", "conversation") and draw.random() < 0.4
    aside = draw.choice(["answer", "solution", "ground_truth", "reward_model", "extra_info"])
    wanted: list[tuple[Turns, str]] = []
    rows: list[Any] = []
    for number in range(1, draw.choice([1, 2, 6]) + 1):
        turns, gold = some_turns(draw, number), str(draw.randint(-99, 999))
        whole: Turns = (*turns, ("assistant", f"So it is \\boxed{{{gold}}}.")) if said_answer else turns
        row: dict[str, Any] = {column: spelt(whole, style, names)}
        if not said_answer:
            nested = {"reward_model": {"style": "rule", "ground_truth": gold}, "extra_info": {"answer": gold}}
            row[aside] = nested.get(aside, gold)
        rows.append(row)
        wanted.append((turns, gold))
    fate = draw.choice(["whole", "whole", "whole", "refused", "mutated"])
    bad = draw.randrange(len(rows))
    if fate == "refused":
        rows[bad][column] = spelt(wanted[bad][0], "messages", {name: name for name in SPELLINGS})
        not_a_prompt(draw, rows[bad], column)
    elif fate == "mutated":
        rows[bad] = mutated(draw, rows[bad], 3)
    form = draw.choice(["jsonl", "json", "parquet", "arrow"]) if fate == "whole" else draw.choice(["jsonl", "json"])
    path = written(rows, form, folder)
    try:
        found = load(Source(path=str(path)), "data.labeled", need_answers=draw.random() < 0.5)
    except UserError as error:
        if fate == "whole" or (fate == "refused" and f"row {bad + 1}:" not in str(error)):
            raise WrongError(f"{fate} {json.dumps(rows[bad])}: {error}") from None
        raise
    if fate == "refused":
        raise WrongError(f"accepted {json.dumps(rows[bad])}")
    if fate == "whole":
        compare_conversations(found, wanted)
    return f"read {fate}"


def compare_conversations(found: LoadedProblems, wanted: Sequence[tuple[Turns, str]]) -> None:
    read = [(problem.turns or (("user", problem.text),), found.gold.get(problem.id)) for problem in found.problems]
    if read != list(wanted):
        raise WrongError(f"read {read} for {wanted}")


def written(rows: list[Any], form: str, folder: Path) -> Path:
    path = folder / f"d.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif form == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        as_file(pyarrow.Table.from_pylist(rows), path)
    return path


def as_file(table: pyarrow.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


# Tables ---------------------------------------------------------------------------------------------------------------

REFUSED = object()
"""A cell that is no answer."""


def column_cells(draw: random.Random, count: int) -> tuple[pyarrow.Array, list[Any]]:
    """A column of a drawn type, and of each cell the gold that a person would write (None: no answer), or REFUSED."""
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
    """Floats that are written with few digits; with as many as their width tells apart, the digits come back."""

    def cell(draw: random.Random) -> tuple[float, str]:
        whole = draw.randint(-(10**digits) + 1, 10**digits - 1)
        text = str(Decimal(whole).scaleb(-draw.randint(0, digits)))
        value = float(text)
        return value, str(int(value)) if value.is_integer() else repr(value)

    return cell


def half_float(draw: random.Random) -> Any:
    import numpy

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
        found = load(source, "data.labeled", need_answers=False)
    except UserError as error:
        if refused is None or f"row {refused}:" not in str(error):
            raise WrongError(f"{kind} {answers.to_pylist()}: {error}") from None
        raise
    read = [found.gold.get(problem.id) for problem in found.problems]
    if read != golds:
        raise WrongError(f"{kind} {answers.to_pylist()}: read {read}, not {golds}")
    return "read"


def separated(draw: random.Random, folder: Path) -> str:
    """A CSV or TSV file: every cell is text."""
    import csv

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
    found = load(Source(path=str(path)), "data.labeled", need_answers=True, gold=TASKS["exact"].gold)
    read = [(problem.text, found.gold[problem.id]) for problem in found.problems]
    if read != rows:
        raise WrongError(f"{path.read_text(encoding='utf-8')!r}: read {read}")
    return "read"
