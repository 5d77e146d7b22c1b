"""What one rank holds of a model that several train: bytes of weights, gradients and optimizer, and of the whole process.

torchrun --nproc-per-node N tests/ranks_memory.py [--layers 12] [--width 768] [--vocabulary 32000] [--steps 2]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import time

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from headwater import sharded
from headwater.gather import shared_out
from headwater.objective import objective_of
from headwater.ranks import ALONE, join
from headwater.train import make_optimizer, update
from tiny import policy_of, sampled_rows, stage_of, tiny_model

torch.set_num_threads(1)


def local(tensor: Tensor) -> int:
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held.numel() * held.element_size()


def resident() -> int:
    """Bytes of this process now, once freed memory is given back."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    asked = argparse.ArgumentParser()
    for name, usual in (("layers", 12), ("width", 768), ("vocabulary", 32000), ("steps", 2)):
        asked.add_argument(f"--{name}", type=int, default=usual)
    given = asked.parse_args()
    ranks = join() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ALONE
    empty = resident()
    model = tiny_model(
        "qwen3", std=0.02, vocab_size=given.vocabulary, hidden_size=given.width, intermediate_size=3 * given.width,
        num_hidden_layers=given.layers, num_attention_heads=given.width // 64, num_key_value_heads=given.width // 128, head_dim=64,
    )  # fmt: skip
    policy = sharded.shard(policy_of(model), ranks, "model")
    del model
    stage = stage_of("grpo", batch_size=8, group_size=4)
    optimizer = make_optimizer(policy, stage.optim)
    with sharded.whole(policy) as held:
        rows = sampled_rows(held, groups=2, group_size=4, max_tokens=16)
    del held
    seconds = []
    for _ in range(given.steps):
        began = time.perf_counter()
        found = update(policy, optimizer, shared_out(rows, stage, 4, ranks), objective_of(stage), stage, 4096)
        seconds.append(time.perf_counter() - began)
    parameters = list(policy.model.parameters())
    row = {
        "rank": ranks.rank, "of": ranks.size, "parameters": sum(one.numel() for one in parameters),
        "weights_mb": sum(map(local, parameters)) / 1e6,
        "gradients_mb": sum(local(one.grad) for one in parameters if one.grad is not None) / 1e6,
        "optimizer_mb": sum(local(one) for state in optimizer.state.values() for one in state.values()) / 1e6,
        "process_mb": (resident() - empty) / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - empty / 1e6,
        "grad_norm": found["grad_norm"], "loss": found["loss"], "seconds_step": seconds[-1],
    }  # fmt: skip
    print(json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}))


if __name__ == "__main__":
    main()
