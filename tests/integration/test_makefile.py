"""The Makefile's programs in tests/support start with the paths that it gives them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = [
    line.strip()
    for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    if "$(PY) tests/support/" in line
]


@pytest.mark.parametrize("line", LINES)
def test_makefile_program_starts(line: str) -> None:
    match = re.fullmatch(r"PYTHONPATH=(\S+) \$\(PY\) (tests/support/\w+\.py)( .*)?", line)
    assert match is not None, line
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, match[2], "--help"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": match[1]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for option in re.findall(r"--\w+", match[3] or ""):
        assert option in done.stdout


def test_makefile_runs_fuzz_chaos_and_endurance() -> None:
    programs = [re.findall(r"tests/support/(\w+)\.py", line)[0] for line in LINES]
    assert programs == ["fuzz", "fuzz", "fuzz", "chaos", "endurance"]
    assert [re.findall(r"--kind (\w+)", line) for line in LINES[:3]] == [[], ["hostile_tokenizer"], ["sandbox"]]
