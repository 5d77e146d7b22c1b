"""Run every measurement in a process of its own, the peers in turn, and gather what they wrote. No torch here.

This process stays small: a child's ru_maxrss begins at what its parent had in memory.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.summary import over_runs

PACKAGES = {"trl": "trl", "vllm": "vllm", "liger": "liger_kernel"}
"""What a peer needs beside Headwater's own dependencies."""
LONGEST = 1800.0
"""Seconds after which a measurement is given up."""

Say = Callable[[str], None]
Run = Callable[[str, dict[str, Any]], dict[str, Any]]


def missing(peers: Sequence[str]) -> dict[str, str]:
    """The peers that cannot be measured here, and why."""
    absent = {peer: PACKAGES[peer] for peer in peers if peer in PACKAGES}
    return {
        peer: f"{package} is not installed"
        for peer, package in absent.items()
        if importlib.util.find_spec(package) is None
    }


def in_a_process(peer: str, told: dict[str, Any]) -> dict[str, Any]:
    """What a child process measured; {"failed": reason} if it did not get to its end."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as held:
        asked, out = Path(held) / "asked.json", Path(held) / "out.json"
        asked.write_text(json.dumps(told), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.child", peer, str(asked), str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {LONGEST:.0f} s"}
        if done.returncode or not out.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return {"failed": lines[-1][:300] if lines else f"exit {done.returncode}"}
        return dict(json.loads(out.read_text(encoding="utf-8")))


def measure(
    case: Case, peers: Sequence[str], runs: int, root: Path, say: Say, run: Run = in_a_process
) -> dict[str, Any]:
    """A case on each of its peers in turn, `runs` times over: peer -> medians, or why there are none."""
    wanted = [peer for peer in case.peers if peer in peers]
    found: dict[str, Any] = {peer: {"skipped": why} for peer, why in missing(wanted).items()}
    rows: dict[str, list[dict[str, float]]] = {}
    for number in range(runs):
        for peer in wanted:
            if peer in found:
                continue
            row = run(peer, {"case": asdict(case), "root": str(root)})
            if "seconds" not in row:
                found[peer] = row
                say(f"{case.name} {peer}: {row}")
                continue
            rows.setdefault(peer, []).append(row)
            say(f"{case.name} {peer} {number + 1}/{runs}: {row['seconds']:.3f} s, {row['peak_bytes'] / 2**20:.0f} MiB")
    measured = {peer: over_runs(each) for peer, each in rows.items() if peer not in found}
    return {peer: (measured | found)[peer] for peer in wanted}
