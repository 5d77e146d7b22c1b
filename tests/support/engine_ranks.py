"""Completions of one rank's vLLM engine, with their distance from the trainer's log-probs, as a line of JSON for each batch.

torchrun --nproc-per-node N tests/support/engine_ranks.py MODEL TENSOR_PARALLEL_SIZE

Batches: four prompts × four samples, the same again, one request (all but one share empty), three (unequal shares), and the first
batch once more after every weight has changed.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from headwater.config.compute import Compute, Vllm
from headwater.config.recipe import Models
from headwater.config.stage import Sampling
from headwater.distributed.process_group import SINGLE_PROCESS, init_process_group
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.sampling.base import Request, requests_for
from headwater.sampling.vllm_sampler import EnginePool
from headwater.teachers.scoring import logp_of
from tiny import CPU, PROMPTS

BATCHES = (("first", 4, 4), ("again", 4, 4), ("one", 1, 1), ("uneven", 3, 1), ("changed", 4, 4))
"""Name, number of prompts, samples of each."""


def requests_of(prompts: int, samples: int) -> list[Request]:
    return requests_for([(f"p{index}", prompt) for index, prompt in enumerate(PROMPTS[:prompts])], samples, "ranks")


def main() -> None:
    model, size = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    ranks = init_process_group() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else SINGLE_PROCESS
    models = Models(student=model, teacher="unused")
    policy = load_policy(ModelFolder.open(model, "models.student"), LoadOptions(models, CPU, frozen=False, ranks=ranks))
    settings = Vllm(compiled=False, cache_gb=0.1, tensor_parallel_size=size)
    sampler = EnginePool(Compute(sampler="vllm", vllm=settings, sample_batch=16), 96).sampler(policy)
    for name, prompts, samples in BATCHES:
        if name == "changed":
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.mul_(0.9)
        rollouts = sampler.sample(requests_of(prompts, samples), Sampling(max_tokens=12))
        sampler_logp = torch.tensor([logp for rollout in rollouts for logp in rollout.sampler_logp])
        gap = (sampler_logp - torch.cat(logp_of(policy, rollouts, 4096))).abs()
        ids = [rollout.completion_ids for rollout in rollouts]
        print(
            json.dumps(
                {"rank": ranks.rank, "batch": name, "gap": gap.mean().item(), "largest": gap.max().item(), "ids": ids}
            )
        )
    ranks.barrier()


if __name__ == "__main__":
    main()
