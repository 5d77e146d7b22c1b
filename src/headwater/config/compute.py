"""Schema of the recipe's section `compute`: device, sampler, memory and processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from headwater.config.samplers import SAMPLERS, check_sampler_name
from headwater.config.schema import Choices, Gib, Name, Positive, Seconds, Strict, Tokens, Unit


class Resources(Strict):
    """Cluster resources of one node."""

    cpus: Annotated[float, Field(ge=0.0, le=4096.0), Unit("cores")] = 1.0
    """CPU cores that Ray reserves."""
    gpus: Annotated[float, Field(ge=0.0, le=64.0)] | None = None
    """GPUs that Ray reserves. None: 1 if `compute.device` is cuda, else 0."""
    memory_gib: Gib | None = None
    """Host memory that Ray reserves. None reserves no memory."""


class Ray(Strict):
    """How `--executor ray` runs a study's nodes."""

    node: Resources = Resources()
    """Resources of a node whose stage `stages` does not name."""
    stages: dict[Name, Resources] = Field(default_factory=dict)
    """Resources per stage (`teacher_rl`, `warmup`, `teacher_rollouts`, …), instead of `node`."""
    retries: Annotated[int, Field(ge=0, le=100)] = 2
    """Restarts of a node whose process died, from its last checkpoint."""


class Vllm(Strict):
    """Settings of the vLLM sampler (docs/engines.md)."""

    memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4
    """Fraction of device memory that the engine uses while it samples, weights and cache together."""
    cache_gb: Gib | None = None
    """KV cache. None uses what `memory` leaves on a GPU, and 1 on a CPU."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=1024), Unit("devices")] = 1
    """Devices that hold one engine together: processes that vLLM starts, or under torchrun consecutive ones of the run's own, whose
    number it must divide."""
    compiled: bool = True
    """Compile the model and capture CUDA graphs: about a minute at start, faster steps afterwards."""
    sleep: bool = True
    """Release its memory while the policy trains; ignored on a CPU."""
    importance_cap: Annotated[float, Field(gt=0.0)] | None = 2.0
    """Truncated importance weight min(p_trainer / p_sampler, cap) of each policy-gradient token; None disables it."""


class Server(Strict):
    """Requests to a served teacher (`models.teacher: http://…`)."""

    seconds: Seconds = 120.0
    """Timeout of one request, from its start to the last byte of the answer; it is then retried."""
    retries: Annotated[int, Field(ge=0, le=100)] = 5
    """Retries of a request without a usable response, after 0.5, 1, 2 … 30 seconds."""
    concurrency: Annotated[int, Field(ge=1, le=1024), Unit("requests")] = 8
    """Concurrent requests."""
    batch_tokens: Tokens = 16384
    """Tokens scored per request."""
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable with the server's API key; the key itself is never recorded."""


class Compute(Strict):
    """Device, sampler, memory and processes; changes how a run is computed, not what it computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that trains and samples; `auto` takes a GPU if there is one."""
    sampler: Annotated[str, AfterValidator(check_sampler_name), Choices(SAMPLERS)] = "torch"
    """Sampler of completions: `torch`, the embedded one, or `vllm`, in this process (extra `vllm`)."""
    vllm: Vllm = Vllm()
    """Settings of the vLLM sampler."""
    server: Server = Server()
    """Requests to a served teacher."""
    offload_teacher: bool = False
    """Keep an in-process teacher, except its head, in host memory while it does not score."""
    microbatch_tokens: Tokens = 16384
    """Tokens per forward and backward pass (a shared prompt counts once; padding counts for models that need it); gradients
    are accumulated over the passes."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of torch; None keeps its default."""
    workers: Annotated[int, Field(ge=1, le=1024), Unit("processes")] | None = None
    """Processes that run independent nodes in parallel. None: cores / threads if `threads` is set, else 1; 1 on a GPU."""
    sample_batch: Annotated[Positive, Unit("sequences")] = 256
    """Sequences that the torch sampler decodes at once."""
    score_ahead: Annotated[int, Field(ge=1, le=64)] = 1
    """Parts of a step's rollouts that a live teacher scores while later ones are sampled; helps if a core is idle or the teacher is
    behind a server."""
    overlap: Literal[0, 1] = 0
    """1: on-policy stages sample the next step's rollouts while a step trains, from the weights before its update; with any sampler,
    the loss corrects with `vllm.importance_cap` (docs/devices.md)."""
    grader_workers: Annotated[int, Field(ge=1, le=1024), Unit("processes")] = 2
    """Processes that grade completions."""
    grader_seconds: Seconds = 2.0
    """Time limit for grading one completion, which is then graded wrong."""
    sandbox: Literal["required", "optional"] = "required"
    """Task `python`: `required` refuses a machine without the sandbox's system-call filter; `optional` runs completions there
    too, where they can harm it (docs/safety.md)."""
    deterministic: bool = True
    """Use deterministic algorithms of torch: equal runs give equal results on one machine."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of finished stages (weights and optimizer state, next to the model folder), and the distributions of
    teacher caches that all their stages have read."""
    ray: Ray = Ray()
    """How `--executor ray` runs a study's nodes."""

    LATER = frozenset({"overlap"})
