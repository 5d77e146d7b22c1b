"""Sampling by vLLM, in this process beside the trainer. The only file that imports vLLM (extra `vllm`).

The engine reads a model's shape from the folder that the policy came from, and its weights from the policy's own memory before
each batch of requests; nothing goes over a disk, and no process is started. Token ids go in and come out; vLLM's tokenizer
is never asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import random as python
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from headwater import seeds
from headwater.config import recipe as config
from headwater.errors import UserError
from headwater.models.policy import Policy
from headwater.sampling.base import OnFinished, Request
from headwater.types import Rollout

MISSING = (
    "compute.sampler: vllm is not installed here; install the extra with `pip install headwater[vllm]`, or set "
    "compute.sampler=torch"
)
SEEDS = 1 << 63
"""vLLM takes a request's seed as a signed 64-bit number."""
CPU_TOKENS = 8192
"""Tokens of one of its steps on a CPU."""
SHAPE_SAYS_NOTHING = {"_name_or_path", "name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


@dataclass
class Engine:
    """One vLLM engine. Models of one shape take turns in it.

    holds  the frozen policy whose weights it has; None while it has those of one that trains, which change, or none at all
    naps   whether it gives its memory back between batches of requests
    apart  whether its workers are processes of their own, to which tensors of this one must be sent
    """

    llm: Any
    naps: bool
    apart: bool = False
    holds: Policy | None = None

    def take(self, policy: Policy) -> None:
        """Make the policy's weights, as they are now, the engine's own, and forget what it computed with others."""
        if self.naps:
            self.llm.wake_up(tags=["weights"])
        if self.holds is not policy:
            # The names are those of the checkpoint, and the engine stacks, pads and packs them as it does a file's.
            handed = policy.merged_weights()
            self.llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": list(handed) if self.apart else handed}
            )
            trains = any(one.requires_grad for one in policy.model.parameters())
            self.holds = None if trains else policy
        if self.naps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def rest(self) -> None:
        if self.naps:
            self.llm.sleep(level=2)  # forgets the weights too: they come anew with the next requests
            self.holds = None


@dataclass(frozen=True)
class EnginePool:
    """The engines of this process by the shape of their models, each started when first asked.

    longest  tokens of prompt and completion together, at most
    """

    compute: config.Compute
    longest: int
    held: dict[str, Engine] = field(default_factory=dict)

    def sampler(self, policy: Policy) -> VllmSampler:
        return VllmSampler(policy, self)

    def engine(self, policy: Policy) -> Engine:
        """Raises UserError when vLLM is missing or does not take the model."""
        shape = shape_of(policy)
        if shape not in self.held:
            self.held[shape] = self._started(policy)
        return self.held[shape]

    def _started(self, policy: Policy) -> Engine:
        if not installed():
            raise UserError(MISSING)
        settings = self.compute.vllm
        check_device_count(settings.tensor_parallel_size, policy.device)
        naps = settings.sleep and policy.device.type == "cuda"
        positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", self.longest)
        with process_as_it_was():
            vllm = _vllm()
            try:
                llm = vllm.LLM(
                    model=policy.folder.base.path,  # an adapter's weights come with the hand-over
                    dtype=str(policy.compute_dtype).removeprefix("torch."),
                    max_model_len=min(self.longest, positions),
                    max_num_seqs=self.compute.sample_batch,
                    tensor_parallel_size=settings.tensor_parallel_size,
                    gpu_memory_utilization=settings.memory,
                    kv_cache_memory_bytes=_cache_bytes(settings, policy.device),
                    enforce_eager=not settings.compiled,
                    enable_prefix_caching=True,  # a group's samples share their prompt
                    enable_sleep_mode=naps,
                    logprobs_mode="processed_logprobs",  # of the distribution that was drawn from, temperature included
                    generation_config="vllm",  # what a folder says of sampling is not ours
                    skip_tokenizer_init=True,
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    seed=0,
                    **(self._on_a_cpu(positions) if policy.device.type == "cpu" else {}),
                )
            except Exception as error:  # whatever it raises, it is about this model or this machine
                raise unfit(policy, error) from None
        return Engine(llm, naps, settings.tensor_parallel_size > 1)

    def _on_a_cpu(self, positions: int) -> dict[str, Any]:
        """Each prompt in one piece: a piece's unused draw cannot be taken back from a CPU's generator, and vLLM would stop."""
        return {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_TOKENS, min(self.longest, positions)),
        }


def check_device_count(asked: int, device: torch.device) -> None:
    """Raises UserError where an engine is to lie on more GPUs than there are."""
    there = torch.cuda.device_count() if device.type == "cuda" else asked
    if asked > there:
        raise UserError(f"compute.vllm.tensor_parallel_size: {asked} devices are asked for, and there are {there}")


def unfit(policy: Policy, error: Exception) -> UserError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(
        f"compute.sampler: vllm cannot run {policy.folder.path} ({said}); set compute.sampler=torch, or mend compute.vllm"
    )


@dataclass(frozen=True)
class VllmSampler:
    """vLLM behind the sampler protocol: the same requests, rollouts and log-probs as the embedded sampler's.

    A request's seed is named by its `draw`, as the embedded sampler's numbers are; the two draw different tokens from
    them. The same weights and requests give the same tokens as long as the engine's logits are the same to the last bit,
    which on a GPU depends on who else is in the batch.
    """

    policy: Policy
    engines: EnginePool

    def sample(
        self, requests: Sequence[Request], sampling: config.Sampling, arrived: OnFinished | None = None
    ) -> list[Rollout]:
        if not requests:
            return []
        engine = self.engines.engine(self.policy)
        engine.take(self.policy)
        try:
            return self._run(engine.llm.llm_engine, requests, sampling, arrived or (lambda finished: None))
        finally:
            engine.rest()

    def _run(
        self, engine: Any, requests: Sequence[Request], sampling: config.Sampling, arrived: OnFinished
    ) -> list[Rollout]:
        held: dict[str, int] = {}
        rollouts: dict[int, Rollout] = {}
        try:
            for index, one in enumerate(requests):
                asked = {"type": "token", "prompt_token_ids": list(one.prompt_ids)}
                held[engine.add_request(str(index), asked, self._told(one, sampling))] = index
            while engine.has_unfinished_requests():
                ended = {int(one.request_id): one.outputs[0] for one in self._step(engine) if one.finished}
                found = {index: self._rollout(requests[index], one, sampling) for index, one in ended.items()}
                rollouts.update(found)
                if found:
                    arrived(list(found.values()))
        finally:
            left = [name for name, index in held.items() if index not in rollouts]
            if left:  # stopped on the way: the next batch must not find them there
                engine.abort_request(left, internal=True)
        return [rollouts[index] for index in range(len(requests))]

    def _step(self, engine: Any) -> list[Any]:
        try:
            found: list[Any] = engine.step()
        except Exception as error:  # some shapes are refused by the kernels only
            raise unfit(self.policy, error) from None
        return found

    def _told(self, request: Request, sampling: config.Sampling) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=seeds.seed_of(*request.draw) % SEEDS,
            logprobs=0,  # of the sampled token alone
            stop_token_ids=[one for one in self.policy.stop_ids if one < self.policy.vocabulary],
            ignore_eos=True,  # the policy's own stop ids are all of them
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _rollout(self, request: Request, found: Any, sampling: config.Sampling) -> Rollout:
        ids = tuple(found.token_ids)
        return Rollout(
            problem_id=request.problem_id,
            sample=request.sample,
            prompt_ids=request.prompt_ids,
            completion_ids=ids,
            sampler_logp=tuple(known[one].logprob for one, known in zip(ids, found.logprobs, strict=True)),
            finish="stop" if found.finish_reason == "stop" else "length",
            sampler=self.policy.fingerprint,
            temperature=sampling.temperature,
        )


def shape_of(policy: Policy) -> str:
    """Names what an engine is built for: the architecture with all its numbers, the type and the device."""
    held = {key: value for key, value in policy.model.config.to_dict().items() if key not in SHAPE_SAYS_NOTHING}
    text = json.dumps([held, str(policy.compute_dtype), policy.device.type], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _vllm() -> Any:
    """vLLM, told before it is imported to stay in this process and to be quiet."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in (("VLLM_NO_USAGE_STATS", "1"), ("VLLM_LOGGING_LEVEL", "CRITICAL")):
        os.environ.setdefault(name, value)
    import vllm

    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    return vllm


def _cache_bytes(settings: config.Vllm, device: torch.device) -> int | None:
    """Of the key-value cache; None lets the engine measure what is left of its share of a GPU."""
    if settings.cache_gb is not None:
        return int(settings.cache_gb * 2**30)
    return 1 << 30 if device.type == "cpu" else None


@contextlib.contextmanager
def process_as_it_was() -> Iterator[None]:
    """Starting an engine seeds every generator of the process and, on a CPU, takes `torch.set_num_threads` away."""
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
