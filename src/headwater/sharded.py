"""A policy whose weights several ranks hold a part each of (FSDP2), and what must be done otherwise for that.

Passes: all ranks enter each layer together, so a rank with fewer microbatches makes idle passes (`turns`, `idle`), and whatever
reads the head does so `within` the root's forward, while its weights are gathered. Gradients are added over ranks, not averaged: the
denominator is the whole step's and known to every rank (`train.token_weights`).

Sampling: each rank holds all weights once while it samples its share of the requests (`whole`, `Split`): decoding needs them for
every token, and draws are named, so no split changes one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from headwater import config, model
from headwater.data import Rollout
from headwater.errors import TrainingStoppedError, UserError
from headwater.memory import out_of_memory
from headwater.model import Policy
from headwater.ranks import ALONE, Ranks
from headwater.sampler import Arrived, Request, Sampler

T = TypeVar("T")


def shard(policy: Policy, ranks: Ranks, field: str) -> Policy:
    """The same policy with each rank holding a part of every layer; as it was for one process alone.

    A frozen policy's head stays whole on every rank: its logits are made beside the student's, outside of its own passes.
    Raises UserError that names the field for a model that cannot be divided so.
    """
    if ranks.alone:
        return policy
    held, trained = policy.model, {one.requires_grad for one in policy.model.parameters()}
    if len(trained) > 1:
        raise UserError(f"{field}: an adapter on frozen weights is trained by one process only; leave torchrun out")
    if policy.body is held:
        raise UserError(
            f"{field}: {policy.where} does more to its logits than its head does, so it runs on one process only"
        )
    skeleton = emptied(held)
    kept = set(policy.head.parameters()) if trained == {False} and isinstance(policy.head, nn.Module) else set()
    blocks = set(getattr(held, "_no_split_modules", None) or ())
    # A bound method that runs what it is given: between the root's hooks, once it is registered as a forward method.
    held.within = _run
    for module in [one for one in policy.body.modules() if type(one).__name__ in blocks]:
        fully_shard(module, mesh=ranks.mesh)
    fully_shard(held, mesh=ranks.mesh, ignored_params=kept)
    register_fsdp_forward_method(held, "within")
    for module in held.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return replace(policy, ranks=ranks, plain=skeleton)


def _run(attempt: Callable[[], T]) -> T:
    return attempt()


def within(policy: Policy, attempt: Callable[[], T]) -> T:
    """`attempt()`, with the weights that stand outside of layers (embedding, last norm, head) in reach.

    Raises TrainingStoppedError where memory runs out on a rank: the others are in the same pass, so it cannot be made again.
    """
    if policy.ranks.alone:
        return attempt()
    with together(policy):
        found: T = policy.model.within(attempt)
        if not torch.is_grad_enabled():
            policy.model.reshard()
    return found


@contextlib.contextmanager
def together(policy: Policy) -> Iterator[None]:
    """Passes that no rank can make again alone. Raises TrainingStoppedError where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if policy.ranks.alone or not out_of_memory(error):
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
    """A copy of a model without its weights, ties kept."""
    nothing = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=False) for one in held.parameters()
    }
    return copy.deepcopy(held, dict(nothing))


@contextlib.contextmanager
def whole(policy: Policy) -> Iterator[Policy]:
    """The policy with all of its weights on this rank, as one process alone has it; they are let go of at the end."""
    if policy.ranks.alone:
        yield policy
        return
    for module in policy.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    skeleton, known = policy.plain, dict[int, nn.Parameter]()
    with torch.no_grad():
        for name, one in policy.model.named_parameters(remove_duplicate=False):
            if id(one) not in known:
                known[id(one)] = nn.Parameter(gathered(one), requires_grad=False)
            _put(skeleton, name, known[id(one)])
    try:
        body, head = skeleton.base_model, skeleton.get_output_embeddings()
        yield replace(policy, model=skeleton, body=body, head=head, ranks=ALONE, plain=None)
    finally:
        meta = {
            key: nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=False) for key, one in known.items()
        }
        for name, one in policy.model.named_parameters(remove_duplicate=False):
            _put(skeleton, name, meta[id(one)])


def _put(held: nn.Module, name: str, value: nn.Parameter) -> None:
    where, _, last = name.rpartition(".")
    setattr(held.get_submodule(where), last, value)


def save(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """As `model.save`, by the first rank; all must call it."""
    with whole(policy) as held:
        if policy.ranks.first:
            model.save(held, folder, dtype)


@dataclass(frozen=True)
class Split:
    """A sampler of which each rank samples its share of the requests; every rank is then handed all rollouts, in their order.

    make  the sampler of one rank, from the whole policy
    """

    policy: Policy
    make: Callable[[Policy], Sampler]

    def sample(
        self, requests: Sequence[Request], sampling: config.Sampling, arrived: Arrived | None = None
    ) -> list[Rollout]:
        ranks = self.policy.ranks
        with whole(self.policy) as held:
            found = self.make(held).sample(ranks.share(requests), sampling)
        every = [one for part in ranks.gathered(found) for one in part]
        if arrived is not None:
            arrived(every)
        return every
