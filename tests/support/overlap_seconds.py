"""Seconds of a GRPO step with `compute.overlap` 0 and 1, alternately, on the pocket teacher (1.8 million weights).

python tests/support/overlap_seconds.py [--steps 6] [--rounds 2]

`embedded` samples in this process, in a thread while overlap is 1. `waiting` sleeps for as long as an update takes and returns
random tokens: an engine on another device, which takes time and none of this process's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from headwater import seeds
from headwater.config.stage import Sampling
from headwater.losses.batch import Row
from headwater.losses.objectives import objective_of
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.sampling.ahead import AheadSampler
from headwater.sampling.base import OnFinished, Request, Sampler, SamplerFactory, requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.training.update import make_optimizer, update
from headwater.types import Rollout
from tiny import CPU, MODELS, stage_of

SAMPLING = Sampling(max_tokens=32)
STAGE = stage_of("constant", batch_size=64, group_size=8, sampling={"max_tokens": 32}, optim={"lr": 1e-6})
PROMPTS = [(str(index), (1, *range(4, 10 + index), 2)) for index in range(8)]


def load() -> Policy:
    return load_policy(ModelFolder.open("pocket:qwen3-teacher", "model"), LoadOptions(MODELS, CPU, frozen=False))


class Waiting:
    """Random tokens after a pause."""

    def __init__(self, policy: Policy, seconds: float) -> None:
        self.policy, self.seconds = policy, seconds

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        time.sleep(self.seconds)
        logp = (-math.log(self.policy.vocabulary),) * sampling.max_tokens
        ids = {
            request.rng_key: seeds.generator(*request.rng_key).integers(5, 25, sampling.max_tokens)
            for request in requests
        }
        return [
            request.rollout(tuple(map(int, ids[request.rng_key])), logp, False, self.policy, sampling)
            for request in requests
        ]


def requests(step: int) -> list[Request]:
    return requests_for(PROMPTS, 8, "overlap", step)


def run(policy: Policy, copy: Policy, make_sampler: SamplerFactory, overlap: int, steps: int) -> dict[str, float]:
    """Median wall and processor seconds of a step, and of its update, after the first two steps."""
    optimizer, objective = make_optimizer(policy, STAGE.optim), objective_of(STAGE, 2.0 if overlap else None)
    now = make_sampler(policy)
    ahead = AheadSampler(policy, copy, make_sampler, now, steps)
    sampler: Sampler = ahead if overlap else now
    rows: list[dict[str, float]] = []
    for step in range(steps):
        ahead.prepare((requests(step + 1), SAMPLING) if step + 1 < steps else None)
        wall, processor = time.perf_counter(), time.process_time()
        rollouts = [Row(rollout) for rollout in sampler.sample(requests(step), SAMPLING)]
        sampled = time.perf_counter()
        update(policy, optimizer, rollouts, objective, 16384)
        rows.append({
            "step": time.perf_counter() - wall, "update": time.perf_counter() - sampled,
            "processor": time.process_time() - processor,
        })  # fmt: skip
    ahead.close()
    return {name: statistics.median(row[name] for row in rows[2:]) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy, copy = load(), replace(load(), adapter=None)
    pause = run(policy, copy, TorchSampler, 0, 3)["update"]
    samplers: dict[str, SamplerFactory] = {"embedded": TorchSampler, "waiting": lambda own: Waiting(own, pause)}
    for name, make_sampler in samplers.items():
        for _ in range(args.rounds):
            for overlap in (0, 1):
                figures = run(policy, copy, make_sampler, overlap, args.steps)
                print(json.dumps({"sampler": name, "overlap": overlap, **{k: round(v, 3) for k, v in figures.items()}}))


if __name__ == "__main__":
    main()
