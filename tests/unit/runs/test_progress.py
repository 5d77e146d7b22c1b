"""Lines of the progress display: metrics in words, and the lines of a log file."""

from __future__ import annotations

import re

import pytest

from headwater.runs import progress
from headwater.runs.progress import Log, metrics_text, progress_display


def test_metrics_text_shows_reward_rather_than_loss() -> None:
    step = {"loss": -0.0003, "reward": 0.875, "informative": 0.25, "grad_norm": 1.23456}
    assert metrics_text(step) == "reward 0.875  informative groups 25 %  gradient norm 1.23"


def test_metrics_text_shows_distance_to_teacher_without_rewards() -> None:
    step = {"loss": 0.2, "kl_student_teacher": 0.12345, "grad_norm": 3.0}
    assert metrics_text(step) == "KL(student‖teacher) 0.123  loss 0.2"
    assert metrics_text({"loss": 2.5, "grad_norm": 1.0}) == "loss 2.5"
    assert metrics_text({"tokens": 3.0}) == ""


def test_log_writes_line_every_minute_with_time_left() -> None:
    log = Log("[2/6] opd (seed 0)", began=100.0)
    log.start(20, 80, "steps", now=100.0)  # resumed after step 20
    assert log.advance(1, "loss 1", now=159.0) is None
    line = log.advance(9, "loss 0.5", now=160.0)
    # 10 steps took 60 s, so the other 50 take 300 s.
    assert line == "[2/6] opd (seed 0): 30 of 80 steps, about 5 min left  loss 0.5"
    assert log.advance(1, "", now=219.0) is None
    assert log.advance(49, "", now=400.0) is None  # the node's last line follows


def test_log_lines_begin_with_time_of_day(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    display = progress_display()
    with display.task("checking") as tell:
        tell("files", "recipe")
        tell("files", "prompts")
        tell("weights", "log-probs")
    with display.node("warmup (seed 0)", 3, 6) as node:
        node.start(0, 2, "steps")
        node.advance(1, {"loss": 0.5})
        node.advance(1, {"loss": 0.25})
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    texts = [re.sub(r"\d+\.\d s", "T", line[9:]) for line in lines]
    assert texts == [
        "checking …",
        "checking: files …",
        "checking: weights …",
        "checking: done in T",
        "[3/6] warmup (seed 0): 1 of 2 steps, about 0 s left  loss 0.5",
        "[3/6] warmup (seed 0): T  loss 0.25",
    ]


def test_log_of_parts_has_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_display(log_parts=True).task("checking") as tell:
        tell("files", "recipe")
        tell("files", "prompts")
    lines = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert lines[:-1] == ["checking …", "checking: files …", "checking: recipe", "checking: prompts"]


def test_log_counts_time_of_evaluation_from_its_start() -> None:
    log = Log("[2/6] opd (seed 0)", began=0.0)
    log.start(0, 80, "steps", now=0.0)
    log.start(0, 40, "completions", now=1000.0)
    # 10 completions took 100 s, so the other 30 take 300 s, however long the steps took.
    assert log.advance(10, "", now=1100.0) == "[2/6] opd (seed 0): 10 of 40 completions, about 5 min left"


def test_metrics_of_evaluation_show_accuracy_of_each_set() -> None:
    assert (
        metrics_text({"accuracy held_out": 0.25, "accuracy hard": 0.0}) == "accuracy held_out 25 %  accuracy hard 0 %"
    )


def test_log_gives_no_time_left_before_first_result() -> None:
    log = Log("[1/6] base_student (seed 0)", began=0.0)
    log.start(0, 10, "completions", now=0.0)
    assert log.advance(0, "", now=90.0) == "[1/6] base_student (seed 0): 0 of 10 completions"
    log.start(0, 200, "completions", now=100.0)  # sampled in batches: most end long after the first
    assert log.advance(1, "", now=160.0) == "[1/6] base_student (seed 0): 1 of 200 completions"
    assert log.advance(49, "", now=220.0) == "[1/6] base_student (seed 0): 50 of 200 completions, about 6 min left"


def test_warning_is_shown_once_for_all_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    display = progress_display()
    for seed, share in ((0, "62%"), (1, "70%")):
        with display.node(f"opd (seed {seed})", seed + 1, 2) as progress:
            progress.warn(
                f"truncation: {share} of the completions reached the limit: raise stages.opd.sampling.max_tokens"
            )
            progress.warn("sampler_gap: 0.1 nats")
    shown = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert shown == [
        "[1/2] opd (seed 0): warning truncation: 62% of the completions reached the limit: raise stages.opd.sampling.max_tokens",
        "[1/2] opd (seed 0): warning sampler_gap: 0.1 nats",
    ]
