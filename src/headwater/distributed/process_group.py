"""The processes that run one node together, and the few words that they exchange. One process alone says and waits for nothing.

Every rank runs the same program on its share of the rows; what decides how it goes on is made equal here first. Tensors travel by
FSDP2's own collectives (`sharded`); these words travel by gloo, also where the models are on GPUs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from headwater.errors import LostProcessError

T = TypeVar("T")

PATIENCE = timedelta(hours=1)
"""How long a rank waits for another that is alive and silent; one that is gone shows itself at once."""
SETTLING = timedelta(seconds=20)
"""How long a rank that failed waits to hear that the others failed as well; they may be waiting for it."""
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Timed out waiting",
        "Application timeout", "Socket Timeout", "NCCL communicator was aborted", "remote process exited")  # fmt: skip
"""What the libraries say when another process does not answer any more."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that run a node together.

    mesh   the devices over which weights are sharded (FSDP2)
    group  the processes to exchange words with
    store  what the launcher keeps for all of them: it answers also while others wait for this rank

    Example: `Ranks()` is one process alone: `shard(rows)` is all of them, `all_gather(x)` is [x].
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    group: Any = None
    store: Any = None

    @property
    def single_process(self) -> bool:
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes the run's folder and talks to the user."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of what all have: consecutive, alike in number. Example: rank 1 of 2 has (c, d) of (a, b, c, d)."""
        count = len(items)
        return items[count * self.rank // self.size : count * (self.rank + 1) // self.size]

    def all_gather(self, value: T) -> list[T]:
        """What every rank has, in their order, on every rank."""
        if self.single_process:
            return [value]
        held: list[Any] = [None] * self.size
        with detect_lost_process():
            dist.all_gather_object(held, value, group=self.group)
        return held

    def gather(self, value: T) -> list[T]:
        """As `all_gather`, on the first rank; nothing on the others. For what is large."""
        if self.single_process:
            return [value]
        held: list[Any] | None = [None] * self.size if self.is_main else None
        with detect_lost_process():
            dist.gather_object(value, held, dst=0, group=self.group)
        return held or []

    def broadcast(self, value: T) -> T:
        """What the first rank has, on every rank."""
        if self.single_process:
            return value
        held: list[Any] = [value]
        with detect_lost_process():
            dist.broadcast_object_list(held, src=0, group=self.group)
        found: T = held[0]
        return found

    def all_reduce_sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Named numbers added up over ranks, in their order: the same to the bit on every rank. What a rank lacks is 0."""
        found: dict[str, float] = {}
        for one in self.all_gather(dict(values)):
            for name, value in one.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        if self.single_process:
            return flag
        held = torch.tensor([int(flag)])
        with detect_lost_process():
            dist.all_reduce(held, dist.ReduceOp.MAX, group=self.group)
        return bool(held.item())

    def lockstep(self, items: Iterable[T]) -> Iterator[T | None]:
        """The items, then None while other ranks still have some: so all of them take part in as many passes."""
        if self.single_process:
            yield from items
            return
        rest = iter(items)
        while True:
            one = next(rest, None)
            if not self.any(one is not None):
                return
            yield one

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def duplicate(self) -> ProcessGroup:
        """The same processes with words of their own, for a thread that speaks while another one does."""
        return self if self.single_process else replace(self, group=dist.new_group(backend="gloo", timeout=PATIENCE))

    def same_outcome(self, what: str, failed: bool) -> bool:
        """Whether every rank came to the end of `what`, and all of them failed or none. One that failed does not wait long."""
        if self.single_process:
            return True
        keys = [f"{what}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], str(failed))
        try:
            self.store.wait(keys, SETTLING if failed else PATIENCE)
            if all(self.store.get(key).decode() == str(failed) for key in keys):
                return True
        except RuntimeError:  # such as torch's DistStoreError
            pass
        with contextlib.suppress(RuntimeError):
            self.store.set(APART, "")
        return False

    def diverged(self) -> bool:
        """Whether some rank has left the common way, so that no word of this one would be understood."""
        return not self.single_process and bool(self.store.check([APART]))


SINGLE_PROCESS = ProcessGroup()
APART = "apart"


def init_process_group() -> ProcessGroup:
    """Meet the other processes that the launcher started. On GPUs each takes the one of its local rank."""
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    with detect_lost_process():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore("headwater", store),
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
        mesh = init_device_mesh("cuda" if cuda else "cpu", (size,))
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return ProcessGroup(rank, size, mesh, group, dist.PrefixStore("settled", store))


def is_lost_process(error: BaseException) -> bool:
    """Whether an exception says that another process does not answer any more."""
    return isinstance(error, LostProcessError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in GONE)
    )


@contextlib.contextmanager
def detect_lost_process() -> Iterator[None]:
    """Raises LostProcessError where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise LostProcessError from None
