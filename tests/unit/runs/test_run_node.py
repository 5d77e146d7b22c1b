"""Node runner: cached rollouts, informative groups, the no-signal guard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from headwater.config.dense import Dense
from headwater.config.guards import Guards
from headwater.config.stage import Stage
from headwater.losses.batch import Row
from headwater.storage.files import append_jsonl, read_jsonl
from headwater.storage.node_dir import NodeDir
from headwater.training.groups import count_uninformative, replace_uninformative
from headwater.training.guards import StageOutcomes, no_signal, unchanged_teacher
from headwater.training.rollouts import CachedRollouts, epoch_order
from headwater.types import Rollout, Verdict

GROUP = 4


def stage(**fields: object) -> Stage:
    plain = {"objective": "grpo", "steps": 1, "batch_size": 8, "group_size": GROUP}
    return Stage.model_validate(plain | fields)


def group(name: str, verdicts: str) -> list[Row]:
    """`group("a", "1001")`: four rollouts of problem a, the first and the last right."""
    return [
        Row(Rollout(name, sample, (1,), (2,), (-1.0,), "stop", "s"), Verdict(sign == "1", "equal"))
        for sample, sign in enumerate(verdicts)
    ]


def names(rows_: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.rollout.problem_id for row in rows_))


# What a stage works on ------------------------------------------------------------------------------------------------


def test_cached_rollouts_are_read_once_per_epoch_in_new_order() -> None:
    cached = [Row(Rollout(f"p{index}", 0, (1,), (2,), (-1.0,), "stop", "s")) for index in range(12)]
    prompts = [row.rollout.problem_id for row in cached]
    gather = CachedRollouts(cached, prompts, stage(objective="sft", batch_size=4, group_size=1), 0)
    epochs = [
        [row.rollout.problem_id for step in steps for row in gather(step).rows] for steps in ((0, 1, 2), (3, 4, 5))
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"p{index}" for index in range(12))
    assert epochs[0] != epochs[1]
    again = CachedRollouts(cached, prompts, stage(objective="sft", batch_size=4, group_size=1), 0)
    assert [row.rollout.problem_id for row in again(4).rows] == epochs[1][4:8]  # a resumed stage goes on where it was
    other = CachedRollouts(cached, prompts, stage(objective="sft", batch_size=4, group_size=1), 1)
    assert [row.rollout.problem_id for row in other(0).rows] != epochs[0][:4]


def test_cache_of_first_reads_gives_steps_of_whole_cache() -> None:
    pool = [
        replace(row, rollout=replace(row.rollout, sample=s))
        for s in (0, 1)
        for row in group("a", "1") + group("b", "1")
    ]
    pool = sorted(pool, key=lambda row: (row.rollout.problem_id, row.rollout.sample))
    settings = stage(objective="sft", batch_size=3, group_size=2)
    first = [pool[index] for index in reversed(epoch_order(4, 7, 0)[:3])]  # an extended cache has another order
    whole, partial = (CachedRollouts(rows, ("a", "b"), settings, 7) for rows in (pool, first))
    assert whole(0).rows == partial(0).rows
    with pytest.raises(KeyError):
        partial(1)


# Dynamic sampling -----------------------------------------------------------------------------------------------------


def test_group_is_uninformative_when_all_verdicts_agree() -> None:
    assert count_uninformative(group("a", "1111") + group("b", "0000") + group("c", "0100"), GROUP) == 2


def test_dynamic_sampling_replaces_uninformative_groups() -> None:
    kept = group("a", "0000") + group("b", "0110") + group("c", "1111")
    fresh = group("d", "1111") + group("e", "0001")
    assert names(replace_uninformative(kept, fresh, GROUP)) == ["e", "b", "c"]
    assert names(replace_uninformative([], fresh, GROUP)) == ["d", "e"]


# No signal, no numbers ------------------------------------------------------------------------------------------------


def silent(step: int, informative: float = 0.0, reward: float = 0.0) -> dict[str, float]:
    return {"step": step, "informative": informative, "reward": reward}


def no_signal_guard(
    folder: Path, stop: bool = True, right: bool = False, steps: int = 10, prompts: str = "all"
) -> Callable[..., str | None]:
    """`no_signal` of rows of metrics, with patience 3 and 40 labels.

    The ledger holds three steps of four groups each, on 12 labels; all verdicts are the same.
    """
    guards = Guards(no_signal="stop" if stop else "continue", patience=3)
    node = NodeDir(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    spend = {"purpose": "train", "checks": 4 * GROUP}
    lines = [json.dumps({**spend, "labels": [f"p{4 * step + i}" for i in range(4)]}) for step in range(3)]
    (folder / "ledger.jsonl").write_text(
        "\n".join([*lines, json.dumps({**spend, "purpose": "eval", "labels": ["e"]})]) + "\n"
    )
    for step in range(1, 4):
        graded = [{"correct": right, "reason": "different", "finish": "stop"}] * GROUP
        append_jsonl(node.rollouts(step), graded)
    dense = Dense.model_validate({"token_weights": {"prompts": prompts}})
    outcomes = StageOutcomes(node, "stages.teacher_rl", 48)
    return lambda *rows: no_signal(guards, outcomes, rows, steps, 40, dense)


@pytest.mark.parametrize(("prompts", "stops"), [("all", True), ("pass_rate", True), ("all_wrong", False)])
def test_no_signal_guard_spares_stage_training_wrong_groups(prompts: str, stops: bool, tmp_path: Path) -> None:
    guard = no_signal_guard(tmp_path, prompts=prompts)
    assert guard() is None
    assert (guard(silent(3)) is not None) == stops
    assert (guard(silent(1), silent(2), silent(3)) is not None) == stops


@pytest.mark.parametrize(("informative", "grad_norm"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.1)])
def test_teacher_without_gradient_is_warned_of_once(informative: float, grad_norm: float, tmp_path: Path) -> None:
    no_signal_guard(tmp_path)  # writes rollouts of three steps
    stage, sentences = StageOutcomes(NodeDir(tmp_path), "stages.teacher_rl", 48), list[str]()
    rows = [silent(1), silent(2), {**silent(3, informative), "grad_norm": grad_norm}]
    append_jsonl(stage.folder.metrics, rows)
    changed = informative > 0.0 or grad_norm > 0.0
    for _ in range(2):  # a node that was interrupted at its end warns again and records it once
        assert unchanged_teacher(Guards.model_validate({}), stage, sentences.append) is None
    warnings = list(read_jsonl(stage.folder.warnings))
    assert [row["guard"] for row in warnings] == ([] if changed else ["unchanged_teacher"])
    stop = unchanged_teacher(Guards.model_validate({"unchanged_teacher": "stop"}), stage, sentences.append)
    if changed:
        assert sentences == [] and stop is None
    else:
        assert (
            set(sentences) == {warnings[0]["sentence"]}
            and "as it was before the labels: use easier problems" in sentences[0]
        )
        assert str(stop).endswith("(or set guards.unchanged_teacher=warn to distill it anyway)")
    assert unchanged_teacher(Guards.model_validate({"unchanged_teacher": "off"}), stage, sentences.append) is None


def test_no_signal_guard_stops_stage_and_names_wasted_labels(
    tmp_path: Path,
) -> None:
    guard = no_signal_guard(tmp_path)
    rows_ = [silent(step) for step in (1, 2, 3)]
    assert guard(*rows_[:1]) is None and guard(*rows_[:2]) is None
    message = str(guard(*rows_))
    assert message == (
        "no informative group in 3 steps, so reward gives no gradient: 100 % of the completions were wrong; 12 labels were used, "
        "and the other 28 of this stage's 40 would be wasted too; use easier problems, a stronger model, a lower "
        "stages.teacher_rl.sampling.temperature or a larger stages.teacher_rl.group_size "
        "(or set guards.no_signal=continue to train on anyway)"
    )
    solved = str(no_signal_guard(tmp_path, right=True)(silent(3, reward=1.0)))
    assert "100 % of the completions were right" in solved and "use harder problems" in solved
    # With `continue` it goes on.
    assert no_signal_guard(tmp_path, stop=False)(*rows_) is None


def test_no_signal_guard_leaves_stage_shorter_than_patience(tmp_path: Path) -> None:
    assert no_signal_guard(tmp_path, steps=2)(silent(2)) is None
    assert no_signal_guard(tmp_path, steps=3)(silent(3)) is not None


def test_no_signal_guard_passes_with_one_informative_group_or_continue(tmp_path: Path) -> None:
    guard = no_signal_guard(tmp_path)
    rows_ = [silent(1), silent(2, informative=0.25), silent(3)]
    assert [guard(*rows_[:steps]) for steps in (1, 2, 3)] == [None] * 3
    assert no_signal_guard(tmp_path, stop=False)(silent(3)) is None
    # A stage that had more patience before, or none of this guard, is judged by all of its steps so far.
    assert guard(silent(4)) is not None
    assert guard({"step": 3, "loss": 0.0}) is None  # a dense stage uses no labels
