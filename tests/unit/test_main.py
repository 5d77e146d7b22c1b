"""Entry point: signals before the command line is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

SIGNAL_DURING_IMPORT = """
import os, signal, sys, time
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "headwater.cli.main":
            os.kill(os.getpid(), signal.{name})
            time.sleep(20)
sys.meta_path.insert(0, Finder())
from headwater.__main__ import main
main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_during_imports_ends_program_with_130(name: str) -> None:
    program = SIGNAL_DURING_IMPORT.replace("{name}", name)
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, b"")
