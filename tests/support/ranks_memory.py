"""Memory of one rank in FSDP2 training, in MB above a process that has loaded its libraries and a pocket model.

torchrun --nproc-per-node N tests/support/ranks_memory.py [--layers 12] [--width 768] [--vocabulary 32000] [--steps 2]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup, init_process_group
from headwater.losses.objectives import objective_of
from headwater.models import fsdp
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.training.groups import assign_to_ranks
from headwater.training.update import make_optimizer, update
from tiny import CPU, MODELS, sampled_rows, stage_of, tiny_folder

LIBC, M_MMAP_THRESHOLD = ctypes.CDLL("libc.so.6"), -3


def local(tensor: Tensor) -> int:
    shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return shard.numel() * shard.element_size()


def status(name: str) -> float:
    """A row of /proc/self/status in MB: VmRSS is resident now, VmHWM the peak since `forget`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith(name))


def forget() -> float:
    """Return freed memory to the system and reset the peak; returns resident MB."""
    LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def make(folder: Path, layers: int, width: int, vocabulary: int) -> None:
    tiny_folder(
        folder, "qwen3", std=0.02, vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=width // 128, head_dim=64,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, usual in (("layers", 12), ("width", 768), ("vocabulary", 32000), ("steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--model", type=Path, help="a model folder to use instead of making one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    LIBC.mallopt(
        M_MMAP_THRESHOLD, 1 << 16
    )  # freed memory returns to the system at once: no reserve of the allocator is counted
    ranks = init_process_group() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else SINGLE_PROCESS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(ranks.broadcast(temporary))
        if args.model is not None:
            folder = args.model
        elif ranks.is_main:  # in another process, whose memory does not count here
            maker = multiprocessing.get_context("spawn").Process(
                target=make, args=(folder, args.layers, args.width, args.vocabulary)
            )
            maker.start()
            maker.join()
        ranks.barrier()
        measure(folder, args.steps, ranks)
        ranks.barrier()


def measure(folder: Path, steps: int, ranks: ProcessGroup) -> None:
    load_policy(ModelFolder.open("pocket:qwen3-student", "warm"), LoadOptions(MODELS, CPU, frozen=False))
    empty = forget()
    policy = load_policy(ModelFolder.open(str(folder), "model"), LoadOptions(MODELS, CPU, frozen=False, ranks=ranks))
    loading = status("VmHWM") - empty
    loaded = forget() - empty
    stage = stage_of("grpo", batch_size=8, group_size=4)
    optimizer = make_optimizer(policy, stage.optim)
    with fsdp.unsharded(policy) as whole:
        rows = sampled_rows(whole, groups=2, group_size=4, max_tokens=16)
        sampling = status("VmHWM") - empty
    del whole
    forget()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        stats = update(policy, optimizer, assign_to_ranks(rows, stage, 4, ranks), objective_of(stage), stage, 4096)
        seconds.append(time.perf_counter() - began)
    stepping = status("VmHWM") - empty
    parameters = list(policy.model.parameters())
    row = {
        "rank": ranks.rank, "of": ranks.size, "parameters": sum(parameter.numel() for parameter in parameters),
        "weights_mb": sum(map(local, parameters)) / 1e6,
        "gradients_mb": sum(local(parameter.grad) for parameter in parameters if parameter.grad is not None) / 1e6,
        "optimizer_mb": sum(local(tensor) for state in optimizer.state.values() for tensor in state.values()) / 1e6,
        "load_peak_mb": loading, "loaded_mb": loaded, "sample_peak_mb": sampling, "step_peak_mb": stepping,
        "after_mb": forget() - empty, "grad_norm": stats["grad_norm"], "loss": stats["loss"], "seconds_step": seconds[-1],
    }  # fmt: skip
    print(json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}))


if __name__ == "__main__":
    main()
