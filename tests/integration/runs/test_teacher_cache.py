"""The teacher's cache of tiny runs: as many rollouts as are read, and no distributions after the last use."""

from __future__ import annotations

from pathlib import Path

from runs import call, node, rows, tiny

CHANGES = (
    "compute.keep_checkpoints=false",
    "data.evals.sums.generate.count=2",
    "evaluate.samples=1",
    "conditions.problems=0",
    "stages.teacher_rl.steps=1",
    "stages.warmup.steps=1",
    "stages.sft={steps: 3, batch_size: 16, group_size: 4, sampling: {max_tokens: 32}}",
)


def test_cache_grows_for_added_arm_and_is_scored_again(tmp_path: Path) -> None:
    """A step reads 16 of the 64 rollouts of the pool: the warm-up takes one, fine-tuning three."""
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "warmup_only", changes=CHANGES).code == 0
    cache = node(out, "warmup_only", "teacher_rollouts") / "cache"
    first = rows(cache / "rollouts.jsonl")
    assert len(first) == 16 and [path.name for path in cache.iterdir()] == ["rollouts.jsonl"]
    result = tiny("run", out, "--arm", "teacher_sft", changes=CHANGES)
    assert result.code == 0 and "16 rollouts are kept, 32 sampled, 48 scored" in result.err
    later = rows(cache / "rollouts.jsonl")
    assert later[:16] == first and len({(row["problem_id"], row["sample"]) for row in later}) == 48
    ledger = rows(cache.parent / "ledger.jsonl")
    tokens = [sum(len(row["completion_ids"]) for row in part) for part in (first, later[16:])]
    assert [row["tokens_sampled"] for row in ledger] == tokens
    assert [row["tokens_teacher_scored"] for row in ledger] == [tokens[0], sum(tokens)]
    assert [path.name for path in cache.iterdir()] == ["rollouts.jsonl"]
    assert call("report", out, "--audit").code == 0
    done = (cache.parent / "DONE").read_bytes()
    assert tiny("run", out, "--arm", "teacher_sft", changes=CHANGES).code == 0
    assert (cache.parent / "DONE").read_bytes() == done
