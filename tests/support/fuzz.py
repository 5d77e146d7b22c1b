"""Fuzzer of recipes, data files, model folders and run directories; case N is deterministic.

    python tests/support/fuzz.py --count 5000 [--first 0] [--kind recipe]

Each case runs the program's own code. It must give a valid result or a one-line UserError or RefusedError, within bounds of time
and memory; any other outcome is printed with its number, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.report.html import Page
from headwater.runs.setup import prepared

if __name__ == "__main__":  # before the imports, which read it
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import yaml

from fake_runs import ARMS as FAKE_ARMS
from fake_runs import fake_run
from headwater.config.arms import ARMS
from headwater.config.builtin import builtin_text, find_recipe
from headwater.config.recipe import Columns, Models, Recipe, Source
from headwater.data.sources import load
from headwater.data.validate import grade_file, validate
from headwater.doctor.checks import diagnose, preflight
from headwater.errors import HeadwaterError, UserError, one_line
from headwater.models.prompts import Prompter
from headwater.report import build as report
from headwater.runs.estimate import estimates
from headwater.runs.inputs import device_of
from headwater.tasks.registry import TASKS
from malformed_inputs import BOMBS, CELLS, LINES, TEMPLATES, at, leaf, mutated, near, places, spoiled

SECONDS = 40  # for one case; a chat template that never ends takes 5 at each of several places
MEGABYTES = 6000  # of address space; torch alone maps several GB
POCKET = ModelFolder.open("pocket:qwen3-student", "models.student").path

Case = Callable[[random.Random, Path], str]
"""Draw a case, run it in an empty folder and return its description; raises what the program raised."""


class HangError(BaseException):
    """A case took too long."""


# Recipes --------------------------------------------------------------------------------------------------------------


def small(name: str) -> dict[str, Any]:
    """A built-in recipe with few problems, so that a case is fast."""
    raw: dict[str, Any] = yaml.safe_load(builtin_text(name))
    for source in (raw["data"]["labeled"], *raw["data"]["evals"].values()):
        if "generate" in source:
            source["generate"]["count"] = 40
    raw["labels"]["budget"] = 32
    for stage in ("teacher_rl", "student_rl"):
        raw["stages"][stage] |= {"batch_size": 16, "group_size": 4, "steps": 2}
    raw["stages"]["opd"]["batch_size"] = 8
    raw["compute"] = {"threads": 1, "workers": 1, "device": "cpu", "grader_workers": 1}
    raw["guards"] = {"no_signal": "stop", "patience": 3, "truncation": "stop", "kl_explosion": {"bound": 2.0}}
    return raw


def with_files(draw: random.Random, folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The same recipe on files and another task."""
    rows = [{"problem": f"{n:02d}+07+11+90", "answer": f"{(n + 8) % 100:02d}"} for n in range(40)]
    for name, part in (("labeled.jsonl", rows[:30]), ("held.jsonl", rows[30:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    raw["data"] = {"labeled": str(folder / "labeled.jsonl"), "evals": {"held": {"path": str(folder / "held.jsonl")}}}
    raw["labels"]["budget"] = 20
    raw["task"] = draw.choice(["exact", "numeric", "sums", "choice"])
    return raw


def prepare(recipe: Recipe, arm: str, folder: Path, thorough: bool) -> str:
    """Run what `--dry-run` runs and, if `thorough`, the doctor."""
    with prepared(recipe, [arm], [recipe.seed]) as (plan, inputs):
        preflight(plan, inputs)
        json.dumps([row.row() for row in estimates(plan, inputs)])
    if thorough:
        found = diagnose(recipe, [arm], [recipe.seed], folder / "out")
        found.text()
        return "examined"
    return "planned"


def recipe(draw: random.Random, folder: Path) -> str:
    raw = small(draw.choice(["pocket", "pocket", "pocket-countdown"]))
    if draw.random() < 0.3:
        raw = with_files(draw, folder, raw)
    raw = mutated(draw, raw)
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    read = find_recipe(str(path), [])
    return prepare(read, draw.choice(sorted(ARMS)), folder, draw.random() < 0.1)


def recipe_text(draw: random.Random, folder: Path) -> str:
    path = folder / "r.yaml"
    text = yaml.safe_dump(small("pocket")).encode()
    extra = draw.choice(BOMBS)
    path.write_bytes(spoiled(draw, text + extra) if draw.random() < 0.8 else text + extra)
    return prepare(find_recipe(str(path), []), "direct_grpo", folder, False)


def override(draw: random.Random, folder: Path) -> str:
    ways = [path for path in places(small("pocket")) if all(isinstance(key, str) for key in path)]
    changes = []
    for _ in range(draw.randint(1, 3)):
        if draw.random() < 0.6:
            path = draw.choice(ways)
            changes.append(f"{'.'.join(path)}={json.dumps(near(draw, at(small('pocket'), path)))}")
            continue
        value = leaf(draw)
        text = value if isinstance(value, str) else json.dumps(value)
        changes.append(
            draw.choice([f"{'.'.join(draw.choice(ways))}={text}", f"{'.'.join(draw.choice(ways))}.x={text}", text])
        )
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(small("pocket")), encoding="utf-8")
    return prepare(find_recipe(str(path), changes), "direct_grpo", folder, False)


# Data files -----------------------------------------------------------------------------------------------------------


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


def typed_cells(draw: random.Random) -> Any:
    """An Arrow array of a random type with random bytes as its values."""
    import pyarrow as pa

    kinds = [
        pa.float16(),
        pa.float32(),
        pa.float64(),
        pa.int8(),
        pa.uint64(),
        pa.decimal128(9, 3),
        pa.binary(),
        pa.date32(),
    ]
    kinds += [pa.timestamp("ns"), pa.duration("s"), pa.time32("s"), pa.bool_(), pa.dictionary(pa.int8(), pa.binary())]
    kind, count = draw.choice(kinds), draw.randint(1, 5)
    if pa.types.is_dictionary(kind):
        cells = pa.array([draw.randbytes(3) for _ in range(count)], pa.binary()).dictionary_encode()
    elif pa.types.is_binary(kind):
        cells = pa.array([draw.randbytes(draw.randint(0, 4)) for _ in range(count)], kind)
    else:
        width = max(1, kind.bit_width * count // 8 + 1)
        cells = pa.Array.from_buffers(kind, count, [None, pa.py_buffer(draw.randbytes(width))])
    if draw.random() < 0.3:
        cells = pa.ListArray.from_arrays(pa.array(range(count + 1), pa.int32()), cells)
    return cells


def parquet(draw: random.Random, folder: Path) -> str:
    import pyarrow
    import pyarrow.parquet

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


# Model folders --------------------------------------------------------------------------------------------------------


PARTS = ["config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
PARTS += ["chat_template.jinja", "model.safetensors", "extra"]
EXTRAS = ["pytorch_model.bin", "x.pt", "adapter_config.json", "model.safetensors.index.json", "code.py"]
EXTRAS += ["special_tokens_map.json", "added_tokens.json", "vocab.json"]


def model_folder(draw: random.Random, folder: Path) -> str:
    target = folder / "m"
    shutil.copytree(POCKET, target)
    for _ in range(draw.randint(1, 2)):
        name = draw.choice(PARTS)
        path = target / name
        if name == "extra":
            extra = draw.choice(EXTRAS)
            (target / extra).write_text(
                json.dumps(mutated(draw, {"weight_map": {"a": "../../x"}, "auto_map": "a.b"})), encoding="utf-8"
            )
        elif not path.is_file():
            continue
        elif draw.random() < 0.1:
            path.unlink()
        elif name == "chat_template.jinja":
            path.write_text(draw.choice(TEMPLATES), encoding="utf-8")
        elif name.endswith(".json") and draw.random() < 0.75:
            with contextlib.suppress(ValueError, RecursionError):
                path.write_text(json.dumps(mutated(draw, json.loads(path.read_bytes()))), encoding="utf-8")
        else:
            path.write_bytes(spoiled(draw, path.read_bytes()))
    raw = small("pocket")
    raw["models"]["student"] = str(target)
    if draw.random() < 0.3:
        raw["models"]["teacher"] = str(target)
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    read = find_recipe(str(path), [])
    prepare(read, "direct_grpo", folder, draw.random() < 0.2)
    models = Models(student=str(target), teacher=str(target))
    policy = load_policy(
        ModelFolder.open(str(target), "models.student"), LoadOptions(models, device_of("cpu"), frozen=True)
    )
    from headwater.types import Problem

    Prompter(policy.tokenizer, read.prompt).ids(Problem.of("17+45", "fuzz"))
    return "loaded"


ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"],
    "bias": "none", "use_rslora": False, "use_dora": False, "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "layers_to_transform": None, "target_parameters": None, "trainable_token_indices": None,
    "lora_bias": False, "fan_in_fan_out": False, "layer_replication": None, "revision": None, "base_model_name_or_path": POCKET,
}  # fmt: skip
"""What peft writes of an adapter, as far as it matters for merging."""


def adapter_values(draw: random.Random) -> Any:
    """Values of an adapter's config that are likely, possible or hostile."""
    likely: list[Any] = ["pissa", "olora", "eva", "gaussian", "all", "lora_only", ["lm_head"], ["norm"], {"q_proj": 2}]
    return (
        draw.choice([*likely, {"(a+)+$": 3}, [1, 2], True, 2, 1e30, "SEQ_CLS", "IA3"])
        if draw.random() < 0.6
        else leaf(draw)
    )


def adapter(draw: random.Random, folder: Path) -> str:
    """An adapter of the pocket student, its config and its tensors changed, merged as every command merges it."""
    import torch
    from safetensors.torch import save_file

    target = folder / "a"
    model = json.loads(Path(POCKET, "config.json").read_bytes())
    hidden = model["hidden_size"]
    sizes = {
        "self_attn.q_proj": (hidden, model["num_attention_heads"] * model["head_dim"]),
        "mlp.down_proj": (model["intermediate_size"], hidden),
    }
    tensors = {}
    for layer in range(model["num_hidden_layers"]):
        for name, (inputs, outputs) in sizes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.ones(2, inputs)
            tensors[f"{path}.lora_B.weight"] = torch.ones(outputs, 2)
    for _ in range(draw.choice([0, 0, 1, 2])):
        name = draw.choice(list(tensors))
        tensor = tensors.pop(name)
        tensor = draw.choice(
            [tensor, tensor[:1], tensor.reshape(-1), tensor.to(torch.int8), tensor.bfloat16(), tensor[None]]
        )
        new = draw.choice(["lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "bias", "base_layer", "x"])
        name = draw.choice(
            [name, name.replace("lora_A", new), f"module.{name}", name.removeprefix("base_model.model.")]
        )
        tensors[name] = tensor.contiguous()
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    config = mutated(draw, ADAPTER, 3, adapter_values)
    config["base_model_name_or_path"] = POCKET if draw.random() < 0.9 else config.get("base_model_name_or_path")
    (target / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    if draw.random() < 0.1:
        path = target / draw.choice(["adapter_config.json", "adapter_model.safetensors"])
        path.write_bytes(spoiled(draw, path.read_bytes()))
    models = Models(student=str(target), teacher=str(target))
    load_policy(ModelFolder.open(str(target), "models.student"), LoadOptions(models, device_of("cpu"), frozen=True))
    return "merged"


# Run directories ------------------------------------------------------------------------------------------------------


def run_directory(draw: random.Random, folder: Path) -> str:
    out = fake_run(
        folder / "run",
        seeds=(0,),
        arms={"base_student": FAKE_ARMS["base_student"], "bridge": FAKE_ARMS["bridge"]},
        problems=6,
        steps=3,
    )
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    for _ in range(draw.randint(1, 2)):
        path = draw.choice(files)
        roll = draw.random()
        if roll < 0.15:
            path.write_bytes(spoiled(draw, path.read_bytes()))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            path.write_text("".join(json.dumps(row) + "\n" for row in mutated(draw, rows)), encoding="utf-8")
        else:
            with contextlib.suppress(ValueError, RecursionError):
                path.write_text(json.dumps(mutated(draw, json.loads(path.read_bytes()))), encoding="utf-8")
        if roll > 0.9:
            with contextlib.suppress(FileExistsError):
                (out / draw.choice(["x", "nodes/x", ".lock", "nodes/.x"])).symlink_to("/etc/passwd")
    with (
        mock.patch("headwater.report.html.page", return_value=Page(""))
        if draw.random() < 0.8
        else contextlib.nullcontext()
    ):
        report.write(out)
    return "reported"


KINDS: dict[str, tuple[int, Case]] = {
    "recipe": (41, recipe),
    "recipe_text": (10, recipe_text),
    "override": (8, override),
    "jsonl": (13, jsonl),
    "graded": (7, graded),
    "parquet": (4, parquet),
    "model_folder": (9, model_folder),
    "run_directory": (4, run_directory),
    "adapter": (4, adapter),
}
"""Share of each kind in percent."""


@contextlib.contextmanager
def in_time(seconds: int) -> Iterator[None]:
    def over(number: int, frame: object) -> None:
        raise HangError

    previous = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run_case(number: int, only: str | None = None) -> tuple[str, str, str]:
    """(kind, outcome, sentence or traceback) of a case; an outcome that violates the contract begins with "!"."""
    draw = random.Random(f"headwater:{number}")
    kind = only or draw.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]
    folder = Path(tempfile.mkdtemp(prefix="headwater-fuzz-"))
    try:
        with in_time(SECONDS):
            return kind, KINDS[kind][1](draw, folder), ""
    except HeadwaterError as error:
        message = str(error)
        if isinstance(error, UserError) and (not message.strip() or one_line(message) != message):
            return kind, "!unprintable", repr(message)
        return kind, f"refused {error.exit_code}" if error.exit_code in (2, 3) else f"!exit {error.exit_code}", message
    except (HangError, KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return kind, f"!{type(error).__name__}", traceback.format_exc()
    except BaseException as error:  # a panic of native code
        return kind, f"!{type(error).__name__}", traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS))
    parser.add_argument("--verbose", action="store_true", help="print every sentence")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, resource.getrlimit(resource.RLIMIT_AS)[1]))
    outcomes: Counter[tuple[str, str]] = Counter()
    failures, slowest, began = 0, (0.0, -1), time.monotonic()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for number in range(args.first, args.first + args.count):
            started = time.monotonic()
            with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
                kind, outcome, result = run_case(number, args.kind)
            slowest = max(slowest, (time.monotonic() - started, number))
            outcomes[kind, outcome] += 1
            if (number + 1 - args.first) % 500 == 0:  # native code may crash the process; this shows about where
                print(f"… {number + 1} after {time.monotonic() - began:.0f} s", flush=True)
            if outcome.startswith("!"):
                failures += 1
                print(f"case {number} ({kind}): {outcome}\n{result}", flush=True)
            elif args.verbose:
                print(f"case {number} ({kind}): {outcome} {result}", flush=True)
    for (kind, outcome), times in sorted(outcomes.items()):
        print(f"{kind:14} {outcome:12} {times:5}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{args.count} cases from {args.first}, {failures} not as they must be; {time.monotonic() - began:.0f} s, slowest "
        f"{slowest[0]:.1f} s (case {slowest[1]}), peak {peak:.0f} MiB"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
