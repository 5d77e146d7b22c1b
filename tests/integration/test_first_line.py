"""The first line of a command appears before torch and transformers, which take seconds to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

IMPORT_OF_TORCH_ENDS_PROGRAM = """
import json, os, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers"):
            os.write(2, b"IMPORT\\n")
            os._exit(7)
sys.meta_path.insert(0, Finder())
import headwater.cli.main
from headwater.__main__ import main
codes = []
for number, command in enumerate(json.loads(sys.argv[1])):
    process = os.fork()
    if process == 0:
        os.dup2(os.open(f"{number}.err", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv = ["headwater", *command.split()]
        main()
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
print(json.dumps(codes))
"""
"""Runs each command in a fork of one process, which has imported all that they import before torch."""

COMMANDS = {
    "run pocket": "checking recipe pocket: loading torch and transformers …",
    "run pocket --dry-run": "checking recipe pocket: loading torch and transformers …",
    "study pocket": "checking recipe pocket: loading torch and transformers …",
    "demo": "checking recipe pocket: loading torch and transformers …",
    "doctor pocket": "checking pocket: loading torch and transformers …",
    "probe pocket": "probing the models of pocket: loading torch and transformers …",
    "sweep pocket --vary labels": "laying out a sweep of pocket by labels: loading torch and transformers …",
    "distill S T --prompts p.jsonl": "checking recipe distill-S: loading torch and transformers …",
    "grpo S --data d.jsonl": "checking recipe grpo-S: loading torch and transformers …",
    "eval S --data d.jsonl": "evaluating S: loading torch and transformers …",
    "init mine --student S --teacher T --data d.jsonl": "fitting a recipe: loading torch and transformers …",
}


def ended_before_torch(folder: Path, commands: list[str], **variables: str) -> list[tuple[int, list[str]]]:
    """(exit code, lines on standard error) of each command."""
    program = [sys.executable, "-c", IMPORT_OF_TORCH_ENDS_PROGRAM, json.dumps(commands)]
    done = subprocess.run(
        program, check=True, capture_output=True, timeout=60 * len(commands), cwd=folder, env=os.environ | variables
    )
    errors = [(folder / f"{number}.err").read_text(encoding="utf-8") for number in range(len(commands))]
    return list(zip(json.loads(done.stdout), map(str.splitlines, errors), strict=True))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    return dict(zip(COMMANDS, ended_before_torch(tmp_path_factory.mktemp("commands"), list(COMMANDS)), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_line_appears_before_torch_is_imported(command: str, outcomes: dict[str, tuple[int, list[str]]]) -> None:
    code, lines = outcomes[command]
    assert (code, lines[-1]) == (7, "IMPORT")
    assert COMMANDS[command] in lines[-2]


@pytest.mark.parametrize(("rank", "count"), [("0", 2), ("1", 1)])
def test_first_rank_of_torchrun_prints_first_line(rank: str, count: int, tmp_path: Path) -> None:
    ranks = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ((code, lines),) = ended_before_torch(tmp_path, ["run pocket"], **ranks)
    assert (code, len(lines)) == (7, count)


def test_validate_names_its_file_before_it_reads_it(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "headwater", "validate", "missing.jsonl"]
    ended = subprocess.run(program, check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    first, error = ended.stderr.splitlines()
    assert "grading the labels of missing.jsonl" in first and error.startswith("headwater: ")
