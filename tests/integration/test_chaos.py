"""The full fault tests (`make chaos`): every fault point at its first, middle and last arrival; every file damaged in every way;
killed workers. `tests/support/chaos.py` kills at random times, `tests/support/endurance.py` makes long runs."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

import pytest

from chaos import LONG, differing, small, study
from forked_runs import warm_runs
from headwater.report import build as report
from headwater.storage import fault_points
from runs import environment, program
from tests.integration.test_faults import (
    FILES,
    KILLED,
    NOT_REACHED,
    REFUSED,
    WRITES,
    check_damaged_files,
    check_refused_file,
    go,
    one_sentence,
    undisturbed,
    whole,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]


def arrivals(name: str) -> list[int]:
    count = undisturbed()[1].get(name, 0)
    return sorted({min(1, count), (count + 1) // 2, count} - {0})


@pytest.mark.parametrize("name", sorted(set(fault_points.POINTS) - NOT_REACHED))
def test_run_killed_at_first_middle_and_last_arrival_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    assert arrivals(name)
    for count in arrivals(name):
        out = tmp_path / str(count)
        assert go(out, f"{name}:{count}=kill").code == KILLED
        assert go(out).code == 0
        assert differing(out, whole()) == [], count


@pytest.mark.parametrize("name", sorted(WRITES - {"folder.moved"}))
def test_full_disk_at_first_middle_and_last_write_exits_4_and_resumes(name: str, tmp_path: Path) -> None:
    for count in arrivals(name):
        out = tmp_path / str(count)
        result = go(out, f"{name}:{count}=full")
        assert result.code == 4 and "no space left on device" in one_sentence(result)
        assert go(out).code == 0
        assert differing(out, whole()) == [], count


MAY_BE_MISSING = {"opd/DONE", "base_student/DONE", "plan.json", "recipe.json"}
"""Files whose absence is not damage: a node without DONE was interrupted, a folder without a plan has just been started."""


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in FILES for how in ("cut", "removed") if how == "cut" or name not in MAY_BE_MISSING],
)
def test_truncated_or_removed_file_is_detected(name: str, how: str, tmp_path: Path) -> None:
    if FILES[name] == REFUSED:
        check_refused_file(name, how, tmp_path)
    else:
        check_damaged_files([name], how, tmp_path)


def test_run_killed_repeatedly_at_random_fault_points_resumes_bit_for_bit(tmp_path: Path) -> None:
    draw, names = random.Random(0), sorted(undisturbed()[1])
    kills = runs = 0
    while kills < 30:  # a run that finishes before its fault is compared, and the next one starts
        result = go(tmp_path / str(runs), f"{draw.choice(names)}:{draw.randint(1, 4)}=kill")
        if result.code == KILLED:
            kills += 1
        else:
            assert result.code == 0 and differing(tmp_path / str(runs), whole()) == []
            runs += 1
    assert go(tmp_path / str(runs)).code == 0
    assert differing(tmp_path / str(runs), whole()) == []


def test_study_with_workers_killed_at_random_times_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Real processes: after the parent is killed, its workers end before another process may take over their nodes."""
    alone, out, draw = tmp_path / "alone", tmp_path / "out", random.Random(1)
    assert warm_runs().run(*study(alone, "0")).code == 0
    options = ["--arms", "direct_grpo,raw_teacher,bridge,bridge_rl,replay", "--seeds", "0", "--workers", "2"]
    command = [*program(*small(out, *LONG, verb="study")), *options]
    kills = 0
    for _ in range(8):
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=draw.uniform(15, 40))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == KILLED
    assert subprocess.run(command, env=environment(), capture_output=True, timeout=900).returncode == 0 and kills
    report.write(alone)  # a forked run draws no page and no figures
    # Preflight ran only in `out`; the recipe on disk holds the number of workers; the page and two figures hold times.
    with_times = {f"figures/{name}.{kind}" for name in ("seconds", "timeline") for kind in ("csv", "svg")}
    assert set(differing(out, alone)) <= {"recipe.json", "report.html", "env.json", "preflight.json"} | with_times
