"""What several ranks train and ask besides plain models with weights of their own: adapters, teachers elsewhere; and that
none of them holds a whole model while it loads."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import ranks_memory
from forked_ranks import run_ranks
from headwater.config.lora import Lora
from headwater.distributed.process_group import ProcessGroup
from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.lora import AdapterSpec
from runs import rows, tagged, tiny
from serving import Answering, serving
from tests.integration.test_teachers import RAW
from tests.integration.test_torchrun import CHANGES, assert_alike, command_of, node_of
from tiny import CPU, MODELS

STEADY = tuple(f"stages.{stage}.optim.eps=1e-4" for stage in ("teacher_rl", "warmup", "opd", "student_rl"))
"""Adapters, and norms of some kinds, begin at zero: a step that is nothing but rounding would be all that there is of such a weight."""


def killed_run(out: Path, step: int, *changes: str, options: Sequence[str] = ()) -> Path:
    """Begin a run by two ranks, of which one is killed as it begins this step; returns the folder of its OPD."""
    ended = run_ranks(2, *command_of(out, *changes), *options, faults={1: f"step.begun:{step}=kill"})
    assert [rank.code for rank in ended] == [4, -9], ended
    return node_of(out, "opd")


def assert_resumes_as_one_process(out: Path, size: int, *changes: str, options: Sequence[str] = ()) -> None:
    """Resume a killed run by this number of ranks, and assert that it is then the run of one process."""
    again = run_ranks(size, *command_of(out, *changes), *options)
    assert [rank.code for rank in again] == [0] * size, again
    single = out.with_name("single")
    result = tiny("run", single, *options, changes=changes)
    assert result.code == 0, result.err
    assert_alike(out, single)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra `lora` is not installed")
@pytest.mark.parametrize(("output", "size"), [("merged", 1), ("adapter", 2)])
def test_lora_on_two_ranks_equals_one_and_resumes(output: str, size: int, tmp_path: Path) -> None:
    """Two ranks train until one is killed in its third step of OPD, and as many as `size` from there to the end."""
    out = tmp_path / "out"
    changes = (*CHANGES, *STEADY, "models.lora.r=4", "models.lora.alpha=8", f"models.lora.output={output}")
    kept = sorted((killed_run(out, 7, *changes) / "checkpoint" / "000002").glob("shard-*"))
    assert len(kept) == 2
    for path in kept:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("weight.")]  # noqa: SIM118
        assert names and all(".lora_" in name for name in names)
    assert_resumes_as_one_process(out, size, *changes)


def test_each_rank_queries_served_teacher_for_its_own_share(tmp_path: Path, pocket_folder: Path) -> None:
    teacher = load_policy(
        ModelFolder.open(str(pocket_folder / "qwen3-teacher"), "models.teacher"), LoadOptions(MODELS, CPU, frozen=True)
    )
    with serving(Answering(teacher)) as there:
        requests, counts = there.requests, []
        for run in (0, 1):
            requests.clear()
            changes = (*CHANGES, *RAW, f"models.teacher={there.url}")
            if run == 0:
                result = tiny("run", tmp_path / "one", "--arm", "raw_teacher", changes=changes)
                assert result.code == 0, result.err
            else:
                ended = run_ranks(2, *command_of(tmp_path / "two", *changes), "--arm", "raw_teacher")
                assert [rank.code for rank in ended] == [0, 0], ended
            counts.append(sequences(requests))
    assert_alike(tmp_path / "two", tmp_path / "one")
    assert counts[0] == counts[1]


def sequences(requests: list[tuple[str, Any]]) -> dict[str, int]:
    """How many sequences a server scored, and how many it sampled."""
    counts = {"scored": 0, "sampled": 0}
    for path, body in requests:
        if path == "/v1/completions":
            scores = body.get("prompt_logprobs") is not None
            counts["scored" if scores else "sampled"] += len(body["prompt"]) if scores else 1
    return counts


def test_teachers_by_tag_on_two_ranks_equal_one(tmp_path: Path, pocket_folder: Path) -> None:
    large = load_policy(
        ModelFolder.open(str(pocket_folder / "qwen3-teacher-large"), "models.teacher"),
        LoadOptions(MODELS, CPU, frozen=True),
    )
    with serving(Answering(large)) as there:
        teachers = f"models.teacher={{left: 'pocket:qwen3-teacher', right: '{there.url}'}}"
        changes = (*CHANGES, *tagged(tmp_path, "left", "right"), "conditions.problems=1", *RAW[:3], teachers)
        result = tiny("run", tmp_path / "one", "--arm", "raw_teacher", changes=changes)
        assert result.code == 0, result.err
        two = tmp_path / "two"
        ended = run_ranks(2, *command_of(two, *changes), "--arm", "raw_teacher")
        assert [rank.code for rank in ended] == [0, 0], ended
    assert_alike(two, tmp_path / "one")
    cached = rows(node_of(two, "teacher_rollouts") / "cache" / "rollouts.jsonl")
    assert len({row["sampler"] for row in cached}) == 2


@pytest.mark.parametrize(("adapter", "size"), [(False, 1), (True, 2)], ids=["weights", "adapter"])
def test_moving_teacher_on_two_ranks_equals_one_and_resumes(adapter: bool, size: int, tmp_path: Path) -> None:
    """The teacher follows the student, which reads fewer words, by a moving average that each rank holds in shards.

    Two ranks train until one is killed in its third step of OPD, and as many as `size` from there to the end.
    """
    if adapter and importlib.util.find_spec("peft") is None:
        pytest.skip("the extra `lora` is not installed")
    teacher = "stages.opd.dense={teacher_weights: {start: 1}, start_update: {decay: 0.5}}"
    changes = (*CHANGES, *STEADY, teacher, "prompt.teacher={template: 'Solve: {problem}'}")
    changes += ("models.lora={r: 4, roles: [student]}",) if adapter else ()
    out, options = tmp_path / "out", ("--arm", "opd_only")
    assert list((killed_run(out, 5, *changes, options=options) / "checkpoint").glob("*/start-copy/shard-*"))
    assert_resumes_as_one_process(out, size, *changes, options=options)


def test_four_bit_weights_on_several_ranks_are_refused() -> None:
    wanted = AdapterSpec(Lora.model_validate({"quantize": "nf4"}), ("here",))
    with pytest.raises(UserError, match=r"^models\.lora\.quantize: four-bit weights run in one process"):
        load_policy(
            ModelFolder("nowhere", "models.student", "nowhere"),
            LoadOptions(MODELS, CPU, frozen=False, adapter=wanted, ranks=ProcessGroup(0, 2)),
        )


def memory_of_ranks(model: Path, size: int) -> list[dict[str, float]]:
    ended = run_ranks(size, "--model", model, "--steps", "1", script=ranks_memory.__file__)
    assert [rank.code for rank in ended] == [0] * size, ended
    return [json.loads(rank.out) for rank in ended]


def test_no_rank_holds_whole_model_while_loading_and_training(tmp_path: Path) -> None:
    """107 MB of weights: a process alone holds them twice as it loads, once from the file, which the system can take back."""
    ranks_memory.make(tmp_path / "model", layers=8, width=512, vocabulary=4000)
    (alone,), two = (memory_of_ranks(tmp_path / "model", size) for size in (1, 2))
    whole = alone["weights_mb"]
    assert alone["loaded_mb"] > 0.95 * whole and alone["load_peak_mb"] > 1.9 * whole
    for rank in two:
        assert rank["weights_mb"] == pytest.approx(whole / 2, rel=0.01)
        assert rank["loaded_mb"] < 0.7 * whole
        assert rank["load_peak_mb"] < 0.8 * alone["load_peak_mb"]
        assert rank["step_peak_mb"] < 0.6 * alone["step_peak_mb"]
