"""Guards in runs: warnings, stop and resume, worker processes."""

from __future__ import annotations

from pathlib import Path

from forked_study import start
from runs import call, load_json, node, rows, sets, tiny

# In a run -------------------------------------------------------------------------------------------------------------


CUT = ("stages.student_rl.sampling.max_tokens=1", "stages.student_rl.steps=6", "guards.truncation.window=3",
       "stages.student_rl.checkpoint_every=0", "guards.no_variance=off")  # fmt: skip


def test_guard_warns_in_console_file_and_report_by_default(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = tiny("run", out, "--arm", "direct_grpo", changes=CUT)
    assert result.code == 0
    assert (
        "student_rl on all (seed 0): warning truncation: 100 % of the completions reached the token limit" in result.err
    )
    assert result.err.count("warning truncation") == 1
    (row,) = rows(node(out, "direct_grpo", "student_rl") / "warnings.jsonl")
    assert (row["guard"], row["step"], row["figure"], row["bound"], row["window"], row["action"]) == (
        "truncation", 3, 1.0, 0.5, 3, "warn",
    )  # fmt: skip
    (warning,) = load_json(out / "report.json")["warnings"]
    assert warning["guard"] == "truncation" and warning["arms"] == ["direct_grpo"] and warning["seed"] == 0
    assert row["sentence"] == warning["sentence"]
    assert "student_rl, step 3, seed 0 (direct_grpo): truncation" in result.out.replace("\n", " ")
    page = call("report", out)
    assert page.code == 0
    html = (out / "report.html").read_text(encoding="utf-8")
    assert ">Warnings</h2>" in html and "truncation" in html


def test_guard_stop_exits_4_and_resumes_only_after_recipe_change(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop = (*CUT, "guards.truncation.action=stop")
    result = tiny("run", out, "--arm", "direct_grpo", changes=stop)
    assert result.code == 4
    assert (
        "student_rl, step 3 of 6: guard truncation: 100 % of the completions" in result.err
        and "bound 0.5" in result.err
    )
    path = next(out.glob("nodes/student_rl.*"))
    metrics = rows(path / "metrics.jsonl")
    assert len(metrics) == 3 and [file.name for file in (path / "checkpoint").iterdir()] == ["000003"]
    # Run again it does not train on: the same sentence, the same files.
    again = tiny("run", out, "--arm", "direct_grpo", changes=stop)
    assert again.code == 4 and "student_rl, step 3 of 6: guard truncation: 100 % of" in again.err
    assert rows(path / "metrics.jsonl") == metrics and len(rows(path / "warnings.jsonl")) == 1
    # With `warn` it goes on from the checkpoint, to what a run that only warned would have become.
    eased = tiny("run", out, "--arm", "direct_grpo", changes=CUT)
    assert eased.code == 0
    assert rows(path / "metrics.jsonl")[:3] == metrics and len(rows(path / "metrics.jsonl")) == 6


def test_guard_warnings_of_worker_processes_are_shown(tmp_path: Path) -> None:
    changes = [*CUT, "compute.workers=2", "stages.teacher_rl.sampling.max_tokens=1", "stages.teacher_rl.steps=4"]
    words = ("study", "pocket", "--arms", "direct_grpo,opd_only", "--out", tmp_path / "out", *sets(*changes))
    process = start(tmp_path / "process", *words)
    assert process.wait(200) == 0, process.err()
    assert "student_rl on all (seed 0): warning truncation" in process.err()
    assert "teacher_rl on all (seed 0): warning truncation" in process.err()
