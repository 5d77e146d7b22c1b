"""Command line: verbs, options, JSON output, dry run, report, evaluation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from forked_runs import warm_runs
from headwater.config.arms import ARMS, DEFAULT_STUDY
from headwater.report.html import Page
from runs import all_arms, call, load_json, node, node_names, rows, sets, spawn, tiny

VERBS = ("init", "run", "study", "demo", "eval", "grade", "validate", "report")


def strict(text: str) -> object:
    """JSON as every reader takes it: no NaN, no Infinity."""

    def refuse(name: str) -> object:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_help_lists_every_verb_with_its_description() -> None:
    listed = call("--help").out
    for verb in VERBS:
        assert f" {verb} " in listed
        shown = call(verb, "--help")
        assert shown.code == 0 and f"headwater {verb} " in shown.out


def test_run_in_process_prints_table_and_report_path(tmp_path: Path) -> None:
    done = spawn("run", "pocket", "--arm", "raw_teacher", "--out", "mine", *sets(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "base_student" in done.stdout and "raw_teacher" in done.stdout
    assert done.stdout.strip().endswith("report: mine/report.html")
    lines = [line.split(" ", 1)[1] for line in done.stderr.splitlines() if " " in line]  # without the time of day
    progress = [line for line in lines if line.startswith("[")]
    assert [line.split(":")[0] for line in progress] == [
        "[1/5] base_student (seed 0)",
        "[2/5] base_teacher (seed 0)",
        "[3/5] teacher_rollouts on all (seed 0)",
        "[4/5] warmup on all (seed 0)",
        "[5/5] opd on all (seed 0)",
    ]
    assert all("accuracy sums " in line for line in progress if "rollouts" not in line)  # the base models' too
    assert "\n\n" not in done.stderr and "Warning" not in done.stderr  # a log without holes and without others' noise
    page = (tmp_path / "mine/report.html").read_text(encoding="utf-8")
    assert "raw_teacher" in page and "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page  # self-contained


def test_json_option_prints_only_report_to_stdout(tmp_path: Path) -> None:
    done = warm_runs().run("run", "pocket", "--arm", "direct_grpo", "--json", "--out", tmp_path / "mine", *sets())
    assert done.code == 0, done.err
    assert strict(done.out) == load_json(tmp_path / "mine/report.json")
    assert done.out.count("\n") == 1


def test_json_option_leaves_stdout_empty_on_error() -> None:
    result = call("run", "pocket", "--json", "--set", "labels.budget=-1")
    assert (result.code, result.out) == (2, "") and "labels.budget" in result.err


def test_study_reports_its_arms_over_its_seeds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = tiny("study", out, "--arms", "direct_grpo, raw_teacher", "--seeds", "3,5", "--json")
    assert result.code == 0, result.err
    report = strict(result.out)
    assert report["seeds"] == [3, 5]  # type: ignore[index]
    assert set(report["arms"]) == {"base_student", "base_teacher", "direct_grpo", "raw_teacher"}  # type: ignore[index]
    for arm in ("direct_grpo", "raw_teacher"):
        assert set(report["arms"][arm]["accuracy"]["sums"]["per_seed"]) == {"3", "5"}  # type: ignore[index]
    assert any((contrast["a"], contrast["b"]) == ("direct_grpo", "raw_teacher") for contrast in report["contrasts"])  # type: ignore[index]
    texts = [
        [row["completion"] for row in rows(node(out, "direct_grpo", "student_rl", seed) / "rollouts/000001.jsonl")]
        for seed in (3, 5)
    ]
    assert texts[0] != texts[1]


def test_seed_option_sets_seed_of_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "direct_grpo", "--seed", "7").code == 0
    assert load_json(out / "plan.json")["seeds"] == [7]
    assert {row["seed"] for row in rows(out / "ledger.jsonl")} == {7}


def test_same_seed_gives_same_run_in_other_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "bridge").code == 0
    for name in node_names(out, "bridge"):
        for path in sorted((out / "nodes" / name).glob("rollouts/*.jsonl")):
            there = all_arms() / path.relative_to(out)
            assert path.read_bytes() == there.read_bytes()


def test_set_option_is_recorded_and_takes_effect(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "raw_teacher", "--device", "cpu", changes=["stages.opd.steps=3"]).code == 0
    recipe = load_json(out / "recipe.json")
    assert recipe["stages"]["opd"]["steps"] == 3 and recipe["compute"]["device"] == "cpu"
    assert len(rows(node(out, "raw_teacher", "opd") / "metrics.jsonl")) == 3
    assert load_json(node(out, "raw_teacher", "opd") / "node.json")["settings"]["steps"] == 3


def test_dry_run_json_lists_nodes_with_bounds_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = strict(call("study", "pocket", "--arms", "all", "--dry-run", "--json", *sets()).out)
    assert not list(tmp_path.iterdir())
    estimates = {row["node"]: row for row in listed}  # type: ignore[attr-defined,index,misc]
    ran = {path.name for path in (all_arms() / "nodes").iterdir()}
    assert set(estimates) == ran  # what it lists is what runs
    assert len(estimates) == len(listed)  # type: ignore[arg-type]
    plan = load_json(all_arms() / "plan.json")["arms"]
    for arm, by_seed in plan.items():
        assert all(arm in estimates[name]["arms"] for name in by_seed["0"] if not arm.startswith("base_"))
    assert {tuple(row["arms"]) for name, row in estimates.items() if name.startswith("base_")} == {()}
    # How long these run is known when other arms are done; what is listed is an estimate, and no bound.
    open_ended = {plan[arm]["0"][-1] for arm in ("direct_grpo_compute", "opd_then_rl_compute")}
    for name, row in estimates.items():
        if name in open_ended:
            continue
        spends = rows(all_arms() / "nodes" / name / "ledger.jsonl")
        train = [spend for spend in spends if spend["purpose"] == "train"]
        assert len({label for row in train for label in row["labels"]}) <= row["labels"]
        assert sum(spend["tokens_sampled"] for spend in spends) <= row["tokens_sampled_at_most"]
        assert sum(spend["tokens_teacher_scored"] for spend in spends) <= row["tokens_teacher_scored_at_most"]
        assert (
            sum(spend["flops"] for spend in spends)
            <= row["flops_at_most"]
            < 1000 * sum(spend["flops"] for spend in spends)
        )


def test_dry_run_table_names_nodes_labels_and_steps(tmp_path: Path) -> None:
    result = call("run", "pocket", "--dry-run", "--out", tmp_path / "out", *sets())
    assert result.code == 0 and not (tmp_path / "out").exists()
    for word in ("teacher_rl", "warmup", "opd", "labels", "FLOPs", "memory"):
        assert word in result.out


def test_study_defaults_to_demo_arms_and_all_means_every_arm(tmp_path: Path) -> None:
    plain = call("study", "pocket", "--dry-run", "--json", *sets())
    named = call("study", "pocket", "--arms", ",".join(DEFAULT_STUDY), "--dry-run", "--json", *sets())
    every = call("study", "pocket", "--arms", ",".join(ARMS), "--dry-run", "--json", *sets())
    assert strict(plain.out) == strict(named.out)
    assert len(strict(every.out)) > len(strict(plain.out))  # type: ignore[arg-type]


def test_report_is_rebuilt_from_files_byte_for_byte(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tiny("study", out, "--arms", "direct_grpo,warmup_only", whole=True).code == 0
    before = {name: (out / name).read_bytes() for name in ("report.json", "report.html")}
    for name in before:
        (out / name).unlink()
    result = call("report", out)
    assert result.code == 0 and "warmup_only" in result.out
    assert {name: (out / name).read_bytes() for name in before} == before


def test_report_merges_two_folders_of_different_seeds(tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert tiny("run", tmp_path / seed, "--arm", "direct_grpo", "--seed", seed).code == 0
    with mock.patch("headwater.report.html.page", return_value=Page("")):
        result = call("report", tmp_path / "0", tmp_path / "1", "--out", tmp_path / "both", "--json")
    assert result.code == 0, result.err
    report = strict(result.out)
    assert report == load_json(tmp_path / "both/report.json")
    assert report["arms"]["direct_grpo"]["accuracy"]["sums"]["per_seed"].keys() == {"0", "1"}  # type: ignore[index]


def test_evaluation_of_trained_node_agrees_with_its_evaluation_file(tmp_path: Path) -> None:
    """The same model, problems and task; other draws, so the texts differ, but what was graded is what is counted."""
    out = tmp_path / "graded.jsonl"
    data = tmp_path / "data.jsonl"
    pairs = [("17+45+82+03", "47"), ("10+10+10+10", "40"), ("01+02+03+04", "10")]
    data.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in pairs), encoding="utf-8")
    options = ["--data", data, "--task", "sums", "--samples", "4", "--max-tokens", "40", "--out", out]
    result = call("eval", "pocket:qwen3-teacher-large", *options, "--json")
    assert result.code == 0, result.err
    answer, graded = strict(result.out), rows(out)
    assert len(graded) == 12 and answer["problems"] == 3 and answer["samples"] == 4  # type: ignore[index]
    share = sum(row["correct"] for row in graded) / 12
    assert answer["measures"]["avg@4"]["mean"] == pytest.approx(share)  # type: ignore[index]
    assert answer["tokens"] == sum(row["tokens"] for row in graded)  # type: ignore[index]
    solved = {row["problem_id"] for row in graded if row["correct"]}
    assert answer["measures"]["pass@4"]["mean"] == pytest.approx(len(solved) / 3)  # type: ignore[index]
    again = call("eval", "pocket:qwen3-teacher-large", *options)
    assert "avg@4" in again.out and "pass@4" in again.out and rows(out) == graded  # seeds decide, not the moment


def test_console_script_is_same_program() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="headwater")
    from headwater.__main__ import main

    assert script.load() is main
    assert (Path(sys.executable).parent / "headwater").exists()
