"""The estimated cost of a node, and the time that it takes on a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from headwater.runs.hardware import BANDWIDTH_SHARE, UTILISATION, Device
from headwater.runs.memory_estimate import DeviceMemory


@dataclass(frozen=True)
class Estimate:
    """Cost of a node where every completion has `max_tokens` tokens (an upper bound), or the assumed mean.

    bytes    weights, gradients and optimizer state, all devices together
    memory   bytes on each device by part, with activations and caches
    measured FLOPs of measurements between a stage's steps (condition C2, validation), which are part of `flops`
    condition_share  FLOPs of measuring condition C2, as a share of the stage's without measurements and evaluations
    scoring  FLOPs of the teacher's scores of a stage's rollouts, which are part of `training`
    training (FLOPs, (bytes read, FLOPs) of decoding) of a stage without measurements and evaluations
    decoded  (bytes read, FLOPs) of decoding, which memory bandwidth limits; the FLOPs are part of `flops`
    """

    name: str
    labels: int
    steps: int
    tokens_sampled: int
    tokens_teacher_scored: int
    flops: float
    bytes: float
    memory: DeviceMemory
    decoded: tuple[float, float] = (0.0, 0.0)
    measured: float = 0.0
    condition_share: float = 0.0
    scoring: float = 0.0
    training: tuple[float, tuple[float, float]] = (0.0, (0.0, 0.0))

    @property
    def peak(self) -> float:
        """Bytes on each device at once."""
        return self.memory.peak

    def seconds(self, device: Device, count: int = 1) -> float:
        """On `count` devices, at UTILISATION and BANDWIDTH_SHARE of their peaks, with the work divided evenly."""
        return seconds_of(self.flops, self.decoded, device) / count

    def scoring_share(self, device: Device | None) -> float:
        """Share of a stage's step that is teacher scoring: of its time on a device, or of its FLOPs; 0 without a step.

        Example: 2 of 10 FLOPs; if the other 8 are decoding that takes three times as long as they would, 2 / (2 + 24).
        """
        if not self.training[0]:
            return 0.0
        if device is None:
            return self.scoring / self.training[0]
        return seconds_of(self.scoring, (0.0, 0.0), device) / seconds_of(*self.training, device)

    def row(self) -> dict[str, Any]:
        return {
            "node": self.name,
            "labels": self.labels,
            "steps": self.steps,
            "tokens_sampled_at_most": self.tokens_sampled,
            "tokens_teacher_scored_at_most": self.tokens_teacher_scored,
            "flops_at_most": self.flops,
            "flops_measuring_at_most": self.measured,
            "flops_scoring_at_most": self.scoring,
            "scoring_share_of_flops": self.scoring_share(None),
            "memory_bytes": self.bytes,
            "peak_bytes": self.peak,
            "device_bytes": self.memory.row(),
        }


def seconds_of(flops: float, decoded: tuple[float, float], device: Device) -> float:
    """Time on one device for these FLOPs, of which decoding (bytes read, FLOPs) is limited by bandwidth or arithmetic."""
    read, decoding_flops = decoded
    decoding = max(read / (BANDWIDTH_SHARE * device.bandwidth), decoding_flops / (UTILISATION * device.flops))
    return decoding + (flops - decoding_flops) / (UTILISATION * device.flops)


def total_seconds(nodes: Iterable[Estimate], device: Device, count: int = 1) -> float:
    """Time of nodes that run one after the other on these devices: what `run --dry-run` and `init mine` name."""
    return sum(node.seconds(device, count) for node in nodes)
