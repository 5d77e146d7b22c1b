"""Estimates of the dry run against what runs then do."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from headwater.config.builtin import builtin_text, find_recipe
from headwater.report.format import units
from headwater.runs.estimate import Assumptions, estimates
from headwater.runs.hardware import DEVICES
from headwater.runs.setup import prepared
from runs import TINY, WHOLE_ARM, call, infos, rows, sets, temporary, tiny

CHANGES = (
    "stages.teacher_rl.sparse.kl_coef=0.01",  # rollouts without a signal are then trained on too, so costs are known beforehand
    "stages.student_rl.sparse.kl_coef=0.01", "conditions.problems=3", "evaluate.samples=4", "stages.opd.steps=4",
)  # fmt: skip


@cache
def measured() -> Path:
    out = temporary() / "run"
    result = tiny("run", out, changes=CHANGES)
    assert result.code == 0, result.err
    return out


def mean_tokens(out: Path) -> float:
    """Of all completions that the run sampled."""
    lengths = [row["tokens"] for path in out.glob("nodes/*/rollouts/*.jsonl") for row in rows(path)]
    return sum(lengths) / len(lengths)


def test_estimated_tokens_and_flops_are_within_quarter_of_ledger() -> None:
    out = measured()
    recipe = find_recipe("pocket", [*TINY, *CHANGES])
    with prepared(recipe, ["bridge_rl"], [0]) as (plan, inputs):
        result = {estimate.name: estimate for estimate in estimates(plan, inputs, Assumptions(mean_tokens(out)))}
        most = {estimate.name: estimate for estimate in estimates(plan, inputs)}
    spent: dict[str, dict[str, float]] = {}
    for folder, _ in infos(out):
        ledger = rows(folder / "ledger.jsonl")
        spent[folder.name] = {
            key: sum(row[key] for row in ledger) for key in ("flops", "tokens_sampled", "tokens_teacher_scored")
        }
    assert spent.keys() == result.keys()
    for name, amounts in spent.items():
        assert most[name].flops >= amounts["flops"] and most[name].tokens_sampled >= amounts["tokens_sampled"], name
    # Models of this size say more or less than the mean in one stage or another; all of them together do not.
    for key in ("flops", "tokens_sampled", "tokens_teacher_scored"):
        total, estimated = (
            sum(amounts[key] for amounts in spent.values()),
            sum(getattr(estimate, key) for estimate in result.values()),
        )
        print(f"{key}: {estimated:.4g} estimated, {total:.4g} spent")
        assert estimated == pytest.approx(total, rel=0.25), key


def test_estimated_labels_and_steps_equal_run() -> None:
    answer = call("run", "pocket", *WHOLE_ARM, "--dry-run", "--json", *sets(*CHANGES))
    result = {row["node"]: row for row in json.loads(answer.out)}
    for folder, info in infos(measured()):
        if info["kind"] == "train":
            assert result[folder.name]["steps"] == len(rows(folder / "metrics.jsonl"))
            used = {
                label for row in rows(folder / "ledger.jsonl") if row["purpose"] == "train" for label in row["labels"]
            }
            assert result[folder.name]["labels"] == len(used)


# Recipes whose data and models are not here ---------------------------------------------------------------------------


def dry_run(recipe: str, *options: str) -> list[dict[str, Any]]:
    answer = call("study", recipe, "--dry-run", "--json", *options)
    assert answer.code == 0, answer.err
    rows_: list[dict[str, Any]] = json.loads(answer.out)
    return rows_


def test_table_of_devices_page_equals_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/devices.md, "One, eight, sixteen GPUs": every cell."""
    page = (Path(__file__).parents[3] / "docs" / "devices.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if re.match(r"\| \d+ \| paper-", line)]
    assert len(lines) == 12
    monkeypatch.chdir(tmp_path)
    arms, planned = ("--arms", "direct_grpo,bridge"), cache(dry_run)
    for line in lines:
        count, recipe, sampler, stage, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows_ = planned(recipe, *arms, "--on", f"{count}xH100", "--set", f"compute.sampler={sampler}")
        node = next(row for row in rows_ if row["node"].startswith(f"{stage}."))
        parts = [*node["device_bytes"].values(), node["peak_bytes"]]
        assert cells == [units(value, "B") if value else "" for value in parts], line


@pytest.mark.parametrize(
    ("recipe", "device", "count"),
    [
        ("paper-qwen3-1.7b", "h200", 16),
        ("paper-llama-8b", "h200", 64),
        ("gsm8k", "rtx4090", 1),
        ("gsm8k-qwen2.5", "rtx4090", 1),
        ("gsm8k-qwen3", "rtx4090", 1),
        ("paper-qwen3-one-gpu", "rtx4090", 1),
        ("paper-llama-one-gpu", "rtx4090", 1),
    ],
)
def test_recipe_of_real_models_is_estimated_without_data_or_weights(
    recipe: str, device: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sharded = ["--set", "compute.sampler=vllm", "--set", "compute.vllm.tensor_parallel_size=4"]
    assert (recipe == "paper-llama-8b") == (" ".join(sharded) in builtin_text(recipe))
    engine = sharded if recipe == "paper-llama-8b" else []
    arms = "direct_grpo,bridge,bridge_rl,replay,teacher_2h,warmup_only"
    rows_ = dry_run(recipe, "--arms", arms, "--on", f"{count}x{device}", *engine)
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for row in rows_:
        by_stage.setdefault(row["node"].split(".")[0], []).append(row)
    assert by_stage.keys() >= {"base_student", "teacher_rl", "teacher_rollouts", "warmup", "opd", "student_rl"}
    assert all(row["labels"] == 0 for stage in ("warmup", "opd", "teacher_rollouts") for row in by_stage[stage])
    assert max(row["peak_bytes"] for row in rows_) < DEVICES[device].memory  # what the recipe's head promises
    assert all(row["gpu_hours"] == pytest.approx(count * row["hours"]) and row["hours"] > 0 for row in rows_)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("gsm8k-qwen2.5", ["models.lora=null"]),
        ("gsm8k-qwen3", ["models.lora=null", "compute.microbatch_tokens=4096", "compute.sample_batch=32"]),
        ("paper-qwen3-one-gpu", ["models.lora.quantize=null"]),
        ("paper-llama-one-gpu", ["models.lora.quantize=null"]),
    ],
)
def test_one_gpu_recipe_fits_80_gb_with_settings_named_in_its_head(
    recipe: str, changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    head = " ".join(builtin_text(recipe).split("\nname:")[0].replace("\n#", " ").split())
    assert all(f"--set {change}" in head for change in changes)
    options = [word for change in changes for word in ("--set", change)]
    estimated = dry_run(recipe, "--arms", "direct_grpo,bridge", "--on", "h100", *options)
    assert max(row["peak_bytes"] for row in estimated) < 0.98 * DEVICES["h100"].memory


def test_smollm2_recipe_takes_under_90_minutes_on_two_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 55 GFLOP/s on one core and 1.6 of it on two, with the mean lengths that were measured (docs/results-real.md)."""
    monkeypatch.chdir(tmp_path)
    arms = "direct_grpo,bridge,opd_only,warmup_only,teacher_sft"
    estimated = dry_run("smollm2-arithmetic", "--arms", arms, "--mean-tokens", "30", "--set", "prompt.max_tokens=135")
    assert sum(row["flops_at_most"] for row in estimated) / (1.6 * 55e9) < 90 * 60
    assert max(row["peak_bytes"] for row in estimated) < 12e9


def test_estimate_of_paper_recipe_has_its_numbers_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_stage = {row["node"].split(".")[0]: row for row in dry_run("paper-qwen3-1.7b", "--arms", "bridge")}
    assert by_stage["teacher_rl"]["steps"] == 21_748  # 10 epochs of 17,398 prompts, 8 a step
    assert by_stage["teacher_rl"]["labels"] == 17_398
    assert by_stage["opd"]["steps"] == by_stage["warmup"]["steps"] == 272  # one epoch, 64 prompts a step
    # 17,398 prompts × 8 rollouts of 16,384 tokens, sampled once and scored once by 8.2 billion weights: 2 FLOPs each and attention
    flops = 17_398 * 8 * (16_384 + 3_072) * 2 * 2 * 7.57e9
    assert flops < by_stage["teacher_rollouts"]["flops_at_most"] < 2.1 * flops


def test_estimate_names_data_of_unknown_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call("run", "gsm8k", "--dry-run", "--set", "data.labeled=elsewhere.jsonl")
    assert answer.code == 2
    assert "data.labeled: elsewhere.jsonl: no such file" in answer.err
    assert "(an estimate needs the file, or data.labeled.limit)" in answer.err
    text = call("run", "gsm8k", "--dry-run", "--on", "rtx4090").out
    assert "data.labeled: gsm8k/train.jsonl is not here; assumed to hold 7,473 problems, its limit" in text
    assert "which fits" in text and "GPU-hours" in text


def test_moe_estimate_uses_active_flops_and_memory_of_all_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = ["--set", "models.teacher=Qwen/Qwen3-30B-A3B"]
    text = call("run", "paper-qwen3-1.7b", "--arm", "bridge", "--dry-run", *models).out
    assert "models.teacher: 30.5G parameters, of which a token uses 3.35G (8 experts of a layer)" in text
    assert "models.student: 1.72G" not in text
    by_stage = {row["node"].split(".")[0]: row for row in dry_run("paper-qwen3-1.7b", "--arms", "bridge", *models)}
    # 17,398 prompts × 8 rollouts of 16,384 tokens, sampled and scored by the 3.04 billion weights that multiply a token.
    flops = 17_398 * 8 * (16_384 + 3_072) * 2 * 2 * 3.04e9
    assert flops < by_stage["teacher_rollouts"]["flops_at_most"] < 3 * flops
    assert by_stage["teacher_rollouts"]["memory_bytes"] == pytest.approx(2 * 30.53e9, rel=0.001)
    # Weights, gradients, two moments, the copy in bfloat16, and the KL reference.
    assert by_stage["teacher_rl"]["memory_bytes"] == pytest.approx((16 + 2 + 2) * 30.53e9, rel=0.001)
