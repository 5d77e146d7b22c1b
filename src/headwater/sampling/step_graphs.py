"""CUDA graphs for decode steps: one graph launch instead of hundreds of kernel launches.

A graph replays fixed operations on fixed memory, so a step must read and write only tensors that stay where they are, and a graph
is valid for one number of rows and of columns. Both are rounded up, so that few graphs serve all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Step = Callable[[Tensor, int], Tensor]
"""(tokens (R,), columns that attention reads) -> hidden (R, H). Running it twice must equal running it once."""
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""step -> (replay, output): `replay` runs the step's operations again on the same memory and so renews `output`."""

ROW_CHOICES = 8
"""Numbers of rows that graphs exist for, at most; the rows added to reach the next one cost up to 1/ROW_CHOICES of a step."""
COLUMN_MULTIPLE = 128
"""Columns are rounded up to a multiple of this."""


def cuda_capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture a step on the current CUDA device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces on first use, which a capture does not allow
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output


class StepGraphs:
    """Graphs of one decoder's steps, captured when first needed; the step itself where a capture fails.

    max_rows  rows of a batch at most
    """

    def __init__(self, step: Step, max_rows: int, device: torch.device, capture: Capture = cuda_capture) -> None:
        self.step, self.max_rows, self.capture = step, max_rows, capture
        self.token_S = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.graphs: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}
        self.works = True

    def padded_rows(self, rows: int) -> int:
        """Rows that a step for this many rows is run with."""
        if not self.works:
            return rows
        multiple = max(1, self.max_rows // ROW_CHOICES)
        return min(self.max_rows, -(-rows // multiple) * multiple)

    def run(self, token_A: Tensor, columns: int, max_columns: int) -> Tensor:
        """Hidden (A, H) of one step, to be used before the next; the decoder has `padded_rows(A)` rows.

        columns      that attention has to read
        max_columns  that are allocated
        """
        if not self.works:
            return self.step(token_A, columns)
        rows = self.padded_rows(len(token_A))
        columns = min(max_columns, -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE)
        self.token_S[: len(token_A)] = token_A
        if (rows, columns) not in self.graphs:
            try:
                self.graphs[rows, columns] = self.capture(partial(self.step, self.token_S[:rows], columns))
            except RuntimeError:  # an operation that cannot be captured, or no memory for a graph
                self.works = False
                self.clear()
                return self.step(self.token_S[:rows], columns)[: len(token_A)]
        replay, output_RH = self.graphs[rows, columns]
        replay()
        return output_RH[: len(token_A)]

    def clear(self) -> None:
        """Forget all graphs: the memory that they use has been replaced."""
        self.graphs.clear()
