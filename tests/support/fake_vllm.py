"""A stand-in for vLLM that computes with transformers, and the program with it: run this file in the place of `headwater`.

Its engine knows only the weights that it is handed, so a weight that was left out or gathered wrongly changes the rollouts. Like
vLLM's, it is started by all ranks together, and the ranks of one engine must make the same requests in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

FULL = 0.01
"""`gpu_memory_utilization` for which the last rank finds no room."""


class SamplingParams(SimpleNamespace):
    """Settings of a request, by name."""


class RequestOutputKind:
    FINAL_ONLY = "final"


@dataclass
class Waiting:
    id: str
    prompt_ids: list[int]
    params: SamplingParams


class LLM:
    """Model in the engine's dtype, its weights NaN until they are handed over."""

    def __init__(self, model: str, **settings: Any) -> None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        assert settings["distributed_executor_backend"] == ("external_launcher" if ranks > 1 else None)
        self.group: Any = None
        if ranks > 1:
            size = settings["tensor_parallel_size"]
            groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
            self.group = groups[dist.get_rank() // size]
            if settings["gpu_memory_utilization"] == FULL and dist.get_rank() == ranks - 1:
                raise ValueError("No available memory for the cache blocks.")
            dist.all_reduce(torch.zeros(1))  # as vLLM agrees on the size of the cache
        config = AutoConfig.from_pretrained(model, **settings["hf_overrides"])
        self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings["dtype"])).eval()
        for parameter in self.model.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        self.waiting: list[Waiting] = []
        self.llm_engine = self

    def collective_rpc(self, name: str, kwargs: dict[str, Iterable[tuple[str, Tensor]]]) -> None:
        assert name == "reload_weights"
        own = self.model.state_dict()
        for key, tensor in kwargs["weights_iterator"]:
            own[key].copy_(tensor)

    def reset_prefix_cache(self) -> None:
        assert not self.waiting

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        self.waiting.append(Waiting(request_id, prompt["prompt_token_ids"], params))
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def abort_request(self, request_ids: list[str], internal: bool) -> None:
        self.waiting = [request for request in self.waiting if request.id not in request_ids]

    @torch.inference_mode()
    def step(self) -> list[Any]:
        """Decode the waiting requests with prompts as long as the first one's to their ends."""
        length = len(self.waiting[0].prompt_ids)
        batch = [request for request in self.waiting if len(request.prompt_ids) == length]
        self.waiting = [request for request in self.waiting if len(request.prompt_ids) != length]
        if self.group is not None:
            size = dist.get_world_size(self.group)
            requests = [(request.prompt_ids, request.params.seed) for request in batch]
            parts: list[Any] = [None] * size
            dist.all_gather_object(parts, requests, group=self.group)
            assert parts == parts[:1] * size, parts
        params = batch[0].params
        draws_BT = torch.stack([
            torch.rand(params.max_tokens, generator=torch.Generator().manual_seed(request.params.seed % 2**63))
            for request in batch
        ])  # fmt: skip
        ids_BT, logp = torch.tensor([request.prompt_ids for request in batch]), list[Tensor]()
        done_B = torch.zeros(len(batch), dtype=torch.bool)
        stops = torch.tensor(params.stop_token_ids)
        for draw_B in draws_BT.T:
            if bool(done_B.all()):
                break
            logits_BV = self.model(input_ids=ids_BT, use_cache=False).logits[:, -1].float()
            logp_BV = torch.log_softmax(logits_BV / params.temperature, dim=-1)
            token_B1 = (
                (logp_BV.exp().cumsum(-1) < draw_B[:, None]).sum(-1, keepdim=True).clamp(max=logp_BV.shape[1] - 1)
            )
            ids_BT = torch.cat([ids_BT, token_B1], dim=1)
            logp.append(logp_BV.gather(1, token_B1)[:, 0])
            done_B |= torch.isin(token_B1[:, 0], stops)
        rows = zip(batch, ids_BT[:, length:].tolist(), torch.stack(logp, dim=1).tolist(), strict=True)
        return [finished(*row, params.stop_token_ids) for row in rows]


def finished(request: Waiting, ids: list[int], logp: list[float], stops: list[int]) -> Any:
    """The output of a request, cut after its first stop id."""
    end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
    logprobs = [{token: SimpleNamespace(logprob=value)} for token, value in zip(ids[:end], logp[:end], strict=True)]
    reason = "stop" if ids[end - 1] in stops else "length"
    completion = SimpleNamespace(token_ids=ids[:end], logprobs=logprobs, finish_reason=reason)
    return SimpleNamespace(request_id=request.id, finished=True, outputs=[completion])


def install() -> None:
    """Make `import vllm` give this module's classes."""
    module, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM = LLM  # type: ignore[attr-defined]
    params.SamplingParams, params.RequestOutputKind = SamplingParams, RequestOutputKind  # type: ignore[attr-defined]
    sys.modules |= {"vllm": module, "vllm.sampling_params": params}


if __name__ == "__main__":
    from headwater.cli.main import main

    install()
    with mock.patch("headwater.distributed.process_group.FAILURE_TIMEOUT", timedelta(seconds=2)):
        main()
