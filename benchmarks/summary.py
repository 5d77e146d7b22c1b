"""Summarize the results: medians over runs, ratios to Headwater, shares of the machine's limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

OURS = "headwater"
PARTS = ("sample", "score", "update")
Found = dict[str, Any]


def over_runs(runs: Sequence[Mapping[str, float]]) -> Found:
    """Median of every value over the runs, all seconds, and derived values.

    growth_bytes       peak minus resident memory after loading
    working_bytes      loss stage only: growth without the gradient of the hidden states, which every implementation needs
    tokens_per_second  sampling only

    Example: seconds of 3, 1 and 2 give seconds 2 and each [3, 1, 2].
    """
    found: Found = {key: median(run[key] for run in runs) for key in runs[0]}
    found |= {"runs": len(runs), "each": [run["seconds"] for run in runs]}
    if "peak_bytes" in found:
        found["growth_bytes"] = median(run["peak_bytes"] - run["loaded_bytes"] for run in runs)
    if "hidden_bytes" in found:
        found["working_bytes"] = found.get("gpu_bytes", found.get("growth_bytes", 0.0)) - found["hidden_bytes"]
    if "tokens_sampled" in found and "seconds_sample" not in found:
        found["tokens_per_second"] = found["tokens_sampled"] / found["seconds"]
    return found


def ratios(peers: Mapping[str, Found]) -> dict[str, dict[str, float]]:
    """Seconds and bytes of each peer divided by Headwater's. Above 1, Headwater needs less.

    Example: 2 s for Headwater and 7 s for trl give {"trl": {"seconds": 3.5}}.
    """
    ours = peers.get(OURS, {})
    kept = ("seconds", "peak_bytes", "growth_bytes", "working_bytes", "seconds_sample", "seconds_update")
    return {
        peer: {key: found[key] / ours[key] for key in kept if ours.get(key) and key in found}
        for peer, found in peers.items()
        if peer != OURS and "seconds" in found and "seconds" in ours
    }


def least_seconds(work: Mapping[str, Any], gemm: Mapping[str, Mapping[str, float]], dtype: str = "float32") -> Found:
    """Seconds of each part of a case at the measured matrix-product rate of its shapes."""
    return {part: one["flops"] / gemm[one["gemm"]][dtype] for part, one in work.items()}


def shares(found: Found, least: Mapping[str, float]) -> Found:
    """Shares of the machine's limit: total, sampling, and training (scoring plus update).

    Scoring and update are combined because the teacher's head may run in either.

    Example: a least time of 1 s and 4 s measured give 0.25.
    """
    out: Found = {"share": sum(least.values()) / found["seconds"]} if least else {}
    if "sample" in least and found.get("seconds_sample"):
        out["share_sample"] = least["sample"] / found["seconds_sample"]
    training = sum(found.get(f"seconds_{part}", 0.0) for part in ("score", "update"))
    if "update" in least and training:
        out["share_training"] = (least.get("score", 0.0) + least["update"]) / training
    if "seconds_score" in found:
        out["score_of_step"] = found["seconds_score"] / found["seconds"]
    return out


def with_limits(workloads: Mapping[str, Any], places: Mapping[str, str], limits: Mapping[str, Any]) -> dict[str, Any]:
    """Add ratios to the workloads, and shares where the limits include the work.

    places  "workload.name" of every result -> name of its case
    """
    done: dict[str, Any] = {}
    for workload, names in workloads.items():
        done[workload] = {}
        for name, peers in names.items():
            work = limits["work"].get(places.get(f"{workload}.{name}", ""), {})
            least = least_seconds(work, limits["gemm"]) if work else {}
            held = {peer: one | shares(one, least) if "seconds" in one else one for peer, one in peers.items()}
            done[workload][name] = held | {"ratio": ratios(peers)} | ({"least_seconds": least} if least else {})
    return done


def growth_of_loss(workload: Mapping[str, Any]) -> dict[str, float]:
    """Relative growth of the loss stage's working memory from 2k to 16k tokens: 0.02 is 2 % more."""
    small, large = (workload.get(name, {}) for name in ("loss_2k", "loss_16k"))
    both = [peer for peer in small if "working_bytes" in small[peer] and "working_bytes" in large.get(peer, {})]
    return {peer: large[peer]["working_bytes"] / small[peer]["working_bytes"] - 1.0 for peer in both}
