"""Run one measurement in its own process: `python -m benchmarks.child PEER CASE.json OUT.json`.

It loads, runs the work once without timing, then `steps` times, and writes the seconds, their parts, and the peak memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import CannotRunError, Case, Figures, Step, Work


def repeated(step: Step) -> Work:
    """Work that measures the wall-clock time of each step."""

    def work(times: int) -> list[Figures]:
        rows = []
        for number in range(times):
            started = time.perf_counter()
            counted = step(number)
            rows.append({"seconds": time.perf_counter() - started, **counted})
        return rows

    return work


def resident() -> int:
    """Current resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Peak resident bytes of this process or of a child that it waited for."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def work_of(peer: str, case: Case, root: Path) -> Work:
    if case.kind in ("loss", "loss_gpu"):
        from benchmarks import loss

        return repeated(loss.step_of(peer, case))
    if case.kind == "pair":
        from benchmarks import real_pair

        return real_pair.work_of(peer, case)
    if peer == "headwater":
        from benchmarks import ours

        makers = {"train": ours.train_of, "sampling": ours.sampling_of}
        return repeated(makers.get(case.kind, ours.step_of)(case, root))
    if peer == "trl":
        from benchmarks import trl_peer

        return trl_peer.work_of(case, root)
    from benchmarks import engines

    return repeated(engines.ENGINES[peer](case, root))


def measure(peer: str, case: Case, root: Path) -> dict[str, Any]:
    started = time.perf_counter()
    work = work_of(peer, case, root)
    result: dict[str, Any] = {"seconds_load": time.perf_counter() - started, "loaded_bytes": resident()}
    import torch

    timed = work(case.repetitions)[case.untimed :]
    if case.device == "cuda":
        result["gpu_bytes"] = torch.cuda.max_memory_allocated()
    result["peak_bytes"] = max(peak(), result["loaded_bytes"])  # the kernel counts the two separately, not to the page
    for row in timed:
        if case.endless and row.get("tokens_sampled", case.batch * case.new_tokens) != case.batch * case.new_tokens:
            raise AssertionError(f"{row['tokens_sampled']:.0f} tokens sampled, expected {case.batch * case.new_tokens}")
    if case.kind == "pair":
        result |= work.held_out()  # type: ignore[attr-defined]
    return result | {key: median(row[key] for row in timed) for key in timed[0]}


def main() -> None:
    peer, request, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3])
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if peer == "limits":
        from benchmarks import limits

        result = limits.measure([case_of(fields) for fields in request["cases"]], Path(request["root"]))
    else:
        try:
            result = measure(peer, case_of(request["case"]), Path(request["root"]))
        except CannotRunError as error:
            result = {"skipped": str(error)}
    out.write_text(json.dumps(result), encoding="utf-8")


def case_of(fields: dict[str, Any]) -> Case:
    """Rebuild a case from JSON, with tuples for lists."""
    return Case(
        **fields
        | {"places": tuple((workload, name) for workload, name in fields["places"]), "peers": tuple(fields["peers"])}
    )


if __name__ == "__main__":
    main()
