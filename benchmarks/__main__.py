"""Benchmark Headwater against its peers on equal work, and against the machine's limits.

    python -m benchmarks [--workloads b,d.student,…] [--peers trl,vllm,…] [--runs 3] [--json FILE [--add]]

Each measurement runs in its own process; runs alternate between the peers; results are medians. See docs/performance.md.
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


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", help="workloads (a, b, …) or cases (b.opd), separated by commas; default: all")
    parser.add_argument("--peers", help=f"peers besides headwater; default: all of {', '.join(cases.PEERS[1:])}")
    parser.add_argument("--runs", type=int, default=3, help="repetitions of each measurement")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--add", action="store_true", help="keep the other cases in FILE")
    parser.add_argument("--models", type=Path, default=Path(".bench"), help="folder of the random models")
    options = parser.parse_args(arguments)
    options.peers = list(cases.PEERS) if options.peers is None else ["headwater", *options.peers.split(",")]
    for peer in options.peers:
        if peer not in cases.PEERS:
            parser.error(f"--peers {peer}: choose from {', '.join(cases.PEERS)}")
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: at least 1")
    try:
        all_cases = cases.all_cases()
        options.cases = cases.select_cases(options.workloads.split(","), all_cases) if options.workloads else all_cases
    except ValueError as error:
        parser.error(f"--workloads: {error}")
    return options


def result_of(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure the limits, then every case, and join the results (format: docs/performance.md)."""
    root = options.models.resolve()
    root.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(options.json.read_text(encoding="utf-8")) if options.add and options.json.exists() else {}
    request = {"cases": [asdict(case) for case in options.cases], "root": str(root)}
    limits = runner.run_in_process("limits", request)
    if "failed" in limits:
        raise SystemExit(f"the limits could not be measured: {limits['failed']}")
    workloads: dict[str, Any] = {}
    places: dict[str, str] = {}
    for case in options.cases:
        results = runner.measure(case, options.peers, options.runs, root, console.print)
        for workload, name in case.places:
            workloads.setdefault(workload, {})[name] = results
            places[f"{workload}.{name}"] = case.name
    merged = summary.with_limits(workloads, places, limits)
    for key in ("gemm", "work"):
        limits[key] = earlier.get("limits", {}).get(key, {}) | limits[key]
    for workload, names in earlier.get("workloads", {}).items():
        merged[workload] = names | merged.get(workload, {})
    if "c" in merged:
        merged["c"]["growth_2k_to_16k"] = summary.growth_of_loss(merged["c"])
    return {"workloads": merged, "limits": limits, "machine": machine(limits)}


def machine(limits: dict[str, Any]) -> dict[str, Any]:
    return {"processor": platform.processor() or platform.machine(), "threads": limits.get("threads")}


def main(arguments: Sequence[str] | None = None) -> None:
    options, console = parse_options(arguments), Console(width=180)
    for peer, why in runner.missing(options.peers).items():
        console.print(f"skipped: {peer} ({why})")
    result = result_of(options, console)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result, console)


if __name__ == "__main__":
    main()
