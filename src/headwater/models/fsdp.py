"""FSDP2-sharded policies: shard, run passes on all ranks together, gather all weights.

Training: all ranks enter each layer together, so a rank with fewer microbatches makes idle passes (`idle_pass`), and code that
reads the head outside the forward does so in `sharded_forward`, while its weights are gathered. Gradients are summed over ranks,
not averaged: the denominator is the whole step's and known to every rank.

Sampling: the embedded sampler gathers all weights on each rank while it samples its share of the requests (`unsharded`,
`ShardedSampler`), because decoding needs them for every token; vLLM's engines receive them one matrix at a time
(`Policy.checkpoint_weights`). Random draws are named, so how requests are split does not change them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup, full_tensor
from headwater.errors import TrainingStoppedError
from headwater.models.fsdp_weights import set_parameter
from headwater.models.oom import is_out_of_memory
from headwater.models.policy import Policy, with_root_weights

T = TypeVar("T")


def shard_model(model: Any, ranks: ProcessGroup, device: torch.device) -> Any:
    """Shard every layer over the ranks, in place; returns a copy without weights (`Policy.meta_model`).

    A frozen model's head stays whole on every rank: its logits are computed outside its own passes, next to the student's.
    """
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    meta_model = meta_copy(model)
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    unsharded_head = set(model.get_output_embeddings().parameters()) if frozen else set()
    block_names = set(getattr(model, "_no_split_modules", None) or ())
    # Registered as a forward method below, so that FSDP2's root hooks gather and free weights around the function it calls.
    model.with_root_weights = lambda function: function()
    for module in [module for module in model.base_model.modules() if type(module).__name__ in block_names]:
        fully_shard(module, mesh=ranks.mesh)
    fully_shard(model, mesh=ranks.mesh, ignored_params=unsharded_head)
    register_fsdp_forward_method(model, "with_root_weights")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    return meta_model


def sharded_forward(policy: Policy, forward: Callable[[], T]) -> T:
    """Call `forward` with the weights outside the layers (embedding, last norm, head) gathered.

    Raises TrainingStoppedError if a rank runs out of memory: the others are in the same pass, so it cannot be retried.
    """
    if policy.ranks.single_process:
        return forward()
    with stop_on_oom(policy):
        # If logits are the model's own output, its forward already gathers all it needs.
        capped = isinstance(policy.head, nn.Identity)
        result = forward() if capped else with_root_weights(policy.model, forward)
        if not torch.is_grad_enabled():
            policy.model.reshard()
    return result


@contextlib.contextmanager
def stop_on_oom(policy: Policy) -> Iterator[None]:
    """Raises TrainingStoppedError if a rank of several runs out of memory: no rank can retry a collective pass alone."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if policy.ranks.single_process or not is_out_of_memory(error):
            raise
        raise TrainingStoppedError(
            f"memory ran out on process {policy.ranks.rank} of {policy.ranks.size}; lower compute.microbatch_tokens, or take "
            "more or larger devices"
        ) from None


def idle_pass(policy: Policy) -> None:
    """Take part in a pass of ranks that still have rows, without effect; backward too if gradients are enabled."""
    ids_BT = torch.full((1, 2), policy.pad_id, dtype=torch.long, device=policy.device)

    def zero() -> Tensor:
        return policy.logits(policy.hidden(ids_BT, torch.ones_like(ids_BT))).sum() * 0.0

    with stop_on_oom(policy):
        loss = sharded_forward(policy, zero)
        if loss.requires_grad:
            loss.backward()


def clip_grad_norm(policy: Policy, max_norm: float) -> float:
    """Clip the gradient's norm over all ranks; returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_norm)
    return float(full_tensor(norm).item())


def linear_matrices(model: nn.Module) -> set[int]:
    """Ids of the matrices that only linear layers use, without adapters: autocast casts them for every product anyway."""
    linear, others = set[int](), set[int]()
    for name, module in model.named_modules():
        ids = {id(parameter) for parameter in module.parameters(recurse=False)}
        cast = {id(module.weight)} if type(module) is nn.Linear and ".lora_" not in name else set()
        linear |= cast
        others |= ids - cast  # a head tied to the embedding keeps the embedding's type
    return linear - others


@torch.no_grad()
def copy_weights(policy: Policy, whole: Policy) -> None:
    """Copy a policy's current weights, with an adapter added, into a model that this rank holds whole. All ranks must call it.

    Sharded weights are gathered one at a time.
    """
    reshard(policy)
    own = whole.model.state_dict()
    for name, tensor in policy.merged_weights():
        own[name].copy_(tensor)


def reshard(policy: Policy) -> None:
    """Free the weights that the last pass left gathered on this rank."""
    for module in policy.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def meta_copy(model: Any) -> Any:
    """A copy of a model with its parameters on the meta device, ties kept; it shares the config."""
    parameters = {id(parameter): _on_meta(parameter) for parameter in model.parameters()}
    return copy.deepcopy(model, {**parameters, id(model.config): model.config})


def _on_meta(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


@contextlib.contextmanager
def unsharded(
    policy: Policy, device: torch.device | None = None, linear_dtype: torch.dtype | None = None
) -> Iterator[Policy]:
    """The policy with all weights on this rank, as a single process has it; they are freed at the end.

    device        where the weights are gathered, one after the other; the policy's own by default; `meta` keeps none
    linear_dtype  type of the matrices of linear layers, which are cast before they are gathered; None keeps theirs
    """
    if policy.ranks.single_process:
        yield policy
        return
    reshard(policy)
    model, gathered = policy.meta_model, dict[int, nn.Parameter]()
    named = list(policy.model.named_parameters(remove_duplicate=False))
    casts = set() if linear_dtype is None else linear_matrices(policy.model)
    with torch.no_grad():
        for name, parameter in named:
            if id(parameter) not in gathered:
                shard = parameter.to(linear_dtype) if id(parameter) in casts else parameter
                full = full_tensor(shard).to(device or policy.device)
                gathered[id(parameter)] = nn.Parameter(full, requires_grad=False)
            set_parameter(model, name, gathered[id(parameter)])
    try:
        capped = isinstance(policy.head, nn.Identity)
        body, head = (model, nn.Identity()) if capped else (model.base_model, model.get_output_embeddings())
        adapter = None if policy.adapter is None else policy.adapter.in_model(model)
        yield replace(policy, model=model, body=body, head=head, ranks=SINGLE_PROCESS, meta_model=None, adapter=adapter)
    finally:
        empty = {key: _on_meta(parameter) for key, parameter in gathered.items()}
        for name, parameter in named:
            set_parameter(model, name, empty[id(parameter)])
