"""One measurement in a process of its own: `python -m benchmarks.child PEER CASE.json OUT.json`.

It loads, does the work once untimed, then `steps` times, and writes seconds, the parts, and the memory that it took.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import CannotRunError, Case

Row = dict[str, float]
Work = Callable[[int], list[Row]]
"""Everything is loaded; called with a number, it does that many repetitions: seconds and counts of each."""


def repeated(step: Callable[[int], Row]) -> Work:
    """Time a function of the repetition's number by the clock around it."""

    def work(times: int) -> list[Row]:
        rows = []
        for number in range(times):
            started = time.perf_counter()
            counted = step(number)
            rows.append({"seconds": time.perf_counter() - started, **counted})
        return rows

    return work


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """The most bytes that this process, or one that it started and waited for, ever had in memory."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def work_of(peer: str, case: Case, root: Path) -> Work:
    if case.kind in ("loss", "loss_gpu"):
        from benchmarks import loss

        return repeated(loss.step_of(peer, case))
    if peer == "headwater":
        from benchmarks import ours

        makers = {"train": ours.train_of, "sampling": ours.sampling_of}
        return repeated(makers.get(case.kind, ours.step_of)(case, root))
    if peer == "trl":
        from benchmarks import trl_peer

        return trl_peer.work_of(case, root)
    from benchmarks import engines

    return repeated(engines.ENGINES[peer](case, root))


def measured(peer: str, case: Case, root: Path) -> dict[str, Any]:
    started = time.perf_counter()
    work = work_of(peer, case, root)
    found: dict[str, Any] = {"seconds_load": time.perf_counter() - started, "loaded_bytes": resident()}
    timed = work(case.repetitions)[case.untimed :]
    found["peak_bytes"] = max(peak(), found["loaded_bytes"])  # the two are counted apart, and not to the page
    for row in timed:
        if case.endless and row.get("tokens_sampled", case.batch * case.new_tokens) != case.batch * case.new_tokens:
            raise AssertionError(f"{row['tokens_sampled']:.0f} tokens came, not {case.batch * case.new_tokens}")
    return found | {key: median(row[key] for row in timed) for key in timed[0]}


def main() -> None:
    peer, told, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3])
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if peer == "limits":
        from benchmarks import limits

        found = limits.measured([case_of(one) for one in told["cases"]], Path(told["root"]))
    else:
        try:
            found = measured(peer, case_of(told["case"]), Path(told["root"]))
        except CannotRunError as error:
            found = {"skipped": str(error)}
    out.write_text(json.dumps(found), encoding="utf-8")


def case_of(told: dict[str, Any]) -> Case:
    """A case as JSON gives it back: lists are tuples again."""
    return Case(
        **told | {"places": tuple((workload, name) for workload, name in told["places"]), "peers": tuple(told["peers"])}
    )


if __name__ == "__main__":
    main()
