"""Run every measurement in its own process, alternating between peers, and collect the results.

Does not import torch, to keep this process small: a child's ru_maxrss starts at its parent's resident memory.
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
"""Packages that peers need in addition to Headwater's dependencies."""
TIMEOUT_SECONDS = 1800.0
"""Time limit of a measurement."""


def missing(peers: Sequence[str]) -> dict[str, str]:
    """The peers that are not installed, with the reason."""
    absent = {peer: PACKAGES[peer] for peer in peers if peer in PACKAGES}
    return {
        peer: f"{package} is not installed"
        for peer, package in absent.items()
        if importlib.util.find_spec(package) is None
    }


def run_in_process(peer: str, request: dict[str, Any]) -> dict[str, Any]:
    """Measure in a child process; {"failed": reason} if it does not finish."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        case, out = Path(folder) / "case.json", Path(folder) / "out.json"
        case.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.child", peer, str(case), str(out)]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {TIMEOUT_SECONDS:.0f} s"}
        if process.returncode or not out.exists():
            lines = [line for line in process.stderr.splitlines() if line.strip()]
            return {"failed": lines[-1][:300] if lines else f"exit {process.returncode}"}
        return dict(json.loads(out.read_text(encoding="utf-8")))


def measure(case: Case, peers: Sequence[str], runs: int, root: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a case `runs` times on each of its peers, alternating: peer -> medians, or the reason why not."""
    wanted = [peer for peer in case.peers if peer in peers]
    unavailable: dict[str, Any] = {peer: {"skipped": why} for peer, why in missing(wanted).items()}
    rows: dict[str, list[dict[str, float]]] = {}
    for number in range(runs):
        for peer in wanted:
            if peer in unavailable:
                continue
            row = run_in_process(peer, {"case": asdict(case), "root": str(root)})
            if "seconds" not in row:
                unavailable[peer] = row
                say(f"{case.name} {peer}: {row}")
                continue
            rows.setdefault(peer, []).append(row)
            say(f"{case.name} {peer} {number + 1}/{runs}: {row['seconds']:.3f} s, {row['peak_bytes'] / 2**20:.0f} MiB")
    medians = {peer: over_runs(runs_of_peer) for peer, runs_of_peer in rows.items() if peer not in unavailable}
    return {peer: (medians | unavailable)[peer] for peer in wanted}
