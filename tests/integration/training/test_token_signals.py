"""Per-token teacher signals that a run writes with its rollouts."""

from __future__ import annotations

from pathlib import Path

from headwater.storage.node_dir import NodeDir
from runs import all_arms, node, rows


def test_token_signals_are_written_for_on_policy_stages_with_teacher_only() -> None:
    out = all_arms()
    opd = rows(NodeDir(node(out, "bridge", "opd")).rollouts(1))
    loud = [row for row in opd if "signal" in row]
    assert 1 <= len(loud) <= 4
    for row in loud:
        assert len(row["signal"]) == len(row["pieces"]) == row["tokens"] and "".join(row["pieces"]) == row["completion"]
    for stage in ("teacher_rl", "warmup"):
        assert not any("signal" in row for row in rows(NodeDir(node(out, "bridge", stage)).rollouts(1)))
    problem_ids = {row["id"] for row in rows(Path(out) / "problems.jsonl")}
    assert {row["problem_id"] for row in opd} <= problem_ids
    assert not any(set(row) - {"id", "text"} for row in rows(Path(out) / "problems.jsonl"))
