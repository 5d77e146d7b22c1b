"""The first line of a command appears before torch and transformers, which take seconds to import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

IMPORT_OF_TORCH_ENDS_PROGRAM = """
import os, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers"):
            os.write(2, b"IMPORT\\n")
            os._exit(7)
sys.meta_path.insert(0, Finder())
from headwater.__main__ import main
main()
"""

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


@pytest.mark.parametrize("command", COMMANDS)
def test_line_appears_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    program = [sys.executable, "-c", IMPORT_OF_TORCH_ENDS_PROGRAM, *command.split()]
    ended = subprocess.run(program, check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    lines = ended.stderr.splitlines()
    assert (ended.returncode, lines[-1]) == (7, "IMPORT")
    assert COMMANDS[command] in lines[-2]


def test_first_rank_of_torchrun_prints_first_line(tmp_path: Path) -> None:
    program = [sys.executable, "-c", IMPORT_OF_TORCH_ENDS_PROGRAM, "run", "pocket"]
    for rank, lines in (("0", 2), ("1", 1)):
        ranks = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        ended = subprocess.run(
            program, check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=os.environ | ranks
        )
        assert (ended.returncode, len(ended.stderr.splitlines())) == (7, lines)


def test_validate_names_its_file_before_it_reads_it(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "headwater", "validate", "missing.jsonl"]
    ended = subprocess.run(program, check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    first, error = ended.stderr.splitlines()
    assert "grading the labels of missing.jsonl" in first and error.startswith("headwater: ")
