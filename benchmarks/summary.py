"""Summarize the results: medians over runs, ratios to Headwater, shares of the machine's limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

OURS = "headwater"
PARTS = ("sample", "score", "update")
Result = dict[str, Any]


def over_runs(runs: Sequence[Mapping[str, float]]) -> Result:
    """Median of every value over the runs, all seconds, and derived values.

    growth_bytes       peak minus resident memory after loading
    working_bytes      loss stage only: growth without the gradient of the hidden states, which every implementation needs
    tokens_per_second  sampling only

    Example: seconds of 3, 1 and 2 give seconds 2 and each [3, 1, 2].
    """
    result: Result = {key: median(run[key] for run in runs) for key in runs[0]}
    result |= {"runs": len(runs), "each": [run["seconds"] for run in runs]}
    if "peak_bytes" in result:
        result["growth_bytes"] = median(run["peak_bytes"] - run["loaded_bytes"] for run in runs)
    if "hidden_bytes" in result:
        result["working_bytes"] = result.get("gpu_bytes", result.get("growth_bytes", 0.0)) - result["hidden_bytes"]
    if "tokens_sampled" in result and "seconds_sample" not in result:
        result["tokens_per_second"] = result["tokens_sampled"] / result["seconds"]
    return result


def ratios(peers: Mapping[str, Result]) -> dict[str, dict[str, float]]:
    """Seconds and bytes of each peer divided by Headwater's. Above 1, Headwater needs less.

    Example: 2 s for Headwater and 7 s for trl give {"trl": {"seconds": 3.5}}.
    """
    ours = peers.get(OURS, {})
    kept = ("seconds", "peak_bytes", "growth_bytes", "working_bytes", "seconds_sample", "seconds_update")
    return {
        peer: {key: result[key] / ours[key] for key in kept if ours.get(key) and key in result}
        for peer, result in peers.items()
        if peer != OURS and "seconds" in result and "seconds" in ours
    }


def least_seconds(work: Mapping[str, Any], gemm: Mapping[str, Mapping[str, float]]) -> Result:
    """Seconds of each part of a case at the measured float32 matrix-product rate of its shapes."""
    return {part: part_work["flops"] / gemm[part_work["gemm"]]["float32"] for part, part_work in work.items()}


def shares(result: Result, least: Mapping[str, float]) -> Result:
    """Shares of the machine's limit: total, sampling, and training (scoring plus update).

    Scoring and update are combined because the teacher's head may run in either.

    Example: a least time of 1 s and 4 s measured give 0.25.
    """
    out: Result = {"share": sum(least.values()) / result["seconds"]} if least else {}
    if "sample" in least and result.get("seconds_sample"):
        out["share_sample"] = least["sample"] / result["seconds_sample"]
    training = sum(result.get(f"seconds_{part}", 0.0) for part in ("score", "update"))
    if "update" in least and training:
        out["share_training"] = (least.get("score", 0.0) + least["update"]) / training
    if "seconds_score" in result:
        out["score_of_step"] = result["seconds_score"] / result["seconds"]
    return out


def with_limits(workloads: Mapping[str, Any], places: Mapping[str, str], limits: Mapping[str, Any]) -> dict[str, Any]:
    """Add ratios to the workloads, and shares where the limits include the work.

    places  "workload.name" of every result -> name of its case
    """
    merged: dict[str, Any] = {}
    for workload, names in workloads.items():
        merged[workload] = {}
        for name, peers in names.items():
            work = limits["work"].get(places.get(f"{workload}.{name}", ""), {})
            least = least_seconds(work, limits["gemm"]) if work else {}
            results = {
                peer: result | shares(result, least) if "seconds" in result else result
                for peer, result in peers.items()
            }
            merged[workload][name] = results | {"ratio": ratios(peers)} | ({"least_seconds": least} if least else {})
    return merged


def growth_of_loss(workload: Mapping[str, Any]) -> dict[str, float]:
    """Relative growth of the loss stage's working memory from 2k to 16k tokens: 0.02 is 2 % more."""
    small, large = (workload.get(name, {}) for name in ("loss_2k", "loss_16k"))
    both = [peer for peer in small if "working_bytes" in small[peer] and "working_bytes" in large.get(peer, {})]
    return {peer: large[peer]["working_bytes"] / small[peer]["working_bytes"] - 1.0 for peer in both}
