"""Whole tiny runs: problems of each stage, non-finite values, equivalent ways to compute."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headwater.config.builtin import find_recipe
from headwater.config.stage import Stage
from headwater.runs.node_context import NodeContext
from headwater.runs.setup import prepared
from runs import TINY, node, rows, temporary, tiny


def problems(path: Path, step: int) -> list[str]:
    """The distinct problems of a step, in order."""
    return list(dict.fromkeys(row["problem_id"] for row in rows(path / "rollouts" / f"{step:06d}.jsonl")))


# What a stage works on ------------------------------------------------------------------------------------------------


def test_epoch_visits_every_problem_once_without_repeats_in_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = ["stages.student_rl.steps=8", "stages.student_rl.batch_size=12"]  # 3 of 16 problems a step
    assert tiny("run", out, "--arm", "direct_grpo", changes=changes).code == 0
    visits = [problems(node(out, "direct_grpo", "student_rl"), step) for step in range(1, 9)]
    assert all(len(set(step)) == 3 for step in visits)
    first = [name for step in visits for name in step][:16]
    assert len(set(first)) == 16
    seen = Counter(name for step in visits for name in step)
    assert set(seen.values()) == {1, 2}  # 24 visits to 16 problems


def test_stage_loads_its_teacher_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    frozen = NodeContext.frozen

    def counted(self: NodeContext, whose: Any, stage: Any = None) -> Any:
        loaded.append(whose)
        return frozen(self, whose, stage)

    monkeypatch.setattr(NodeContext, "frozen", counted)
    out, changes = tmp_path / "out", ("conditions.problems=2", "conditions.every=1")
    assert tiny("run", out, "--arm", "raw_teacher", changes=changes).code == 0
    assert len(rows(node(out, "raw_teacher", "opd") / "conditions.jsonl")) == 3  # before the two steps and after each
    assert loaded.count("teacher") == 4  # to be evaluated, to sample the cache, beside the warm-up, and in all of OPD


def test_stage_three_and_replay_sample_from_their_own_half(tmp_path: Path) -> None:
    recipe = find_recipe("pocket", list(TINY))
    with prepared(recipe, ["bridge_rl", "replay"], [0]) as (plan, inputs):
        pools = inputs.pools
    assert tiny("study", tmp_path / "out", "--arms", "bridge_rl,replay").code == 0
    for arm, pool in (("bridge_rl", pools.second_half), ("replay", pools.first_half)):
        path = node(tmp_path / "out", arm, "student_rl")
        assert {name for step in (1, 2) for name in problems(path, step)} <= set(pool)
    assert plan.recipe == recipe


def test_bridge_prompts_are_used_by_dense_stages_only(tmp_path: Path) -> None:
    more = "data.unlabeled={generate: {pool: unlabelled, count: 16}}"
    out = tmp_path / "out"
    # Eight steps of 16 rollouts read the whole cache: four of each of 32 prompts.
    changes = [more, "stages.warmup.steps=8", "stages.opd.steps=4", "stages.teacher_rl.steps=4"]
    assert tiny("run", out, "--arm", "bridge", changes=changes).code == 0
    recipe = find_recipe("pocket", [*TINY, more])
    with prepared(recipe, ["bridge"], [0]) as (_, inputs):
        unlabeled, labeled = set(inputs.unlabeled), set(inputs.pools.all)
    assert len(unlabeled) == 16 and not unlabeled & labeled
    opd = {name for step in (1, 2, 3, 4) for name in problems(node(out, "bridge", "opd"), step)}
    assert len(opd) == 32 and opd == unlabeled | labeled
    cached = {row["problem_id"] for row in rows(node(out, "bridge", "teacher_rollouts") / "cache/rollouts.jsonl")}
    assert cached == unlabeled | labeled
    assert not {name for step in (1, 2, 3, 4) for name in problems(node(out, "bridge", "teacher_rl"), step)} & unlabeled


# Dynamic sampling -----------------------------------------------------------------------------------------------------


def test_dynamic_sampling_counts_labels_of_dropped_groups(
    tmp_path: Path,
) -> None:
    changes = ["stages.student_rl.sparse.dynamic_sampling=3", "stages.student_rl.steps=4"]
    out = tmp_path / "out"
    assert tiny("run", out, "--arm", "direct_grpo", changes=changes).code == 0
    path = node(out, "direct_grpo", "student_rl")
    more = 0
    for spend, metrics in zip(rows(path / "ledger.jsonl")[:4], rows(path / "metrics.jsonl"), strict=True):
        kept = rows(path / "rollouts" / f"{spend['step']:06d}.jsonl")
        assert len(kept) == 16  # the batch keeps its size
        assert spend["checks"] % 16 == 0 and {row["problem_id"] for row in kept} <= set(spend["labels"])
        assert spend["tokens_sampled"] >= sum(row["tokens"] for row in kept)
        assert math.isclose(metrics["completion_tokens"] * spend["checks"], spend["tokens_sampled"])
        more += spend["checks"] > 16
    assert more  # the cold student has groups that are all wrong


# No signal, no numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_stop_run_before_grading(bad: float, tmp_path: Path, pocket_folder: Path) -> None:
    broken = tmp_path / "student"
    broken.mkdir()
    for path in (pocket_folder / "qwen3-student").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    tensors[name][0, 0] = bad
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    result = tiny("run", out, "--arm", "direct_grpo", changes=[f"models.student={broken}"])
    assert result.code == 4
    assert "base_student, after step 0: the model's log-probs are not finite" in result.err
    assert "Traceback" not in result.err and result.err.count("headwater:") == 1
    assert not list(out.glob("nodes/base_student*/DONE"))
    assert not [row for path in out.glob("nodes/*/ledger.jsonl") for row in rows(path) if row["checks"]]
    # Asked to run all the same, preflight refuses it by name before anything is written.
    result = tiny("run", tmp_path / "new", "--arm", "direct_grpo", changes=[f"models.student={broken}"], whole=True)
    assert result.code == 3 and "not-finite" in result.err and "models.student" in result.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arm", ["direct_grpo", "warmup_only"])
def test_divergence_stops_with_stage_and_step_and_keeps_last_checkpoint(arm: str, tmp_path: Path) -> None:
    name = {"direct_grpo": "student_rl", "warmup_only": "warmup"}[arm]
    out = tmp_path / "out"
    # A step of 1e37 makes infinities; the schedule's first steps are small, so that a good checkpoint stands before it.
    changes = [f"stages.{name}.{field}" for field in ("optim.lr=1e38", "steps=6", "checkpoint_every=1")]
    result = tiny("run", out, "--arm", arm, changes=changes)
    assert result.code == 4, result
    (path,) = out.glob(f"nodes/{name}.*")
    done = sum(row["updates"] > 0 for row in rows(path / "metrics.jsonl"))  # the step that stopped may have a row too
    assert 0 <= done < 6
    assert f"{name}, step {done + 1} of 6: the " in result.err and "not finite" in result.err
    assert len(result.complaints) == 1 and "Traceback" not in result.err
    assert not (path / "DONE").exists() and not (path / "model").exists()
    assert (path / "checkpoint" / f"{done:06d}" / "sums.json").exists()


def test_non_finite_loss_keeps_weights_of_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third step's loss is made a NaN: two good checkpoints stay, and without the fault the stage goes on from there."""
    from headwater.losses import objectives
    from headwater.runs import train_node

    calls = Counter[str]()
    real = train_node.objective_of

    def spoilt(stage_: Stage, *more: float | None) -> objectives.Objective:
        objective = real(stage_, *more)
        if stage_.objective != "forward_kl":
            return objective

        def term(tokens: objectives.Tokens) -> torch.Tensor:
            calls["loss"] += 1
            value = objective.terms[0][1](tokens)
            return value * math.nan if calls["loss"] == 3 else value

        return replace(objective, terms=((1.0, term),))

    changes = [f"stages.warmup.{field}" for field in ("steps=4", "checkpoint_every=1")]
    out, whole = tmp_path / "out", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(train_node, "objective_of", spoilt)
        result = tiny("run", out, "--arm", "warmup_only", changes=changes)
    assert result.code == 4
    assert "warmup, step 3 of 4: the loss is not finite; the weights were not changed by this step" in result.err
    (path,) = out.glob("nodes/warmup.*")
    assert [(row["step"], row["updates"]) for row in rows(path / "metrics.jsonl")] == [(1, 1), (2, 1), (3, 0)]
    assert sorted(path_.name for path_ in (path / "checkpoint").iterdir()) == ["000001", "000002"]
    assert tiny("run", whole, "--arm", "warmup_only", changes=changes).code == 0
    assert tiny("run", out, "--arm", "warmup_only", changes=changes).code == 0
    a, b = (load_file(node(folder, "warmup_only", "warmup") / "model/model.safetensors") for folder in (out, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)


# Ways to compute ------------------------------------------------------------------------------------------------------


def bridge_with(out: Path, *changes: str) -> Path:
    result = tiny("run", out, "--arm", "bridge", changes=changes)
    assert result.code == 0, result.err
    return out


@cache
def plain_bridge() -> Path:
    return bridge_with(temporary() / "plain")


def weights(out: Path, stage_: str = "opd") -> dict[str, torch.Tensor]:
    return load_file(node(out, "bridge", stage_) / "model/model.safetensors")


@pytest.mark.parametrize(
    "change", ["models.gradient_checkpointing=true", "compute.microbatch_tokens=40", "compute.sample_batch=3"]
)
def test_gradient_checkpointing_and_batch_tokens_change_only_rounding(
    change: str, tmp_path: Path, pocket_folder: Path
) -> None:
    plain, other = plain_bridge(), bridge_with(tmp_path / "other", change)
    for name in ("teacher_rl", "warmup", "opd"):
        a, b = node(plain, "bridge", name), node(other, "bridge", name)
        assert a.name == b.name  # the fingerprint is the same: it is the same outcome
        for step in ("000001", "000002"):
            texts = [[row["completion"] for row in rows(folder / "rollouts" / f"{step}.jsonl")] for folder in (a, b)]
            assert texts[0] == texts[1]
        tensors, other_tensors = weights(plain, name), weights(other, name)
        assert (
            max((tensors[key] - other_tensors[key]).abs().max().item() for key in tensors) < 5e-5
        )  # a step moves them by 1e-3
    before = load_file(pocket_folder / "qwen3-student/model.safetensors")
    after = weights(plain, "warmup")
    assert max((before[key] - after[key]).abs().max().item() for key in before.keys() & after.keys()) > 5e-4


def test_bfloat16_run_writes_bfloat16_models_close_to_float32(tmp_path: Path) -> None:
    plain, half = plain_bridge(), bridge_with(tmp_path / "half", "models.dtype=bfloat16")
    folder = node(half, "bridge", "opd") / "model"
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    masters = load_file(node(half, "bridge", "opd") / "checkpoint/000002/model.safetensors")
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}  # steps of 1e-6 vanish in bfloat16
    for metrics in (
        rows(node(half, "bridge", "opd") / "metrics.jsonl"),
        rows(node(plain, "bridge", "opd") / "metrics.jsonl"),
    ):
        assert all(row["sampler_gap"] < 0.05 for row in metrics)
    full, two = (rows(node(out, "bridge", "warmup") / "metrics.jsonl")[0]["loss"] for out in (plain, half))
    assert two == pytest.approx(full, rel=0.15) and full != two


def test_top_k_cache_loss_is_at_most_exact_loss(tmp_path: Path) -> None:
    exact, kept = plain_bridge(), bridge_with(tmp_path / "kept", "stages.warmup.dense.top_k=4")
    a, b = (
        load_file(node(out, "bridge", "teacher_rollouts") / "cache/distributions.safetensors") for out in (exact, kept)
    )
    assert set(a) == {"logp"} and set(b) == {"logp", "ids_low"} and b["ids_low"].shape[1] == 4
    whole, bound = (rows(node(out, "bridge", "warmup") / "metrics.jsonl")[0]["loss"] for out in (exact, kept))
    assert 0 < bound <= whole * 1.001  # merging tokens into a tail can only lose divergence


def test_prompt_thinking_selects_template_mode(tmp_path: Path, pocket_folder: Path) -> None:
    from transformers import AutoTokenizer

    from headwater.config.prompt import Prompt
    from headwater.models.prompts import Prompter
    from headwater.types import Problem

    tokenizer = AutoTokenizer.from_pretrained(pocket_folder / "qwen3-student")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}{% endfor %}{% if enable_thinking %}={% else %}=+{% endif %}"
    )
    problem = Problem.of("17+45", "here")
    on, off = (Prompter(tokenizer, Prompt(thinking=value)) for value in (True, False))
    assert (on.text(problem), off.text(problem)) == ("17+45=", "17+45=+")
    assert on.ids(problem) == off.ids(problem)[:-1]
    # A whole run takes it from the recipe: its cached prompts end as the template says.
    folders = []
    for name in ("qwen3-student", "qwen3-teacher"):
        folder = tmp_path / name
        folder.mkdir()
        for path in (pocket_folder / name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        folders.append(folder)
    changes = [f"models.student={folders[0]}", f"models.teacher={folders[1]}"]
    ends = {}
    for thinking in ("true", "false"):
        out = tmp_path / thinking
        assert tiny("run", out, "--arm", "warmup_only", changes=[*changes, f"prompt.thinking={thinking}"]).code == 0
        first = rows(node(out, "warmup_only", "teacher_rollouts") / "cache/rollouts.jsonl")[0]
        ends[thinking] = tokenizer.decode(first["prompt_ids"])[-2:]
    assert ends["true"][-1] == "=" and ends["false"] == "=+"
