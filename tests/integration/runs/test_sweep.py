"""Sweeps of tiny studies: shared nodes, figures, dry run, failures."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from functools import cache
from pathlib import Path

import matplotlib.image
import pytest

from headwater.errors import UserError
from headwater.report.svg import COLOURS
from headwater.runs.sweep import Sweep, lay_out
from runs import call, infos, load_json, sets, temporary, tiny


def pocket(vary: str, values: str | None = None, *changes: str, arms: list[str] | None = None) -> Sweep:
    return lay_out("pocket", vary, None if values is None else values.split(","), arms, None, list(changes))


# Definition of a sweep ---------------------------------------------------------------------------------------------------------


def test_arms_and_seeds_are_checked_before_reading_data() -> None:
    with pytest.raises(UserError, match="no such arm"):
        pocket("labels", "64", arms=["bridges"])
    with pytest.raises(UserError, match="--arms: bridge and bridge are the same"):
        pocket("labels", "64", arms=["bridge", "bridge"])
    result = call("sweep", "pocket", "--vary", "labels", "--seeds", "1,one")
    assert (result.code, result.out) == (2, "") and "--seeds 1,one" in result.err


# Finished sweeps --------------------------------------------------------------------------------------------------------


MIXED = ("--vary", "lambda", "--values", "0,.5", "--arms", "direct_grpo,mixed")


@cache
def swept() -> Path:
    """One finished tiny sweep; tests read it and leave it as it is."""
    out = temporary() / "sweep"
    result = tiny("sweep", out, *MIXED)
    assert result.code == 0, result.err
    return out


def node_names(out: Path) -> set[str]:
    return {path.name for path, _ in infos(out)}


def test_shared_nodes_run_once_and_are_in_both_folders() -> None:
    first, second = swept() / "0", swept() / "0.5"
    shared = node_names(first) & node_names(second)
    assert {name.split(".")[0] for name in shared} == {
        "base_student", "base_teacher", "student_rl", "teacher_rl", "teacher_rollouts", "warmup",
    }  # fmt: skip
    assert {name.split(".")[0] for name in node_names(second) - shared} == {"opd"}
    for name in shared:  # the very same seconds: it did not run again
        assert (first / "nodes" / name / "ledger.jsonl").read_text() == (
            second / "nodes" / name / "ledger.jsonl"
        ).read_text()


def test_sweep_json_agrees_with_reports_of_its_points() -> None:
    sweep = load_json(swept() / "sweep.json")
    assert (sweep["recipe"], sweep["vary"], sweep["values"]) == ("pocket", "lambda", [0.0, 0.5])
    assert (sweep["seeds"], sweep["arms"]) == ([0], ["direct_grpo", "mixed"])
    for point in sweep["points"]:
        report = load_json(swept() / point["report"])
        assert set(point["arms"]) == {"base_student", "base_teacher", "direct_grpo", "mixed"}
        for name, arm in point["arms"].items():
            assert arm == {key: report["arms"][name][key] for key in ("accuracy", "labels", "flops")}
        (pair,) = [
            contrast for contrast in point["contrasts"] if (contrast["a"], contrast["b"]) == ("mixed", "direct_grpo")
        ]
        means = [point["arms"][name]["accuracy"]["sums"]["mean"] for name in ("mixed", "direct_grpo")]
        assert pair["difference"] == pytest.approx(means[0] - means[1], abs=2e-6)
    means = [point["arms"]["mixed"]["accuracy"]["sums"]["mean"] for point in sweep["points"]]
    (mixed,) = [entry for entry in sweep["across"] if entry["arm"] == "mixed"]
    assert (mixed["a"], mixed["b"]) == (0.5, 0.0) and mixed["difference"] == pytest.approx(
        means[1] - means[0], abs=2e-6
    )


def test_csv_has_row_for_each_value_and_arm() -> None:
    rows = list(csv.DictReader((swept() / "sweep.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["lambda"], row["arm"]) for row in rows] == [
        (value, arm) for value in ("0", "0.5") for arm in ("base_student", "base_teacher", "direct_grpo", "mixed")
    ]
    mixed = load_json(swept() / "sweep.json")["points"][1]["arms"]["mixed"]
    assert float(rows[-1]["accuracy"]) == mixed["accuracy"]["sums"]["mean"]
    assert float(rows[-1]["labels"]) == mixed["labels"]["distinct"] and float(rows[-1]["flops"]) == mixed["flops"]


def test_png_shows_line_in_colour_of_each_arm() -> None:
    pixels = matplotlib.image.imread(swept() / "sweep.png")[..., :3].reshape(-1, 3)
    for style in (0, 3):  # direct_grpo and mixed
        colour = COLOURS[style].removeprefix("#")
        wanted = [int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        assert (abs(pixels - wanted).max(axis=1) < 0.01).sum() > 100


def test_repeated_sweep_runs_nothing_and_new_value_runs_only_new_nodes(tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(swept(), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("DONE")}
    result = tiny("sweep", out, "--vary", "lambda", "--values", "0,0.5,1", *MIXED[4:], "--json")
    assert result.code == 0, result.err
    assert load_json(out / "sweep.json") == json.loads(result.out)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {name.split(".")[0] for name in node_names(out / "1") - node_names(out / "0")} == {"opd"}
    assert "opd" not in str([point["failed"] for point in json.loads(result.out)["points"]])
    words = shlex.split(json.loads(result.out)["points"][0]["command"])
    assert words[-1] == str(out / "0")
    assert call(*words[1:]).code == 0  # as a study of its own: the same recipe, the same folder, nothing left to run
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_failed_point_does_not_stop_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    length = "stages.student_rl.sampling.max_tokens"  # nothing is right within one token, so no group carries a signal
    guard = ("guards.no_signal=stop", "guards.patience=2", "stages.student_rl.batch_size=32")
    result = tiny("sweep", out, "--vary", length, "--values", "1,32", "--arms", "direct_grpo", changes=guard)
    assert result.code == 4 and f"1 of 2 points failed: {length} 1" in result.err
    first, second = load_json(out / "sweep.json")["points"]
    assert "student_rl" in first["failed"] and "direct_grpo" not in first["arms"]
    assert second["failed"] is None and second["arms"]["direct_grpo"]["accuracy"]["sums"]
    assert f"{length} 1 failed: " in " ".join(result.out.split())
    assert first["failed"][:40] in (out / "sweep.html").read_text(encoding="utf-8")


def test_all_points_are_checked_before_first_starts(tmp_path: Path) -> None:
    result = tiny("sweep", tmp_path / "out", "--vary", "labels", "--values", "16,65")
    assert (result.code, result.out) == (2, "") and "value 65: labels.budget 65 is more than the 64" in result.err
    (tmp_path / "out" / "16").mkdir(parents=True)
    (tmp_path / "out" / "16" / "mine.txt").write_text("mine")
    result = tiny("sweep", tmp_path / "out", "--vary", "labels", "--values", "32,16")
    assert result.code == 2 and "not empty and holds no run of Headwater" in result.err
    assert not (tmp_path / "out" / "32").exists()


def test_dry_run_counts_shared_nodes_once_and_omits_impossible_budgets(tmp_path: Path) -> None:
    options = ("--vary", "labels", "--arms", "direct_grpo", "--out", tmp_path / "out", "--dry-run")
    result = call("sweep", "pocket", *options, *sets("labels.budget=64"))
    assert (
        result.code == 0 and "value 128" in result.err and "left out" in result.err and not (tmp_path / "out").exists()
    )
    assert [line.split()[0] for line in result.out.splitlines() if line.strip()[:2] in ("16", "32", "64")] == [
        "16",
        "32",
        "64",
    ]
    rows = json.loads(call("sweep", "pocket", *MIXED, "--dry-run", "--json", *sets()).out)
    assert [(row["value"], row["nodes"], row["shared"]) for row in rows] == [(0.0, 7, 0), (0.5, 1, 6)]
