"""The label audit passes a finished study and detects manipulated files; labels.csv and label paths."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwater.data.labels import half_of
from headwater.errors import UserError
from headwater.report import html, label_use
from headwater.report.audit import CHECKS, audit_run
from headwater.report.build import summarize
from headwater.report.study import read_study
from runs import all_arms, call, infos, load_json, node, rows, sets


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A copy of a finished tiny study of every arm, without its models."""
    return Path(
        shutil.copytree(
            all_arms(), tmp_path / "run", ignore=shutil.ignore_patterns("model", "checkpoint", "*.safetensors")
        )
    )


def failing(out: Path) -> dict[str, str]:
    """The checks that fail, with their first fault."""
    return {check.name: check.faults[0] for check in audit_run(out) if not check.holds}


def change(path: Path, number: int, **fields: Any) -> None:
    """Rewrite fields of one row of a JSONL file."""
    entries = rows(path)
    entries[number] |= fields
    path.write_text("".join(json.dumps(row) + "\n" for row in entries), encoding="utf-8")


def join(out: Path) -> None:
    """Rebuild the joined ledger from the nodes' ledgers, as a forger would."""
    parts = [path / "ledger.jsonl" for path in sorted((out / "nodes").iterdir())]
    (out / "ledger.jsonl").write_text("".join(path.read_text() for path in parts if path.exists()))


def a_label(out: Path, half: int) -> str:
    """A label of this half that was used in training."""
    uses = csv.DictReader(label_use.label_csv(read_study([out])).splitlines())
    return next(use["problem_id"] for use in uses if int(use["half"]) == half + 1)


def test_finished_study_passes_every_check(out: Path) -> None:
    results = audit_run(out)
    assert [check.name for check in results] == [check.name for check in CHECKS]
    assert all(check.holds for check in results), failing(out)
    text = {check.name: check.evidence for check in results}
    assert text["budget"].startswith("budget 16; 16 labels over all arms and seeds, at most 16 in one")
    assert text["halves-apart"].startswith("8 labels in 1H, 8 in 2H, 0 in both")
    assert text["evals-not-trained"].startswith("5 evaluation problems, none in ")


def test_report_audit_command_prints_evidence_and_exits_3_on_violation(out: Path) -> None:
    good = call("report", out, "--audit")
    assert good.code == 0 and good.out.count("holds  ") == len(CHECKS)
    ledger = node(out, "bridge", "opd") / "ledger.jsonl"
    change(ledger, 0, labels=[a_label(out, 0)])
    bad = call("report", "--audit", out)
    assert bad.code == 3
    assert "FAILS  dense-without-labels" in bad.out and "audit: " in bad.err and "dense-without-labels (opd." in bad.err
    assert {row["name"]: row["holds"] for row in json.loads(call("report", out, "--audit", "--json").out)}[
        "halves-apart"
    ]


def test_audit_imports_no_torch(out: Path) -> None:
    code = f"import sys; from headwater.report.audit import audit_run as a; assert a({str(out)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def label_in_a_dense_ledger(out: Path) -> None:
    change(node(out, "bridge", "opd") / "ledger.jsonl", 0, labels=[a_label(out, 0)], checks=8)


def verdicts_in_a_dense_stage(out: Path) -> None:
    change(node(out, "bridge", "opd") / "rollouts" / "000001.jsonl", 0, correct=True, reason="equal")


def verdicts_in_a_cache(out: Path) -> None:
    change(node(out, "bridge", "teacher_rollouts") / "cache" / "rollouts.jsonl", 0, correct=True)


def label_of_the_other_half(out: Path) -> None:
    path = node(out, "bridge_rl", "teacher_rl") / "ledger.jsonl"
    change(path, 0, labels=[*rows(path)[0]["labels"], a_label(out, 1)])


def rollouts_of_the_other_half(out: Path) -> None:
    change(node(out, "bridge_rl", "student_rl") / "rollouts" / "000001.jsonl", 0, problem_id=a_label(out, 0))


def evaluation_problem_trained_on(out: Path) -> None:
    problem = rows(node(out, "bridge", "opd") / "evals" / "final" / "sums.jsonl")[0]["problem_id"]
    change(node(out, "bridge", "opd") / "rollouts" / "000002.jsonl", 3, problem_id=problem)


def evaluation_problem_in_a_cache(out: Path) -> None:
    problem = rows(node(out, "bridge", "opd") / "evals" / "final" / "sums.jsonl")[0]["problem_id"]
    change(node(out, "bridge", "teacher_rollouts") / "cache" / "rollouts.jsonl", 0, problem_id=problem)


def labels_over_the_budget(out: Path) -> None:
    path = node(out, "direct_grpo", "student_rl") / "ledger.jsonl"
    change(path, 0, labels=[*rows(path)[0]["labels"], *(f"{n:016x}" for n in range(20))])


def a_smaller_budget_in_the_recipe(out: Path) -> None:
    recipe = load_json(out / "recipe.json")
    recipe["labels"]["budget"] = 12
    (out / "recipe.json").write_text(json.dumps(recipe))


def a_step_taken_out_of_the_ledger(out: Path) -> None:
    path = node(out, "direct_grpo", "student_rl") / "ledger.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(path)[1:]))


def fewer_checks_than_verdicts(out: Path) -> None:
    change(node(out, "direct_grpo", "student_rl") / "ledger.jsonl", 0, checks=1)


def tokens_that_were_not_sampled(out: Path) -> None:
    change(node(out, "direct_grpo", "student_rl") / "ledger.jsonl", 0, tokens_sampled=1)


def graded_texts_taken_away(out: Path) -> None:
    path = node(out, "bridge", "opd") / "evals" / "final" / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(path)[:-1]))


def graded_texts_without_a_ledger_row(out: Path) -> None:
    path = node(out, "bridge", "opd") / "ledger.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(path) if row["purpose"] != "eval"))


def another_joined_ledger(out: Path) -> None:
    change(out / "ledger.jsonl", 0, checks=7)


def another_pool_than_the_recipes(out: Path) -> None:
    path = node(out, "replay", "student_rl") / "node.json"
    path.write_text(json.dumps(load_json(path) | {"labels": {"pool": "second_half", "distinct_allowed": 8}}))


def settings_other_than_the_recipes(out: Path) -> None:
    path = node(out, "bridge", "opd") / "node.json"
    info = load_json(path)
    info["settings"]["objective"] = "grpo"
    path.write_text(json.dumps(info))


def a_node_of_no_arm(out: Path) -> None:
    shutil.copytree(node(out, "bridge", "opd"), out / "nodes" / "opd.s9.00000000")


def an_arm_with_a_node_too_few(out: Path) -> None:
    plan = load_json(out / "plan.json")
    plan["arms"]["bridge"]["0"].pop()
    del plan["check"]  # otherwise its checksum would not match
    (out / "plan.json").write_text(json.dumps(plan))


def rows_of_another_shape(out: Path) -> None:
    (node(out, "bridge", "opd") / "rollouts" / "000001.jsonl").write_text('{"strange": 1}\n')


VIOLATIONS: list[tuple[Callable[[Path], None], str, str]] = [
    (label_in_a_dense_ledger, "dense-without-labels", r"^opd\..*its ledger has 1 labels and 8 checks"),
    (verdicts_in_a_dense_stage, "dense-without-labels", r"^opd\..*rollouts of step 1 carry verdicts"),
    (verdicts_in_a_cache, "dense-without-labels", r"^teacher_rollouts\..*carry verdicts"),
    (label_of_the_other_half, "halves-apart", r"^teacher_rl\..*labels of the other half"),
    (rollouts_of_the_other_half, "halves-apart", r"^student_rl\..*labels of the other half"),
    (evaluation_problem_trained_on, "evals-not-trained", r"^opd\..*trained on 1 evaluation problems"),
    (evaluation_problem_in_a_cache, "evals-not-trained", r"^teacher_rollouts\..*trained on 1 evaluation"),
    (labels_over_the_budget, "budget", r"^student_rl\..*used 2\d labels, 16 were allowed"),
    (a_smaller_budget_in_the_recipe, "budget", r"used 16 labels; labels\.budget is 12"),
    (a_step_taken_out_of_the_ledger, "ledger-agrees", r"^student_rl\..*steps are not 1 to 1"),
    (fewer_checks_than_verdicts, "ledger-agrees", r"step 1: 1 checks in the ledger, 16 verdicts"),
    (tokens_that_were_not_sampled, "ledger-agrees", r"step 1: 1 tokens in the ledger"),
    (graded_texts_taken_away, "ledger-agrees", r"evals/final/sums: 10 checks in the ledger, 9 graded texts"),
    (graded_texts_without_a_ledger_row, "ledger-agrees", r"its graded texts are in no row of the ledger"),
    (another_joined_ledger, "ledger-joined", r"^ledger\.jsonl has"),
    (
        another_pool_than_the_recipes,
        "nodes-as-planned",
        r"^student_rl\..*not of the pool that the recipe says \(first_half\)",
    ),
    (settings_other_than_the_recipes, "nodes-as-planned", r"^opd\..*settings is not what the recipe says"),
    (a_node_of_no_arm, "nodes-as-planned", r"^opd\.s9\.00000000: is in no arm"),
    (an_arm_with_a_node_too_few, "nodes-as-planned", r"arm bridge, seed 0: 3 nodes are not what the recipe asks for"),
    (rows_of_another_shape, "evals-not-trained", r"^KeyError: 'problem_id'"),
]


@pytest.mark.parametrize(
    ("plant", "name", "sentence"), VIOLATIONS, ids=[violation[0].__name__ for violation in VIOLATIONS]
)
def test_each_violation_fails_its_check(out: Path, plant: Callable[[Path], None], name: str, sentence: str) -> None:
    plant(out)
    if plant is not another_joined_ledger:
        join(out)
    results = {check.name: check for check in audit_run(out)}
    assert not results[name].holds, name
    assert any(re.search(sentence, fault) for fault in results[name].faults), results[name].faults


def test_audit_refuses_folder_without_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run \(plan.json is missing\)"):
        audit_run(tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "plan.json").write_text("[]")
    assert call("report", "--audit", tmp_path).code == 2


def test_unfinished_run_is_audited_up_to_its_last_step(tmp_path: Path) -> None:
    result = call(
        "run", "pocket", "--out", tmp_path / "run", *sets("guards.no_signal=stop", "stages.teacher_rl.optim.lr=1e30")
    )
    assert result.code in (0, 2, 3, 4)
    if (tmp_path / "run" / "plan.json").exists():
        assert failing(tmp_path / "run") == {}


def test_no_node_exceeds_its_pool_and_no_arm_its_budget() -> None:
    """Labels used by each node are within its pool, those of each arm within the budget."""
    out = all_arms()
    budget = load_json(out / "recipe.json")["labels"]["budget"]
    study = read_study([out])
    assert {"direct_grpo", "bridge_rl", "teacher_2h"} <= study.arms.keys()
    for by_seed in study.arms.values():
        for nodes in by_seed.values():
            assert (
                len(
                    {
                        label
                        for node_ in nodes
                        for row in node_.ledger_rows
                        if row["purpose"] == "train"
                        for label in row["labels"]
                    }
                )
                <= budget
            )
    for path, info in infos(out):
        looked = {label for row in rows(path / "ledger.jsonl") if row["purpose"] == "train" for label in row["labels"]}
        assert len(looked) <= ((info["labels"] or {}).get("distinct_allowed", 0))


def test_labels_csv_lists_every_label_use() -> None:
    out = all_arms()
    with (out / "labels.csv").open(encoding="utf-8") as file:
        entries = list(csv.DictReader(file))
    counted = {
        (label, path.name): sum(
            label in row["labels"] for row in rows(path / "ledger.jsonl") if row["purpose"] == "train"
        )
        for path, _ in infos(out)
        for row in rows(path / "ledger.jsonl")
        if row["purpose"] == "train"
        for label in row["labels"]
    }
    assert {(row["problem_id"], row["node"]): int(row["steps"]) for row in entries} == counted != {}
    assert all(int(row["half"]) == 1 + half_of(row["problem_id"]) for row in entries)
    shared = next(row for row in entries if row["node"] == node(out, "bridge_rl", "teacher_rl").name)
    assert {"bridge_rl", "replay"} <= set(shared["arms"].split()) and shared["seed"] == "0"
    mixed = node(out, "mixed", "opd").name  # the only arm that mixes the reward into OPD
    assert not any(row["stage"] in ("warmup", "opd", "sft") for row in entries if row["node"] != mixed)
    assert any(row["node"] == mixed for row in entries)


def test_label_paths_distinguish_fresh_from_replayed_labels() -> None:
    study = read_study([all_arms()])
    taken = {(row["arm"], row["half"], row["stages"]): row["labels"] for row in label_use.label_paths(study)}
    assert taken["bridge_rl", 2, "student_rl"] > 0
    assert not any(arm == "bridge_rl" and "," in stages for arm, _, stages in taken)
    assert any(arm == "replay" and stages == "teacher_rl, student_rl" for arm, _, stages in taken)
    assert not any(arm == "replay" and half == 2 for arm, half, _ in taken)
    page = html.page(study, summarize(study)).html
    assert "Which stages used a label" in page and "labels.csv" in page
