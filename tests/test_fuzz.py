"""The first cases of `make fuzz`, in a process of their own with a bound on its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import headwater


def test_the_first_hundreds_of_fuzzed_cases_are_valid_or_one_sentence() -> None:
    script = Path(__file__).with_name("fuzz.py")
    path = os.pathsep.join([str(Path(headwater.__file__).parents[1]), str(script.parent)])
    said = subprocess.run(
        [sys.executable, str(script), "--count", "300"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert said.returncode == 0, said.stdout[-4000:] + said.stderr[-2000:]
    assert "300 cases from 0, 0 not as they must be" in said.stdout
    for reached in ("planned", "validated", "graded", "refused 2", "reported"):
        assert reached in said.stdout
