"""Fuzzer of recipes, data files, model folders, adapters, tokenizers, templates and run directories; case N is deterministic.

    python tests/support/fuzz.py --count 5000 [--first 0] [--kind recipe] [--jobs 2]

Each case runs the program's own code in a folder of its own. It must give a valid result (the right one, where another way of
computing it is known) or a one-line UserError or RefusedError, within bounds of time and memory, and leave nothing elsewhere; any
other outcome is printed with its number, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
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
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # before the imports, which read it
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from fake_runs import ARMS as FAKE_ARMS
from fake_runs import fake_run
from fuzz_architectures import architecture
from fuzz_data import conversation, graded, jsonl
from fuzz_models import POCKET, adapter, adapter_folder, model_folder
from fuzz_prompts import template, tokenizer
from fuzz_recipes import override, recipe, recipe_text
from fuzz_sandbox import sandboxed
from fuzz_tables import parquet, separated, table
from fuzz_tokenizers import hostile_tokenizer
from headwater.errors import HeadwaterError, RecipeError, UserError, one_line
from headwater.report import build as report
from headwater.report.html import Page
from malformed_inputs import mutated, spoiled

SECONDS = 40  # for one case; a chat template that never ends takes 5 at each of several places
MEGABYTES = 6000  # of address space; torch alone maps several GB

Case = Callable[[random.Random, Path], str]
"""Draw a case, run it in an empty folder and return its description; raises what the program raised."""


class HangError(BaseException):
    """A case took too long."""


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
    "recipe": (24, recipe),
    "recipe_text": (6, recipe_text),
    "override": (5, override),
    "jsonl": (9, jsonl),
    "graded": (4, graded),
    "parquet": (3, parquet),
    "conversation": (8, conversation),
    "table": (8, table),
    "separated": (3, separated),
    "model_folder": (6, model_folder),
    "adapter": (5, adapter),
    "adapter_folder": (3, adapter_folder),
    "tokenizer": (5, tokenizer),
    "template": (4, template),
    "architecture": (4, architecture),
    "run_directory": (3, run_directory),
    "sandbox": (0, sandboxed),
    "hostile_tokenizer": (0, hostile_tokenizer),
}
"""Share of each kind in percent; `--kind` runs those of 0."""
NAMING = ("conversation", "table", "separated", "adapter", "tokenizer", "hostile_tokenizer", "template", "architecture")
"""Kinds whose refusals must name a field, a row or a path in the case's folder."""


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
    root = Path(tempfile.mkdtemp(prefix="headwater-fuzz-"))
    folder, here, temporary = (root / name for name in ("case", "here", "temporary"))
    for made in (folder, here, temporary):
        made.mkdir()
    shipped = state_of(Path(POCKET))
    try:
        with contextlib.chdir(here), mock.patch.object(tempfile, "tempdir", str(temporary)):
            outcome, message = outcome_of(KINDS[kind][1], draw, folder)
        left = [*here.iterdir(), *temporary.iterdir()]
        if not outcome.startswith("!") and (left or state_of(Path(POCKET)) != shipped):
            return kind, "!stray files", f"{left or POCKET} after {outcome} {message}"
        if kind in NAMING and outcome.startswith("refused") and not names_its_place(message, folder):
            return kind, "!names nothing", message
        return kind, outcome, message
    finally:
        shutil.rmtree(root, ignore_errors=True)


def outcome_of(case: Case, draw: random.Random, folder: Path) -> tuple[str, str]:
    """(outcome, sentence or traceback) of a case in its folder."""
    try:
        with in_time(SECONDS):
            return case(draw, folder), ""
    except HeadwaterError as error:
        message = str(error)
        lines = (
            message.split("\n") if isinstance(error, RecipeError) else [message]
        )  # a line for each fault of a recipe
        if isinstance(error, UserError) and any(
            not line.strip() or one_line(line.removeprefix("  ")) != line.removeprefix("  ") for line in lines
        ):
            return "!unprintable", repr(message)
        return f"refused {error.exit_code}" if error.exit_code in (2, 3) else f"!exit {error.exit_code}", message
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of native code is not even an Exception
        return f"!{type(error).__name__}", traceback.format_exc()


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


def names_its_place(message: str, folder: Path) -> bool:
    return any(place in message for place in (str(folder), "models.", "data.", "row ", "problem "))


def measured_case(number: int, only: str | None) -> tuple[tuple[str, str, str], float, int]:
    """(what `run_case` returns, seconds, peak memory of this process so far in KiB) of a case without its output."""
    began = time.monotonic()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            result = run_case(number, only)
    return result, time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS))
    parser.add_argument("--jobs", type=int, default=2, help="processes that run cases")
    parser.add_argument("--verbose", action="store_true", help="print every sentence")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, resource.getrlimit(resource.RLIMIT_AS)[1]))
    outcomes: Counter[tuple[str, str]] = Counter()
    spent: Counter[str] = Counter()
    failures, slowest, peak, began = 0, (0.0, -1), 0, time.monotonic()
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        cases: dict[int, Future[tuple[tuple[str, str, str], float, int]]] = {
            number: pool.submit(measured_case, number, args.kind)
            for number in range(args.first, args.first + args.count)
        }
        for number, case in cases.items():
            try:
                (kind, outcome, result), seconds, memory = case.result()
            except BrokenProcessPool:
                failures += 1
                print(f"a process died in case {number} or one of the next {args.jobs}", flush=True)
                break
            slowest, peak = max(slowest, (seconds, number)), max(peak, memory)
            outcomes[kind, outcome] += 1
            spent[kind] += seconds  # type: ignore[assignment]
            if outcome.startswith("!"):
                failures += 1
                print(f"case {number} ({kind}): {outcome}\n{result}", flush=True)
            elif args.verbose:
                print(f"case {number} ({kind}): {outcome} {result}", flush=True)
    for (kind, outcome), times in sorted(outcomes.items()):
        print(f"{kind:14} {outcome:20} {times:5}")
    for kind, seconds in sorted(spent.items()):
        number = sum(times for (name, _), times in outcomes.items() if name == kind)
        print(f"{kind:14} {1000 * seconds / number:6.0f} ms a case")
    print(
        f"{args.count} cases from {args.first}, {failures} not as they must be; {time.monotonic() - began:.0f} s, slowest "
        f"{slowest[0]:.1f} s (case {slowest[1]}), peak {peak / 1024:.0f} MiB"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
