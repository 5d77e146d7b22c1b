"""Memory of one rank in FSDP2 training, in MB above a process that has loaded its libraries and a pocket model.

torchrun --nproc-per-node N tests/support/ranks_memory.py [--layers 12] [--width 768] [--vocabulary 32000] [--steps 2]
    [--dtype bfloat16] [--sampler vllm]

With vLLM the pocket teacher's engine runs before the measurement, so that its libraries do not count; `start_peak_mb` is the peak
while the measured model's engine starts and reads its files, `sample_peak_mb` of a later batch. `--steps 0` trains nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from headwater.config.compute import Compute, Vllm
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup, init_process_group
from headwater.losses.objectives import objective_of
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.sampling.sharded_sampler import sharded
from headwater.sampling.torch_sampler import TorchSampler
from headwater.sampling.vllm_sampler import EnginePool
from headwater.training.groups import assign_to_ranks
from headwater.training.update import make_optimizer, update
from tiny import CPU, MODELS, sampled_rows, stage_of, tiny_folder

LIBC = ctypes.CDLL("libc.so.6")
M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4


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
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--sampler", default="torch", choices=("torch", "vllm"))
    parser.add_argument("--model", type=Path, help="a model folder to use instead of making one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Freed memory returns to the system at once, also after `keep_freed_memory`: no reserve of the allocator is counted.
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    LIBC.mallopt(M_MMAP_MAX, 1 << 16)
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
        measure(folder, args, ranks)
        ranks.barrier()


def measure(folder: Path, args: argparse.Namespace, ranks: ProcessGroup) -> None:
    models = MODELS.model_copy(update={"dtype": args.dtype})
    pool = EnginePool(Compute(sampler="vllm", vllm=Vllm(compiled=False, cache_gb=0.05), sample_batch=8), 64)
    engines = args.sampler == "vllm"
    make_sampler = pool.sampler if engines else sharded(TorchSampler)
    sample = partial(sampled_rows, groups=2, group_size=4, max_tokens=16, make_sampler=make_sampler)
    warm = load_policy(
        ModelFolder.open(f"pocket:qwen3-{'teacher' if engines else 'student'}", "warm"),
        LoadOptions(models, CPU, frozen=False, ranks=ranks),
    )
    if engines:
        sample(warm)
    del warm
    empty = forget()
    policy = load_policy(ModelFolder.open(str(folder), "model"), LoadOptions(models, CPU, frozen=False, ranks=ranks))
    loading = status("VmHWM") - empty
    loaded = forget() - empty
    stage = stage_of("grpo", batch_size=8, group_size=4)
    optimizer = make_optimizer(policy, stage.optim)
    starting = 0.0
    if engines:
        sample(policy)
        starting = status("VmHWM") - empty
        forget()
    rows = sample(policy)
    sampling = status("VmHWM") - empty
    forget()
    seconds, stats = [0.0], dict.fromkeys(("grad_norm", "loss"), 0.0)
    for _ in range(args.steps):
        began = time.perf_counter()
        stats = update(policy, optimizer, assign_to_ranks(rows, stage, 4, ranks), objective_of(stage), 4096)
        seconds.append(time.perf_counter() - began)
    stepping = status("VmHWM") - empty
    parameters = list(policy.model.parameters())
    row = {
        "rank": ranks.rank, "of": ranks.size, "parameters": sum(parameter.numel() for parameter in parameters),
        "weights_mb": sum(map(local, parameters)) / 1e6,
        "gradients_mb": sum(local(parameter.grad) for parameter in parameters if parameter.grad is not None) / 1e6,
        "optimizer_mb": sum(local(tensor) for state in optimizer.state.values() for tensor in state.values()) / 1e6,
        "load_peak_mb": loading, "loaded_mb": loaded,
        "start_peak_mb": starting, "sample_peak_mb": sampling, "step_peak_mb": stepping,
        "after_mb": forget() - empty, "grad_norm": stats["grad_norm"], "loss": stats["loss"], "seconds_step": seconds[-1],
    }  # fmt: skip
    print(json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}))


if __name__ == "__main__":
    main()
