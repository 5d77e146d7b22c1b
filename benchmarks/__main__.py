"""Headwater and its peers on the same work, side by side, and against what the machine can do.

    python -m benchmarks [--workloads b,d.student,…] [--peers trl,vllm,…] [--runs 3] [--json FILE [--add]]

Every measurement is a process of its own; runs alternate between the peers; figures are medians. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import cases, runner, summary
from benchmarks.table import show


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", help="workloads (a, b, …) or cases (b.opd), separated by commas; default: all")
    parser.add_argument("--peers", help=f"who beside headwater; default: all of {', '.join(cases.PEERS[1:])}")
    parser.add_argument("--runs", type=int, default=3, help="how often each measurement is repeated")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--add", action="store_true", help="keep what FILE holds of other cases")
    parser.add_argument("--models", type=Path, default=Path(".bench"), help="where random models are kept")
    told = parser.parse_args(arguments)
    told.peers = list(cases.PEERS) if told.peers is None else ["headwater", *told.peers.split(",")]
    for peer in told.peers:
        if peer not in cases.PEERS:
            parser.error(f"--peers {peer}: there are {', '.join(cases.PEERS)}")
    if told.runs < 1:
        parser.error(f"--runs {told.runs}: at least 1")
    try:
        every = cases.all_cases()
        told.cases = cases.chosen(told.workloads.split(","), every) if told.workloads else every
    except ValueError as error:
        parser.error(f"--workloads: {error}")
    return told


def result_of(told: argparse.Namespace, console: Console, run: runner.Run = runner.in_a_process) -> dict[str, Any]:
    """Measure the limits, then every case, and put them together (docs/performance.md says what stands where)."""
    root = told.models.resolve()
    root.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(told.json.read_text(encoding="utf-8")) if told.add and told.json.exists() else {}
    limits = run("limits", {"cases": [asdict(case) for case in told.cases], "root": str(root)})
    if "failed" in limits:
        raise SystemExit(f"the limits could not be measured: {limits['failed']}")
    workloads: dict[str, Any] = {}
    places: dict[str, str] = {}
    for case in told.cases:
        found = runner.measure(case, told.peers, told.runs, root, console.print, run)
        for workload, name in case.places:
            workloads.setdefault(workload, {})[name] = found
            places[f"{workload}.{name}"] = case.name
    done = summary.with_limits(workloads, places, limits)
    for key in ("gemm", "work"):
        limits[key] = earlier.get("limits", {}).get(key, {}) | limits[key]
    for workload, names in earlier.get("workloads", {}).items():
        done[workload] = names | done.get(workload, {})
    if "c" in done:
        done["c"]["growth_2k_to_16k"] = summary.growth_of_loss(done["c"])
    return {"workloads": done, "limits": limits, "machine": machine(limits)}


def machine(limits: dict[str, Any]) -> dict[str, Any]:
    return {"processor": platform.processor() or platform.machine(), "threads": limits.get("threads")}


def main(arguments: Sequence[str] | None = None) -> None:
    told, console = asked(arguments), Console(width=180)
    for peer, why in runner.missing(told.peers).items():
        console.print(f"skipped: {peer} ({why})")
    result = result_of(told, console)
    if told.json is not None:
        told.json.parent.mkdir(parents=True, exist_ok=True)
        told.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result, console)


if __name__ == "__main__":
    main()
