"""vLLM sampler, in the trainer's process. The only file that imports vLLM (extra `vllm`).

The engine reads the architecture from the policy's model folder, and the weights from the policy's memory before each batch of
requests, without files or (on one device) other processes. Token ids go in and out; vLLM's tokenizer is not loaded.

Under torchrun each rank has an engine, or `tensor_parallel_size` consecutive ranks hold one together. Ranks sample together: they
start engines, gather weights and make requests in the same order, and those of one engine make the same requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random as python
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from headwater.config.compute import Compute, Vllm
from headwater.config.recipe import Recipe
from headwater.config.samplers import missing_package
from headwater.config.stage import Sampling
from headwater.distributed.process_group import ProcessGroup, is_lost_process
from headwater.errors import HeadwaterError, LostProcessError, TrainingStoppedError, UserError, error_text
from headwater.models.oom import is_out_of_memory
from headwater.models.policy import Policy
from headwater.sampling import torch_sampler
from headwater.sampling.base import OnFinished, Request, Sampler, SamplerFactory
from headwater.types import Rollout

CPU_TOKENS = 8192
"""Tokens that the engine prefills in one step on a CPU, at least."""
NOT_ARCHITECTURE = {"_name_or_path", "name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Fields of a model's config that do not affect its engine."""
FULL_DEVICE = ("less than desired", "exceed the desired", "No available memory", "on kv cache allocation is less")
"""Parts of vLLM's messages when an engine finds no room next to what else the device holds."""


def make_factory(recipe: Recipe) -> SamplerFactory:
    """vLLM samplers over one pool of engines, which are started when first used and kept.

    Of several ranks all start an engine together. A policy that a single rank holds there (preflight's) gets the embedded sampler.

    Raises UserError if the ranks cannot be split into engines.
    """
    pool = EnginePool(recipe.compute, max_sequence_tokens(recipe))
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1:
        return pool.sampler
    check_rank_count(recipe.compute.vllm.tensor_parallel_size, processes)
    embedded = torch_sampler.make_factory(recipe)

    def make(policy: Policy) -> Sampler:
        return embedded(policy) if policy.ranks.single_process else pool.sampler(policy)

    return make


def max_sequence_tokens(recipe: Recipe) -> int:
    """Tokens of the longest sequence, prompt and completion, that the recipe allows."""
    settings = [recipe.evaluate.sampling, *(stage.sampling for stage in recipe.stages.named.values())]
    return recipe.prompt.max_tokens + max(sampling.max_tokens for sampling in settings)


@dataclass
class Engine:
    """One vLLM engine, shared by models of the same architecture.

    sleeps         it frees its GPU memory between batches of requests
    multiprocess   its workers are separate processes, to which weights are sent
    own_process    it runs next to the trainer in a process of its own, which reads weights from a file in shared memory
    loaded_policy  the frozen policy whose weights it holds; None if it holds none, or those of a policy that trains
    """

    llm: Any
    sleeps: bool
    multiprocess: bool = False
    own_process: bool = False
    loaded_policy: Policy | None = None

    def load_weights(self, policy: Policy) -> None:
        """Copy the policy's current weights into the engine, and drop the prefix cache of the previous ones.

        Sharded weights are gathered one at a time while the engine reads them.
        """
        if self.sleeps:
            torch.cuda.empty_cache()  # the engine cannot use what torch's allocator keeps
            self.llm.wake_up(tags=["weights"])
        if self.loaded_policy is not policy:
            # Names are those of a checkpoint file: the engine stacks, pads and packs the tensors as it does a file's.
            weights = policy.checkpoint_weights()
            if self.own_process:
                with shared_folder(weights, policy.compute_dtype) as folder:
                    self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            else:
                iterator = list(weights) if self.multiprocess else weights
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iterator})
            trains = any(parameter.requires_grad for parameter in policy.model.parameters())
            self.loaded_policy = None if trains else policy
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Free the GPU memory, if the engine is configured to."""
        if self.sleeps:
            self.llm.sleep(level=2)  # drops the weights too: they are loaded again with the next requests
            self.loaded_policy = None


@dataclass(frozen=True)
class EnginePool:
    """The engines of this process by architecture, each started when first used.

    max_tokens  prompt and completion together, at most
    """

    compute: Compute
    max_tokens: int
    engines: dict[str, Engine] = field(default_factory=dict)

    def sampler(self, policy: Policy) -> VllmSampler:
        return VllmSampler(policy, self)

    def engine(self, policy: Policy) -> Engine:
        """The policy's engine; all ranks must ask for it together. Raises `engine_error`, UserError if vLLM is not installed."""
        key = architecture_key(policy)
        if key not in self.engines:
            self.engines[key] = self._start(policy)
        return self.engines[key]

    def _start(self, policy: Policy) -> Engine:
        message = missing_package("vllm")
        if message is not None:
            raise UserError(message)
        settings, ranks = self.compute.vllm, policy.ranks
        if ranks.single_process:
            check_device_count(settings.tensor_parallel_size, policy.device)
        # An engine that samples while the policy trains never sleeps, and is a process: the trainer holds the interpreter's lock.
        own_process = bool(self.compute.overlap) and ranks.single_process
        sleeps = settings.sleep and policy.device.type == "cuda" and not own_process
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
        config = policy.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", self.max_tokens)
        with preserve_process_state():
            vllm = _import_vllm()
            try:
                llm = vllm.LLM(
                    model=policy.folder.base.path,  # an adapter's weights are loaded later, merged
                    hf_overrides=_overrides(policy),
                    dtype=str(policy.compute_dtype).removeprefix("torch."),
                    max_model_len=min(self.max_tokens, positions),
                    max_num_seqs=self.compute.sample_batch,
                    tensor_parallel_size=settings.tensor_parallel_size,
                    distributed_executor_backend=None if ranks.single_process else "external_launcher",
                    gpu_memory_utilization=settings.memory,
                    kv_cache_memory_bytes=_cache_bytes(settings, policy.device),
                    enforce_eager=not settings.compiled,
                    enable_prefix_caching=True,  # the samples of a group share their prompt
                    enable_sleep_mode=sleeps,
                    logprobs_mode="processed_logprobs",  # after temperature, top-p and top-k
                    generation_config="vllm",  # ignore the model folder's sampling defaults
                    skip_tokenizer_init=True,
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    seed=ranks.rank // settings.tensor_parallel_size,  # unused: requests have seeds of their own
                    **(self._cpu_options(positions) if policy.device.type == "cpu" else {}),
                )
            except Exception as error:  # vLLM raises many types for an unsupported model or machine
                raise engine_error(policy, error) from None
        return Engine(llm, sleeps, ranks.single_process and settings.tensor_parallel_size > 1, own_process)

    def _cpu_options(self, positions: int) -> dict[str, Any]:
        """Prefill each prompt in one chunk: vLLM cannot undo the unused draw of a partial chunk on a CPU, and would stop."""
        return {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_TOKENS, min(self.max_tokens, positions)),
        }


def _overrides(policy: Policy) -> dict[str, Any]:
    """What the engine must not believe of the base folder's config.json: that the head is the embedding.

    The files may hold a head of its own all the same, and an adapter on one of two tied layers unties them.
    """
    tied = getattr(policy.model.config, "tie_word_embeddings", True)
    return {} if tied else {"tie_word_embeddings": False}


def check_device_count(count: int, device: torch.device) -> None:
    """Raises UserError if an engine is to use more GPUs than the machine has."""
    available = torch.cuda.device_count() if device.type == "cuda" else count
    if count > available:
        raise UserError(
            f"compute.vllm.tensor_parallel_size: {count} devices are requested, and {available} are available"
        )


def check_rank_count(tensor_parallel_size: int, ranks: int) -> None:
    """Raises UserError if the ranks cannot be split into engines of this many ranks each."""
    if ranks % tensor_parallel_size:
        raise UserError(
            f"compute.vllm.tensor_parallel_size: {tensor_parallel_size} does not divide the {ranks} processes of this run"
        )


def engine_error(policy: Policy, error: Exception) -> HeadwaterError:
    """What an engine's exception means: another rank is gone, the device is full, or vLLM cannot run the model."""
    if isinstance(error, HeadwaterError):
        return error
    if is_lost_process(error):
        return LostProcessError()
    path, message = policy.folder.path, error_text(error, 300)
    if is_out_of_memory(error) or any(part in str(error) for part in FULL_DEVICE):
        return TrainingStoppedError(
            f"memory ran out in vLLM's engine of {path} ({message}); lower compute.vllm.memory, compute.vllm.cache_gb or "
            "compute.sample_batch, or take a larger device"
        )
    return UserError(
        f"compute.sampler: vllm cannot run {path} ({message}); set compute.sampler=torch, or change compute.vllm"
    )


@dataclass(frozen=True)
class VllmSampler:
    """Sampler protocol on a vLLM engine.

    Each request's seed is derived from its `rng_key`. The embedded sampler draws other tokens from the same key. Equal weights and
    requests give equal tokens as long as the engine's logits are equal to the last bit, which on a GPU depends on the
    rest of the batch.
    """

    policy: Policy
    pool: EnginePool

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        if not requests:  # on all ranks alike; a rank whose share alone is empty goes on, since the others need it
            return []
        ranks, size = self.policy.ranks, self.pool.compute.vllm.tensor_parallel_size
        engine = self.pool.engine(self.policy)
        try:
            engine.load_weights(self.policy)
        except Exception as error:
            raise engine_error(self.policy, error) from None
        try:
            if ranks.single_process:
                return self._run(engine.llm.llm_engine, requests, sampling, on_finished)
            share = self._run(engine.llm.llm_engine, engine_share(requests, ranks, size), sampling, None)
        finally:
            engine.sleep()
        rollouts = gather_shares(share, ranks, size)
        if on_finished is not None:
            on_finished(rollouts)
        return rollouts

    def _run(
        self, engine: Any, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None
    ) -> list[Rollout]:
        indices: dict[str, int] = {}  # by the engine's request id
        rollouts: dict[int, Rollout] = {}
        try:
            for index, request in enumerate(requests):
                prompt = {"type": "token", "prompt_token_ids": list(request.prompt_ids)}
                indices[engine.add_request(str(index), prompt, self._sampling_params(request, sampling))] = index
            while engine.has_unfinished_requests():
                try:
                    outputs = {int(out.request_id): out.outputs[0] for out in engine.step() if out.finished}
                except Exception as error:  # some shapes are refused only by the kernels
                    raise engine_error(self.policy, error) from None
                finished = {index: self._rollout(requests[index], out, sampling) for index, out in outputs.items()}
                rollouts.update(finished)
                if on_finished is not None:
                    on_finished(list(finished.values()))
        finally:
            left = [request_id for request_id, index in indices.items() if index not in rollouts]
            if left:  # an exception came first: the requests must not be in the next batch
                engine.abort_request(left, internal=True)
        return [rollouts[index] for index in range(len(requests))]

    def _sampling_params(self, request: Request, sampling: Sampling) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=request.vllm_seed,
            logprobs=0,  # of the sampled token only
            stop_token_ids=[stop for stop in self.policy.stop_ids if stop < self.policy.vocabulary],
            ignore_eos=True,  # the policy's stop ids include EOS
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _rollout(self, request: Request, output: Any, sampling: Sampling) -> Rollout:
        ids = tuple(output.token_ids)
        logp = tuple(logprobs[token].logprob for token, logprobs in zip(ids, output.logprobs, strict=True))
        return request.rollout(ids, logp, output.finish_reason == "stop", self.policy, sampling)


def engine_share(requests: Sequence[Request], ranks: ProcessGroup, size: int) -> Sequence[Request]:
    """The consecutive share of this rank's engine, which `size` ranks hold together: the same on each of them.

    Example: of (a, b, c, d) ranks 2 and 3 of 4 get (c, d) for size 2; rank 2 gets (c,) for size 1.
    """
    return replace(ranks, rank=ranks.rank // size, size=ranks.size // size).shard(requests)


def gather_shares(share: list[Rollout], ranks: ProcessGroup, size: int) -> list[Rollout]:
    """All rollouts in the order of the requests, on every rank: the shares of the first rank of each engine."""
    return [rollout for part in ranks.all_gather(share if ranks.rank % size == 0 else []) for rollout in part]


def architecture_key(policy: Policy) -> str:
    """Hash of all that an engine is built for: the model's architecture and sizes, the dtype and the device type."""
    config = {key: value for key, value in policy.model.config.to_dict().items() if key not in NOT_ARCHITECTURE}
    text = json.dumps([config, str(policy.compute_dtype), policy.device.type], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _import_vllm() -> Any:
    """Import vLLM with usage statistics off and logging quiet."""
    for name, value in (("VLLM_NO_USAGE_STATS", "1"), ("VLLM_LOGGING_LEVEL", "CRITICAL")):
        os.environ.setdefault(name, value)
    import vllm

    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    return vllm


@contextlib.contextmanager
def shared_folder(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[str]:
    """A folder in shared memory, where there is some, with a safetensors file of the weights; it is removed at the end."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="headwater-", dir=memory if memory.is_dir() else None) as folder:
        tensors = {name: tensor.to(dtype).contiguous().clone() for name, tensor in weights}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        yield folder


def _cache_bytes(settings: Vllm, device: torch.device) -> int | None:
    """Size of the KV cache; None lets the engine take what is left of its share of a GPU."""
    if settings.cache_gb is not None:
        return int(settings.cache_gb * 2**30)
    return 1 << 30 if device.type == "cpu" else None


@contextlib.contextmanager
def preserve_process_state() -> Iterator[None]:
    """Undo what starting an engine does to the process: it seeds every RNG and, on a CPU, replaces `torch.set_num_threads`."""
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    states = python.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        python.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
