"""The section about time: seconds by part, and the timeline of recorded attempts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fake_runs import ARMS, fake_run, names, write_rows
from headwater.report import html_time
from headwater.report.study import costs, read_study


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return fake_run(tmp_path / "out", seeds=(0, 1), arms={name: ARMS[name] for name in ("direct_grpo", "bridge")})


def test_seconds_of_parts_are_those_of_metrics_and_ledger(out: Path) -> None:
    nodes = [node for run in read_study([out]).arms["bridge"].values() for node in run]
    ledger = out / "nodes" / names(out, "bridge")[-1] / "ledger.jsonl"
    rows = [json.loads(row) for row in ledger.read_text().splitlines()]
    write_rows(ledger, [{**row, "seconds": 0.75} if row["purpose"] in ("eval", "measure") else row for row in rows])
    stages = html_time.seconds_by_stage(nodes)
    # Two seeds of 12 steps of 0.5 s, of which sampling and the update take 0.2 s each; a cache takes 3.25 s.
    assert list(stages) == ["teacher_rollouts", "teacher_rl", "warmup", "opd"]
    assert {part: seconds for part, seconds in stages["teacher_rollouts"].items() if seconds} == {"sample": 6.5}
    parts = {
        "sample": 4.8,
        "score": 0.0,
        "update": 4.8,
        "other training": 2.4,
        "evaluate": 0.0,
        "measure": 0.0,
        "load and save": 0.0,
    }
    assert stages["teacher_rl"] == pytest.approx(parts)
    # Of one of the two seeds: an evaluation and four measurements of the conditions, at the steps 0, 5, 10 and 12.
    assert stages["opd"] == pytest.approx({**parts, "evaluate": 0.75, "measure": 3.0})


def test_parts_sum_to_recorded_attempts_of_timeline(out: Path) -> None:
    name = names(out, "direct_grpo")[-1]
    (out / "attempts").mkdir()
    (out / "attempts" / f"{name}.json").write_text(json.dumps([{"worker": "w", "started": 10.0, "ended": 40.0}]))
    study = read_study([out])
    (node,) = [node for node in study.arms["direct_grpo"][0] if node.name == name]
    seconds = html_time.node_seconds(node)
    assert sum(seconds.values()) == pytest.approx(30.0) and seconds["load and save"] > 0.0
    # The rest is the training time that the headline and the table of arms give.
    training = sum(seconds[part] for part in html_time.TRAINING_PARTS)
    assert training == pytest.approx(costs([node])["seconds"])


def test_timeline_has_bar_for_each_recorded_attempt(out: Path) -> None:
    first, second = names(out, "direct_grpo", 0)[-1], names(out, "direct_grpo", 1)[-1]
    study = read_study([out])
    section = html_time.time(study)
    assert section is not None and [plot.name for plot in section.plots] == ["seconds"]  # nothing was recorded
    (out / "attempts").mkdir()
    rows = {first: [("a", 1000.0, 1010.0), ("b", 1100.0, 1130.0)], second: [("b", 1000.5, 1090.0)]}
    for name, attempts in rows.items():
        text = json.dumps([dict(zip(("worker", "started", "ended"), attempt, strict=True)) for attempt in attempts])
        (out / "attempts" / f"{name}.json").write_text(text)
    section = html_time.time(read_study([out]))
    assert section is not None
    plot = section.plots[1]
    assert plot.rows[1:] == (
        (first, "a", "0.000", "10.000"), (second, "b", "0.500", "90.000"), (first, "b", "100.000", "130.000")
    )  # fmt: skip
    assert f"{second} from 0 s to 90 s on b" in plot.description and ">Student RL<" in plot.svg
