"""A policy whose weights several ranks hold a part each of (FSDP2), and what must be done otherwise for that.

Passes: all ranks enter each layer together, so a rank with fewer microbatches makes idle passes (`turns`, `idle`), and whatever
reads the head does so `within` the root's forward, while its weights are gathered. Gradients are added over ranks, not averaged: the
denominator is the whole step's and known to every rank (`train.token_weights`).

Sampling: each rank holds all weights once while it samples its share of the requests (`whole`, `ShardedSampler`): decoding
needs them for every token, and draws are named, so no split changes one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from headwater.config import recipe as config
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import TrainingStoppedError, UserError
from headwater.models import fsdp_weights, lora
from headwater.models import policy as model
from headwater.models.oom import out_of_memory
from headwater.models.policy import Policy

T = TypeVar("T")


def load(
    name: str,
    field: str,
    models: config.Models,
    device: torch.device,
    frozen: bool,
    fingerprint: str | None,
    adapt: lora.Wanted | None,
    ranks: ProcessGroup,
) -> Policy:
    """As `model.load`, by all ranks together: each reads its part of every weight, and none ever has all of them.

    Raises UserError, also for what ranks cannot divide.
    """
    if ranks.single_process:
        return model.load(name, field, models, device, frozen, fingerprint, adapt)
    if adapt is not None and adapt.lora.quantize is not None:
        raise UserError(
            "models.lora.quantize: four-bit weights run in one process; leave torchrun out, or leave it out"
        )

    def spread(held: Any, base: str, device: torch.device) -> tuple[Any, Any]:
        skeleton = shard(held, ranks, device)
        fsdp_weights.fill(held, base, device, ranks)
        return held, skeleton

    layout = model.Layout(fsdp_weights.outline, spread, ranks)
    policy = model.load(name, field, models, device, frozen, fingerprint, adapt, layout)
    policy.model.reshard()
    return policy


def shard(held: Any, ranks: ProcessGroup, device: torch.device) -> Any:
    """Have each rank hold a part of every layer from now on; the same model without weights (`Policy.plain`).

    A frozen model's head stays whole on every rank: its logits are made beside the student's, outside of its own passes.
    """
    held._apply(lambda one: one if one.is_meta else one.to(device))
    skeleton = emptied(held)
    frozen = not any(one.requires_grad for one in held.parameters())
    kept = set(held.get_output_embeddings().parameters()) if frozen else set()
    blocks = set(getattr(held, "_no_split_modules", None) or ())
    # A bound method that runs what it is given: between the root's hooks, once it is registered as a forward method.
    held.within = _run
    for module in [one for one in held.base_model.modules() if type(one).__name__ in blocks]:
        fully_shard(module, mesh=ranks.mesh)
    fully_shard(held, mesh=ranks.mesh, ignored_params=kept)
    register_fsdp_forward_method(held, "within")
    for module in held.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return skeleton


def _run(attempt: Callable[[], T]) -> T:
    return attempt()


def within(policy: Policy, attempt: Callable[[], T]) -> T:
    """`attempt()`, with the weights that stand outside of layers (embedding, last norm, head) in reach.

    Raises TrainingStoppedError where memory runs out on a rank: the others are in the same pass, so it cannot be made again.
    """
    if policy.ranks.single_process:
        return attempt()
    with together(policy):
        # Where logits are the model's own, its forward has all it needs.
        found = attempt() if isinstance(policy.head, nn.Identity) else model.in_reach(policy.model, attempt)
        if not torch.is_grad_enabled():
            policy.model.reshard()
    return found


@contextlib.contextmanager
def together(policy: Policy) -> Iterator[None]:
    """Passes that no rank can make again alone. Raises TrainingStoppedError where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if policy.ranks.single_process or not out_of_memory(error):
            raise
        raise TrainingStoppedError(
            f"memory ran out on process {policy.ranks.rank} of {policy.ranks.size}; lower compute.microbatch_tokens, or take "
            "more or larger devices"
        ) from None


def idle(policy: Policy) -> None:
    """A pass that changes nothing, for the sake of the ranks that still have rows; backward too where gradients are made."""
    ids_BT = torch.full((1, 2), policy.pad_id, dtype=torch.long, device=policy.device)

    def nothing() -> Tensor:
        return policy.logits(policy.hidden(ids_BT, torch.ones_like(ids_BT))).sum() * 0.0

    with together(policy):
        found = within(policy, nothing)
        if found.requires_grad:
            found.backward()


def clipped(policy: Policy, most: float) -> float:
    """Scale the gradient to a norm of at most `most`; its norm before that, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), most)
    return float(gathered(norm).item())


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that ranks share; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# The whole model ------------------------------------------------------------------------------------------------------


def emptied(held: Any) -> Any:
    """A copy of a model without its weights, ties kept; of what its config says there is one."""
    nothing = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=False) for one in held.parameters()
    }
    return copy.deepcopy(held, {**nothing, id(held.config): held.config})


@contextlib.contextmanager
def whole(policy: Policy, where: torch.device | None = None) -> Iterator[Policy]:
    """The policy with all of its weights on this rank, as one process alone has it; they are let go of at the end.

    where  the device that they are gathered to, one after the other: the policy's own, unless said; on `meta` none is kept
    """
    if policy.ranks.single_process:
        yield policy
        return
    for module in policy.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    skeleton, known = policy.plain, dict[int, nn.Parameter]()
    with torch.no_grad():
        for name, one in policy.model.named_parameters(remove_duplicate=False):
            if id(one) not in known:
                known[id(one)] = nn.Parameter(gathered(one).to(where or policy.device), requires_grad=False)
            fsdp_weights.put(skeleton, name, known[id(one)])
    try:
        yield as_one(policy, skeleton)
    finally:
        meta = {
            key: nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=False) for key, one in known.items()
        }
        for name, one in policy.model.named_parameters(remove_duplicate=False):
            fsdp_weights.put(skeleton, name, meta[id(one)])


def as_one(policy: Policy, filled: Any) -> Policy:
    """The policy with another model of its kind, all of whose weights are here."""
    capped = isinstance(policy.head, nn.Identity)
    body, head = (filled, nn.Identity()) if capped else (filled.base_model, filled.get_output_embeddings())
    adapter = None if policy.adapter is None else policy.adapter.within(filled)
    return replace(policy, model=filled, body=body, head=head, ranks=SINGLE_PROCESS, plain=None, adapter=adapter)


def save(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """As `model.save`, by the first rank, which gathers all weights in the machine's memory; all must call it."""
    alone, first = policy.ranks.single_process, policy.ranks.is_main
    with whole(policy, None if alone else torch.device("cpu" if first else "meta")) as held:
        if first:
            model.save(held, folder, dtype)
