"""Long runs: memory, open files, and the time to resume a large study.

python tests/support/endurance.py --steps 4000 --nodes 200
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

from chaos import small
from forked_runs import ForkedRuns, ProcessResult
from headwater.storage.run_dir import RunDir

ARMS = "direct_grpo,raw_teacher,bridge,bridge_rl,replay,opd_only,warmup_only"


def long_stage(processes: ForkedRuns, out: Path, steps: int) -> ProcessResult:
    """Run a GRPO stage of so many steps with a checkpoint every 20."""
    changes = (
        f"stages.student_rl.steps={steps}",
        "stages.student_rl.checkpoint_every=20",
        "stages.student_rl.eval_every=0",
    )
    return processes.run(*small(out, *changes), "--arm", "direct_grpo", patience=3600)


def growth(result: ProcessResult, warm: float = 0.25) -> tuple[float, int]:
    """(relative growth of memory between the end of the warm-up and the end of the run, growth of open files)."""
    usage = [sample for sample in result.usage if sample[1]]
    first = usage[int(warm * len(usage)) :]
    part = max(1, len(first) // 5)
    memory = [[bytes_ for _, bytes_, _ in some] for some in (first[:part], first[-part:])]
    files = [[count for _, _, count in some] for some in (first[:part], first[-part:])]
    return median(memory[1]) / median(memory[0]) - 1.0, min(files[1]) - min(files[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--nodes", type=int, default=200)
    args = parser.parse_args()
    processes, folder = ForkedRuns(), Path(tempfile.mkdtemp(prefix="headwater-endurance-"))
    try:
        sys.exit(0 if endure(processes, folder, args.steps) and resume(processes, folder, args.nodes) else 1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def endure(processes: ForkedRuns, folder: Path, steps: int) -> bool:
    result = long_stage(processes, folder / "long", steps)
    assert result.code == 0, result.err
    grown, files = growth(result)
    peak = max(bytes_ for _, bytes_, _ in result.usage) / 2**20
    print(
        f"{steps} steps in {result.seconds:.0f} s: memory {peak:.0f} MiB at most, grew {grown:+.2%}; open files {files:+d}"
    )
    for share in (0.1, 0.25, 0.5, 0.75, 0.99):
        seconds, bytes_, count = result.usage[int(share * len(result.usage))]
        print(f"  after {seconds:5.0f} s: {bytes_ / 2**20:.1f} MiB, {count} open files")
    return grown < 0.02 and files <= 0


def resume(processes: ForkedRuns, folder: Path, nodes: int) -> bool:
    out, seeds = folder / "study", max(1, nodes // 15)
    argv = [*small(out, verb="study"), "--arms", ARMS, "--seeds", ",".join(map(str, range(seeds)))]
    result = processes.run(*argv, patience=3600)
    assert result.code == 0, result.err
    count = len(RunDir(out).nodes())
    again = processes.run(*argv, patience=3600)
    assert again.code == 0 and not again.arrivals.get("node.begun"), again.err
    last = RunDir(out).nodes()[-1]
    last.done.unlink()
    third = processes.run(*argv, patience=3600)
    assert third.code == 0 and third.arrivals["node.begun"] == 1, third.err
    print(
        f"{count} nodes in {result.seconds:.0f} s; all done, again: {again.seconds:.1f} s; one to finish: {third.seconds:.1f} s"
    )
    return again.seconds < 30 and count >= nodes


if __name__ == "__main__":
    main()
