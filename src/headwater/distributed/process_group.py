"""Process group of the ranks that train one node together, with object collectives; no-ops for a single process.

Every rank runs the same program on its shard of the rows; control-flow decisions are synchronized here.
Tensors travel by FSDP2's own collectives (`models.fsdp`); these objects travel by gloo, even where the models are on GPUs.
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
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from headwater.errors import LostProcessError

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)
"""Longest wait for a rank that is alive but silent; a rank that has died is noticed at once."""
FAILURE_TIMEOUT = timedelta(seconds=20)
"""How long a failed rank waits to hear that the others failed too; they may be blocked waiting for it."""
LOST_PROCESS_MESSAGES = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Timed out waiting",
    "Application timeout", "Socket Timeout", "NCCL communicator was aborted", "remote process exited",
)  # fmt: skip
"""Parts of the libraries' error messages when another process no longer answers."""
DIVERGED = "diverged"
"""Store key that a rank sets once the ranks' outcomes differ."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among the ranks that run a node together.

    mesh   devices over which weights are sharded (FSDP2)
    group  gloo group for the object collectives
    store  the launcher's key-value store, which answers even while other ranks wait for this one

    Example: `ProcessGroup()` is a single process: `shard(rows)` is all of them, `all_gather(x)` is [x].
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
        """Whether this is rank 0, which writes the run directory and prints progress."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's consecutive share of the items. Example: rank 1 of 2 has (c, d) of (a, b, c, d)."""
        count = len(items)
        return items[count * self.rank // self.size : count * (self.rank + 1) // self.size]

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        if self.single_process:
            return [value]
        values: list[Any] = [None] * self.size
        with detect_lost_process():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, value: T) -> list[T]:
        """As `all_gather`, on rank 0 only; an empty list on the others. For large values."""
        if self.single_process:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        with detect_lost_process():
            dist.gather_object(value, values, dst=0, group=self.group)
        return values or []

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.single_process:
            return value
        values: list[T] = [value]
        with detect_lost_process():
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def exchange(self, parts: Sequence[T]) -> list[T]:
        """Send `parts[r]` to each rank r. Returns what the ranks sent to this one, in rank order. For large values."""
        received = [parts[self.rank]] * self.size
        sent = [None if rank == self.rank else part for rank, part in enumerate(parts)]
        for source in range(self.size) if not self.single_process else ():
            values: list[Any] = [None]
            with detect_lost_process():
                dist.scatter_object_list(values, sent if source == self.rank else None, src=source, group=self.group)
            if source != self.rank:
                received[source] = values[0]
        return received

    def all_reduce_sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum named numbers over ranks, in rank order, so that every rank gets the same bits. A missing name counts as 0."""
        sums: dict[str, float] = {}
        for rank_values in self.all_gather(dict(values)):
            for name, value in rank_values.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.single_process:
            return flag
        flags = torch.tensor([int(flag)])
        with detect_lost_process():
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return bool(flags.item())

    def lockstep(self, items: Iterable[T]) -> Iterator[T | None]:
        """Yield the items, then None while other ranks have some left: every rank iterates equally often."""
        if self.single_process:
            yield from items
            return
        remaining = iter(items)
        while True:
            item = next(remaining, None)
            if not self.any(item is not None):
                return
            yield item

    def barrier(self) -> None:
        """Wait for every rank."""
        self.any(False)

    def duplicate(self) -> ProcessGroup:
        """The same ranks with a gloo group of their own, for a thread that communicates while another one does."""
        return self if self.single_process else replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    def same_outcome(self, name: str, failed: bool) -> bool:
        """Whether every rank finished `name`, and either all failed or none did. A failed rank waits only briefly."""
        if self.single_process:
            return True
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], str(failed))
        try:
            self.store.wait(keys, FAILURE_TIMEOUT if failed else TIMEOUT)
            if all(self.store.get(key).decode() == str(failed) for key in keys):
                return True
        except RuntimeError:  # such as torch's DistStoreError
            pass
        with contextlib.suppress(RuntimeError):
            self.store.set(DIVERGED, "")
        return False

    def diverged(self) -> bool:
        """Whether the outcomes of some node differed, so that collectives of the ranks no longer match."""
        return not self.single_process and bool(self.store.check([DIVERGED]))


SINGLE_PROCESS = ProcessGroup()


def init_process_group() -> ProcessGroup:
    """Join the ranks that the launcher (torchrun) started. With GPUs, each rank uses the GPU of its local rank."""
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    with detect_lost_process():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore("headwater", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
        mesh = init_device_mesh("cuda" if cuda else "cpu", (size,))
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return ProcessGroup(rank, size, mesh, group, dist.PrefixStore("outcomes", store))


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks, which must all call it; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, in the same memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_lost_process(error: BaseException) -> bool:
    """Whether an exception means that another process no longer answers."""
    return isinstance(error, LostProcessError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in LOST_PROCESS_MESSAGES)
    )


@contextlib.contextmanager
def detect_lost_process() -> Iterator[None]:
    """Raise LostProcessError instead of the library's error if another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise LostProcessError from None
