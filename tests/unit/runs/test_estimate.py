"""Dry runs: what they say is what the ledger says afterwards, also of recipes whose data and models are not here."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from headwater.config.builtin import find_recipe
from headwater.config.recipe import Lora
from headwater.losses.batch import Row
from headwater.losses.objectives import objective_of
from headwater.models import lora
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.shape import Shape
from headwater.runs.estimate import Assumptions, estimates
from headwater.runs.hardware import DEVICES, MODELS
from headwater.runs.memory_estimate import FOUR_BITS, pass_bytes, persistent_bytes
from headwater.runs.setup import prepared
from headwater.training.update import make_optimizer, update
from runs import TINY, call, held, infos, rows, sets, temporary, tiny
from tiny import CPU, rollout_of, stage_of, taught, tiny_folder
from tiny import MODELS as TINY_MODELS

CHANGES = (
    "stages.teacher_rl.sparse.kl_coef=0.01",  # rollouts without a signal are then trained on too, so costs are known beforehand
    "stages.student_rl.sparse.kl_coef=0.01", "conditions.problems=3", "evaluate.samples=4", "stages.opd.steps=4",
)  # fmt: skip


@cache
def measured() -> Path:
    out = temporary() / "run"
    said = tiny("run", out, changes=CHANGES)
    assert said.code == 0, said.err
    return out


def mean_tokens(out: Path) -> float:
    """Of all completions that the run sampled."""
    lengths = [row["tokens"] for path in out.glob("nodes/*/rollouts/*.jsonl") for row in rows(path)]
    return sum(lengths) / len(lengths)


def test_tokens_and_flops_of_every_node_are_those_of_its_ledger_within_a_quarter() -> None:
    out = measured()
    recipe = find_recipe("pocket", [*TINY, *CHANGES])
    with prepared(recipe, ["bridge_rl"], [0]) as (plan, inputs):
        said = {one.name: one for one in estimates(plan, inputs, Assumptions(mean_tokens(out)))}
        most = {one.name: one for one in estimates(plan, inputs)}
    spent: dict[str, dict[str, float]] = {}
    for folder, _ in infos(out):
        ledger = rows(folder / "ledger.jsonl")
        spent[folder.name] = {
            key: sum(row[key] for row in ledger) for key in ("flops", "tokens_sampled", "tokens_teacher_scored")
        }
    assert spent.keys() == said.keys()
    for name, one in spent.items():
        assert most[name].flops >= one["flops"] and most[name].tokens_sampled >= one["tokens_sampled"], name
    # Models of this size say more or less than the mean in one stage or another; all of them together do not.
    for key in ("flops", "tokens_sampled", "tokens_teacher_scored"):
        total, told = sum(one[key] for one in spent.values()), sum(getattr(one, key) for one in said.values())
        print(f"{key}: {told:.4g} said, {total:.4g} spent")
        assert told == pytest.approx(total, rel=0.25), key


def test_labels_and_steps_are_what_the_run_then_did() -> None:
    answer = call("run", "pocket", "--dry-run", "--json", *sets(*CHANGES))
    said = {one["node"]: one for one in json.loads(answer.out)}
    for folder, info in infos(measured()):
        if info["kind"] == "train":
            assert said[folder.name]["steps"] == len(rows(folder / "metrics.jsonl"))
            allowed = info["labels"]["distinct_allowed"] if info["labels"] else 0
            assert said[folder.name]["labels"] == allowed


# Recipes whose data and models are not here ---------------------------------------------------------------------------


def told(recipe: str, *options: str) -> list[dict[str, Any]]:
    answer = call("study", recipe, "--dry-run", "--json", *options)
    assert answer.code == 0, answer.err
    found: list[dict[str, Any]] = json.loads(answer.out)
    return found


@pytest.mark.parametrize(
    ("recipe", "device", "count"),
    [("paper-qwen3-1.7b", "h200", 16), ("paper-llama-8b", "h200", 64), ("gsm8k", "rtx4090", 1)],
)
def test_a_recipe_of_real_models_is_estimated_without_data_weights_or_network(
    recipe: str, device: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = told(
        recipe, "--arms", "direct_grpo,bridge,bridge_rl,replay,teacher_2h,warmup_only", "--on", f"{count}x{device}"
    )
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        by_stage.setdefault(one["node"].split(".")[0], []).append(one)
    assert by_stage.keys() >= {"base_student", "teacher_rl", "teacher_rollouts", "warmup", "opd", "student_rl"}
    assert all(one["labels"] == 0 for stage in ("warmup", "opd", "teacher_rollouts") for one in by_stage[stage])
    assert max(one["peak_bytes"] for one in found) < DEVICES[device].memory  # what the recipe's head promises
    assert all(one["gpu_hours"] == pytest.approx(count * one["hours"]) and one["hours"] > 0 for one in found)
    assert not list(tmp_path.iterdir())


def test_the_papers_numbers_of_steps_follow_from_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = {one["node"].split(".")[0]: one for one in told("paper-qwen3-1.7b", "--arms", "bridge")}
    assert found["teacher_rl"]["steps"] == 21_748  # 10 epochs of 17,398 prompts, 8 a step
    assert found["teacher_rl"]["labels"] == 17_398
    assert found["opd"]["steps"] == found["warmup"]["steps"] == 272  # one epoch, 64 prompts a step
    # 17,398 prompts × 8 rollouts of 16,384 tokens, sampled once and scored once by 8.2 billion weights: 2 FLOPs each and attention
    flops = 17_398 * 8 * (16_384 + 3_072) * 2 * 2 * 7.57e9
    assert flops < found["teacher_rollouts"]["flops_at_most"] < 2.1 * flops


def test_data_of_unknown_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call("run", "gsm8k", "--dry-run", "--set", "data.labeled=elsewhere.jsonl")
    assert answer.code == 2
    assert "data.labeled: elsewhere.jsonl is not here, and data.labeled.limit does not say" in answer.err
    text = call("run", "gsm8k", "--dry-run", "--on", "rtx4090").out
    assert "data.labeled: gsm8k/train.jsonl is not here; assumed to hold 7,473 problems, its limit" in text
    assert "which fits" in text and "GPU-hours" in text


# Shapes ---------------------------------------------------------------------------------------------------------------

BILLIONS = {
    "Qwen/Qwen3-0.6B": 0.596, "Qwen/Qwen3-1.7B": 1.72, "Qwen/Qwen3-4B": 4.02, "Qwen/Qwen3-8B": 8.19, "Qwen/Qwen3-14B": 14.77,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03, "meta-llama/Llama-3.3-70B-Instruct": 70.55,
}  # fmt: skip
"""Parameters that their publishers count."""


@pytest.mark.parametrize("name", MODELS)
def test_known_models_have_the_parameters_that_their_publishers_count(name: str) -> None:
    assert Shape.from_fields(MODELS[name]).parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.003)


def test_memory_of_what_is_held_is_what_each_part_takes() -> None:
    shape = Shape.from_fields(MODELS["Qwen/Qwen3-8B"])
    whole = persistent_bytes(shape, 0, False, (), 2)
    assert whole == 18.0 * shape.parameters  # float32 weights, gradients, two moments, and the copy that autocast makes
    adapter = shape.adapter_parameters(16, None)
    assert adapter == 43_646_976  # 36 layers × 16 × (4096+4096 + 2·(4096+1024) + 4096+4096 + 3·(4096+12288))
    assert persistent_bytes(shape, adapter, False, (), 2) == 2.0 * shape.parameters + 16.0 * adapter
    rest = shape.parameters - shape.body_parameters
    four = persistent_bytes(shape, adapter, True, (shape,), 2)
    assert four == pytest.approx(FOUR_BITS * shape.body_parameters + 2 * rest + 16 * adapter + 2 * shape.parameters)


# Memory ---------------------------------------------------------------------------------------------------------------

MEASURED = {
    "all weights": ("grpo", {}, None),
    "distillation": ("opd", {}, None),
    "recomputed": ("grpo", {"gradient_checkpointing": True}, None),
    "distillation, recomputed": ("opd", {"gradient_checkpointing": True}, None),
    "adapter": ("grpo", {}, Lora(r=8, alpha=16)),
    "adapter, recomputed": ("opd", {"gradient_checkpointing": True}, Lora(r=8, alpha=16)),
    "bfloat16": ("grpo", {"dtype": "bfloat16"}, None),
}
"""What is trained how, and held against what the tensor library's allocator then counts."""


def most_allocated(do: Callable[[], object], folder: Path) -> float:
    """Bytes of tensors at once, over those that were there before; what the allocator itself wrote down."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as read:
        do()
    read.export_chrome_trace(str(folder / "trace.json"))
    events = [one for one in held(folder / "trace.json")["traceEvents"] if one.get("name") == "[memory]"]
    events.sort(key=lambda one: one["ts"])
    before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return float(max(one["args"]["Total Allocated"] for one in events) - before)


@pytest.mark.parametrize("case", MEASURED)
def test_memory_of_an_update_is_what_the_allocator_counts_within_a_quarter(case: str, tmp_path: Path) -> None:
    objective, how, adapt = MEASURED[case]
    if adapt is not None and importlib.util.find_spec("peft") is None:
        pytest.skip("the extra `lora` is not installed")
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 32, "vocab_size": 2048}
    folder = tiny_folder(tmp_path / "model", std=0.02, **sizes)
    models, wanted = TINY_MODELS.model_copy(update=how), None if adapt is None else lora.AdapterSpec(adapt, (0,))
    policy = load_policy(
        ModelFolder.open(str(folder), "models.student"), LoadOptions(models, CPU, frozen=False, adapter=wanted)
    )
    stage, tokens = stage_of(objective, batch_size=16, group_size=4), 16 * 128
    made = [rollout_of((1, 6, 2, row % 9), tuple(3 + (row + at) % 20 for at in range(124))) for row in range(16)]
    found = [Row(one, advantage=1.0 if row % 2 else -1.0) for row, one in enumerate(made)]
    if objective == "opd":
        found = taught(
            found,
            load_policy(ModelFolder.open(str(folder), "models.teacher"), LoadOptions(TINY_MODELS, CPU, frozen=True)),
        )
    there = sum(one.numel() * one.element_size() for one in policy.model.parameters())
    optimizer = make_optimizer(policy, stage.optim)
    grown = most_allocated(
        lambda: [update(policy, optimizer, found, objective_of(stage), stage, tokens) for _ in range(2)], tmp_path
    )
    width, logits = 2 if models.dtype == "bfloat16" else 4, 2 if objective == "opd" else 1
    more = 0 if policy.adapter is None else policy.adapter.parameters
    work = pass_bytes(policy.shape, tokens, width, models.gradient_checkpointing, cuda=False, logits=logits)
    said = persistent_bytes(policy.shape, more, False, (), width) + work
    print(f"{case}: {said / 1e6:.1f} MB said, {(there + grown) / 1e6:.1f} MB measured")
    assert said == pytest.approx(there + grown, rel=0.25)
