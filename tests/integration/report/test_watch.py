"""`headwater watch` as a command: stages, warnings, JSON, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fake_runs import names, unfinished_run
from headwater.storage.files import read_jsonl
from headwater.storage.run_dir import RunDir
from runs import all_arms, call, load_json


@pytest.fixture
def half(tmp_path: Path) -> Path:
    return unfinished_run(tmp_path / "out")


def test_watch_command_prints_stages_and_warnings_and_json(half: Path) -> None:
    result = call("watch", half)
    assert result.code == 0
    assert "On-policy distillation" in result.out and "12/40" in result.out and "KL(S‖T)" in result.out
    assert "! On-policy distillation, seed 0: truncation: 0.62" in result.out
    rows = json.loads(call("watch", half, "--json").out)
    assert rows["running"] is False and [node["step"] for node in rows["nodes"] if node["steps"] == 40] == [12]


def test_planned_flops_bound_flops_of_ledger() -> None:
    out = all_arms()
    plan = load_json(out / "plan.json")
    # How many steps match another arm's FLOPs is known only when that arm has run.
    matched = {plan["arms"][arm]["0"][-1] for arm in ("direct_grpo_compute", "opd_then_rl_compute")}
    spent = {node.name: sum(row["flops"] for row in read_jsonl(node.ledger)) for node in RunDir(out).nodes()}
    assert plan["flops"].keys() == spent.keys()
    assert [name for name in spent.keys() - matched if not 0 < spent[name] <= plan["flops"][name]] == []


def test_watch_refuses_folders_without_run_and_malformed_files(tmp_path: Path, half: Path) -> None:
    assert call("watch", tmp_path).code == 2
    opd = half / "nodes" / names(half, "bridge")[-1]
    (opd / "metrics.jsonl").write_text('{"step": {"no": 1}}\n')
    result = call("watch", half)
    assert result.code == 2 and "Traceback" not in result.err and str(half) in result.err
