"""Fuzz cases of data files: damaged ones, and conversations of every usual shape."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
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
    loaded = load(source, "data.labeled", need_answers=draw.random() < 0.5, gold=TASKS[draw.choice(sorted(TASKS))].gold)
    json.dumps([problem.text for problem in loaded.problems], ensure_ascii=False).encode()
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


def random_turns(draw: random.Random, number: int) -> Turns:
    """A conversation that is distinct for each number and ends with a user turn."""
    turns = [("system", draw.choice(SAID))] if draw.random() < 0.4 else []
    for _ in range(draw.choice([0, 0, 1, 2])):
        turns += [("user", draw.choice(SAID)), ("assistant", draw.choice([*SAID, "", " "]))]
    return (*turns, ("user", f"{draw.choice(SAID)} ({number})"))


def in_format(turns: Turns, style: str, names: dict[str, str]) -> Any:
    """Turns in a drawn file format."""
    keys = ("from", "value") if style == "sharegpt" else ("role", "content")
    messages: list[dict[str, Any]] = [dict(zip(keys, (names[role], text), strict=True)) for role, text in turns]
    if style == "parts":
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    if style == "padded":
        return [{**turn, "name": None, "tool_calls": None, "weight": 1.0} for turn in messages]
    if style == "text":
        return json.dumps(messages)
    return {key: [turn[key] for turn in messages] for key in keys} if style == "columns" else messages


def spoil_prompt(draw: random.Random, row: dict[str, Any], column: str) -> None:
    """Change a row of messages so that no text prompt can hold it."""
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
        turns, gold = random_turns(draw, number), str(draw.randint(-99, 999))
        whole: Turns = (*turns, ("assistant", f"So it is \\boxed{{{gold}}}.")) if said_answer else turns
        row: dict[str, Any] = {column: in_format(whole, style, names)}
        if not said_answer:
            nested = {"reward_model": {"style": "rule", "ground_truth": gold}, "extra_info": {"answer": gold}}
            row[aside] = nested.get(aside, gold)
        rows.append(row)
        wanted.append((turns, gold))
    fate = draw.choice(["whole", "whole", "whole", "refused", "mutated"])
    bad = draw.randrange(len(rows))
    if fate == "refused":
        rows[bad][column] = in_format(wanted[bad][0], "messages", {name: name for name in SPELLINGS})
        spoil_prompt(draw, rows[bad], column)
    elif fate == "mutated":
        rows[bad] = mutated(draw, rows[bad], 3)
    form = draw.choice(["jsonl", "json", "parquet", "arrow"]) if fate == "whole" else draw.choice(["jsonl", "json"])
    path = written(rows, form, folder)
    try:
        loaded = load(Source(path=str(path)), "data.labeled", need_answers=draw.random() < 0.5)
    except UserError as error:
        if fate == "whole" or (fate == "refused" and f"row {bad + 1}:" not in str(error)):
            raise WrongError(f"{fate} {json.dumps(rows[bad])}: {error}") from None
        raise
    if fate == "refused":
        raise WrongError(f"accepted {json.dumps(rows[bad])}")
    if fate == "whole":
        compare_conversations(loaded, wanted)
    return f"read {fate}"


def compare_conversations(loaded: LoadedProblems, wanted: Sequence[tuple[Turns, str]]) -> None:
    read = [(problem.turns or (("user", problem.text),), loaded.gold.get(problem.id)) for problem in loaded.problems]
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
