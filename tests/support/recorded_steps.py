"""Capture of a step without a GPU: the operations are recorded and run again on the same memory, as a CUDA graph does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Runs operations and records them with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tensors(out)))
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storages(tree: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(tree)}


def capture_by_recording(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A `step_graphs.Capture`. Results are written to where they were first; views and operations in place need no copy."""
    with Recorder() as recorder:
        output = step()

    def replay() -> None:
        for func, args, kwargs, results in recorder.calls:
            again = tensors(func(*args, **kwargs))
            inputs = storages((args, kwargs))
            for result, new in zip(results, again, strict=True):
                if not storages(new) & inputs:
                    result.copy_(new)

    return replay, output
