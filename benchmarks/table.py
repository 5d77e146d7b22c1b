"""Print the results as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

BESIDE = ("ratio", "least_seconds")
"""Keys of a case's result that are not peers."""


def memory(result: Mapping[str, Any]) -> str:
    value = result.get("gpu_bytes", result.get("peak_bytes"))
    return "" if value is None else f"{value / 2**20:,.0f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def table(result: Mapping[str, Any]) -> Table:
    """One row per case and peer; a ratio is the peer's value over Headwater's, so above 1 Headwater is better."""
    out = Table(title="median of each", box=None, header_style="bold", title_justify="left")
    for name in ("workload", "who", "seconds", "sample", "score", "update"):
        out.add_column(name, justify="left" if name in ("workload", "who") else "right")
    for name in ("tokens/s", "peak MiB", "working MiB", "× seconds", "× peak", "% of limit", "% training"):
        out.add_column(name, justify="right")
    for workload, names in result["workloads"].items():
        for name, peers in names.items():
            if not isinstance(peers, dict) or "ratio" not in peers:
                continue
            for peer, measurement in peers.items():
                if peer not in BESIDE:
                    out.add_row(f"{workload}.{name}", peer, *cells(measurement, peers["ratio"].get(peer, {})))
    return out


def cells(measurement: Mapping[str, Any], ratio: Mapping[str, float]) -> list[str]:
    if "seconds" not in measurement:
        return [str(measurement.get("skipped") or f"failed: {measurement.get('failed')}")]
    parts = [measurement.get(f"seconds_{part}") for part in ("sample", "score", "update")]
    working = measurement.get("working_bytes")
    return [
        f"{measurement['seconds']:.3f}",
        *("" if part is None else f"{part:.3f}" for part in parts),
        f"{measurement['tokens_per_second']:,.0f}" if "tokens_per_second" in measurement else "",
        memory(measurement),
        "" if working is None else f"{working / 2**20:,.0f}",
        *(f"{ratio[key]:.2f}" if key in ratio else "" for key in ("seconds", "peak_bytes")),
        percent(measurement.get("share")),
        percent(measurement.get("share_training")),
    ]


def show(result: Mapping[str, Any], console: Console | None = None) -> None:
    console = console or Console(width=180)
    console.print(table(result))
    limits = result["limits"]
    if limits.get("gemm"):
        console.print("\nmatrix products of the workloads' shapes, GFLOP/s")
        for key, rates in limits["gemm"].items():
            console.print(f"  {key}: " + ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items()))
    if "memory_bandwidth" in limits:
        console.print(f"memory bandwidth {limits['memory_bandwidth'] / 1e9:.1f} GB/s, threads {limits['threads']}")
