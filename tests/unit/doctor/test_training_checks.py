"""Doctor checks of learning rates, completion lengths, the measured overlap and the teacher cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headwater.config.builtin import find_recipe
from headwater.config.learning_rates import judge_rate, suggested_rate
from headwater.doctor import resource_checks, training_checks
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding
from headwater.runs.inputs import RunInputs
from runs import TINY
from tiny import tiny_folder

SMOLLM2 = 134_515_008  # parameters of SmolLM2-135M, as its model card counts them
STAGES = ("teacher_rl", "warmup", "opd", "student_rl")


def context_of(
    tmp_path: Path, *changes: str, arms: Sequence[str] = ("bridge_rl",), size: dict[str, Any] | None = None
) -> DoctorContext:
    """The pocket recipe with the shapes of both models changed in the fields of `size`."""
    inputs = RunInputs(find_recipe("pocket", [*TINY, *changes]), need_answers=False)
    for role in ("student", "teacher") if size else ():
        inputs.memo[("shape", role)] = replace(inputs.shape(role), **(size or {}))
    return DoctorContext(inputs, tuple(arms), (0,), tmp_path / "out")


def texts(findings: Sequence[Finding]) -> list[str]:
    return [finding.text() for finding in findings]


# Settings without effect ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "arm", "expected"),
    [
        (
            "stages.student_rl.dense={teacher_weights: {start: 1}, top_k: 4}",
            "bridge_rl",
            "stages.student_rl.dense.teacher_weights and stages.student_rl.dense.top_k: objective grpo has no teacher",
        ),
        ("stages.opd.sparse.kl_coef=0.1", "bridge", "stages.opd.sparse.kl_coef: objective opd has no reward"),
        ("stages.student_rl.dense.top_k=4", "bridge", None),  # the arm has no such stage
        ("stages.opd.sparse.kl_coef=0.1", "mixed", None),  # the arm mixes the stage with a reward
        ("stages.opd.dense.top_k=4", "bridge_rl", None),
    ],
)
def test_setting_of_absent_signal_is_warning(setting: str, arm: str, expected: str | None, tmp_path: Path) -> None:
    given = [
        (finding.name, finding.evidence)
        for finding in training_checks.settings_without_effect(context_of(tmp_path, setting, arms=[arm]))
    ]
    assert given == ([] if expected is None else [("setting-without-effect", expected)])


# Learning rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "signal", "adapters", "parameters", "verdict"),
    [
        (1e-3, "teacher", False, SMOLLM2, "high"),  # the pocket recipe's warm-up, OPD and GRPO on a real model
        (5e-4, "teacher", False, SMOLLM2, "high"),
        (3e-4, "reward", False, 8_000_000_000, "high"),
        (1e-4, "reward", False, SMOLLM2, "high"),
        (5e-5, "teacher", False, 8_000_000_000, None),  # tinker-cookbook, OPD on all weights
        (1e-4, "teacher", False, 8_000_000_000, None),  # tinker-cookbook, fine-tuning of all weights
        (1e-3, "teacher", True, 8_000_000_000, None),  # tinker-cookbook, fine-tuning of adapters
        (2e-4, "teacher", True, 7_000_000_000, None),  # QLoRA
        (1e-6, "reward", False, 8_000_000_000, None),  # 2605.12483
        (1e-6, "reward", True, 8_000_000_000, "low"),  # the same on adapters
        (1e-6, "teacher", True, SMOLLM2, "low"),
        (1e-2, "teacher", True, SMOLLM2, "high"),
        (1e-3, "teacher", False, 600_000, None),  # pocket models
        (3e-4, "reward", False, 62_000_000, None),  # desk models
    ],
)
def test_judge_rate_agrees_with_published_settings(
    rate: float, signal: Any, adapters: bool, parameters: int, verdict: str | None
) -> None:
    assert judge_rate(rate, signal, adapters, parameters) == verdict


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("signal", ["reward", "teacher"])
@pytest.mark.parametrize("parameters", [SMOLLM2, 8_000_000_000])
def test_suggested_rate_is_never_judged_wrong(signal: Any, adapters: bool, parameters: int) -> None:
    assert judge_rate(suggested_rate(signal, adapters, parameters), signal, adapters, parameters) is None


def test_suggested_rate_is_larger_for_small_models_and_adapters() -> None:
    assert suggested_rate("reward", False, 8_000_000_000) == 1e-6
    assert suggested_rate("reward", False, SMOLLM2) == 3e-6
    assert suggested_rate("teacher", False, 1_500_000_000) == 1e-5
    assert suggested_rate("teacher", True, SMOLLM2) == 1e-4


def test_pocket_learning_rates_on_real_model_size_are_named(tmp_path: Path) -> None:
    findings = list(training_checks.learning_rates(context_of(tmp_path, size={"parameters": SMOLLM2})))
    assert {finding.name for finding in findings} == {"learning-rate-high"}
    warmup = next(text for text in texts(findings) if "stages.warmup.optim.lr" in text)
    assert "0.001 trains all weights of models.student (135 million parameters, pretrained)" in warmup
    assert "-> set stages.warmup.optim.lr=3e-05" in warmup and "train adapters (models.lora) at 0.0001" in warmup
    assert {text.split()[2].removesuffix(":") for text in texts(findings)} == {f"stages.{s}.optim.lr" for s in STAGES}


def test_pocket_learning_rates_on_pocket_models_are_not_judged(tmp_path: Path) -> None:
    assert list(training_checks.learning_rates(context_of(tmp_path))) == []


def test_learning_rate_too_low_for_adapters_is_named(tmp_path: Path) -> None:
    changes = ["models.lora={r: 4}", *(f"stages.{stage}.optim.lr=1e-6" for stage in STAGES)]
    findings = list(training_checks.learning_rates(context_of(tmp_path, *changes, size={"parameters": SMOLLM2})))
    assert {finding.name for finding in findings} == {"learning-rate-low"} and len(findings) == 4
    assert "set stages.student_rl.optim.lr=1e-05 (published: 1e-5, ten times that of all weights" in "".join(
        texts(findings)
    )


def test_learning_rate_of_untrained_model_is_not_judged(tmp_path: Path) -> None:
    """Weights near 0 give uniform draws; those of the same size with structure are called pretrained."""
    random, peaked = tiny_folder(tmp_path / "random", std=1e-4), tiny_folder(tmp_path / "peaked", std=1.0)
    for folder, expected in ((random, []), (peaked, ["learning-rate-high"])):
        changes = f"models.student={folder}", f"models.teacher={folder}", "stages.student_rl.optim.lr=1e-2"
        context = context_of(tmp_path, *changes, arms=("direct_grpo",), size={"parameters": SMOLLM2})
        assert [finding.name for finding in training_checks.learning_rates(context)] == expected


# Lengths ----------------------------------------------------------------------------------------------------------------


def endless(tmp_path: Path, limit: int, exhaustive: bool = True) -> DoctorContext:
    """Two models that draw an end with every 5,000th token, and stages that sample them up to a limit."""
    folder = tiny_folder(tmp_path / "endless", std=1e-4, vocab_size=5000, max_position_embeddings=4096)
    changes = [f"stages.{stage}.sampling.max_tokens={limit}" for stage in STAGES]
    context = context_of(tmp_path, *changes, f"models.student={folder}", f"models.teacher={folder}")
    return replace(context, exhaustive=exhaustive)


def test_lengths_are_judged_if_limit_exceeds_sample(tmp_path: Path) -> None:
    findings = list(training_checks.lengths(endless(tmp_path, 96)))
    assert [finding.name for finding in findings] == ["truncated", "truncated"]
    assert "of 16 sampled completions run into sampling.max_tokens 96" in findings[0].evidence


def test_lengths_of_completions_ending_in_time_give_no_finding(tmp_path: Path) -> None:
    changes = [f"stages.{stage}.sampling.max_tokens=128" for stage in STAGES]
    context = context_of(tmp_path, *changes)
    assert list(training_checks.lengths(context)) == []
    ended, begun, _ = training_checks.whole_completions(context, "student", context.sample("student"))
    assert len(ended) == begun == 16


def test_lengths_taking_too_long_are_called_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_checks, "LENGTH_SECONDS", 0.0)
    context = endless(tmp_path, 2000)
    context.memo[("sample", "student")] = replace(context.sample("student"), seconds=6.4)  # 64 tokens: 0.1 s each
    student, teacher = training_checks.lengths(context)
    assert (student.name, student.severity) == ("lengths-not-judged", "note") and teacher.name == student.name
    assert "16 of 16 sampled completions had not ended after 0 s" in student.evidence
    assert "up to sampling.max_tokens 2000 would take about 200 s here" in student.evidence


def test_lengths_beyond_sample_are_not_sampled_before_run(tmp_path: Path) -> None:
    assert list(training_checks.lengths(endless(tmp_path, 2000, exhaustive=False))) == []


# What is measured and stored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "vocabulary", "names"),
    [
        ("conditions.top_k=4", 49_152, ["overlap-top-k-small"]),
        ("conditions.top_k=16", 49_152, []),
        ("conditions.problems=0", 49_152, []),
        ("conditions.top_k=4", 28, []),
    ],
)
def test_overlap_of_few_tokens_is_named_on_large_vocabulary(
    change: str, vocabulary: int, names: list[str], tmp_path: Path
) -> None:
    context = context_of(tmp_path, change, size={"vocabulary": vocabulary})
    assert [finding.name for finding in training_checks.overlap_width(context)] == names
    alone = context_of(tmp_path, change, arms=("direct_grpo",), size={"vocabulary": vocabulary})
    assert list(training_checks.overlap_width(alone)) == []


def test_overlap_without_sampling_stage_is_refused(tmp_path: Path) -> None:
    off_policy = ("stages.teacher_rl=null", "stages.opd=null", "stages.student_rl=null")
    for overlap, changes, arm, names in (
        (1, off_policy, "own_stages", ["overlap-without-sampling"]),
        (0, off_policy, "own_stages", []),
        (1, (), "raw_teacher", []),
    ):
        context = context_of(tmp_path, f"compute.overlap={overlap}", *changes, arms=(arm,))
        assert [finding.name for finding in training_checks.sampling_ahead(context)] == names


def test_cache_of_whole_large_vocabulary_is_named(tmp_path: Path) -> None:
    """8 steps read all rollouts of 16 prompts, 4 each, of 32 tokens, of 151,936 float32."""
    context = context_of(tmp_path, "stages.warmup.steps=8", arms=("bridge",), size={"vocabulary": 151_936})
    (finding,) = [row for row in resource_checks.disk(context) if row.name == "cache-whole-vocabulary"]
    tokens = 16 * 4 * 32
    assert f"take 0.6 MiB for each token, up to {tokens * 151_936 * 4 / 2**30:.1f} GiB in all" in finding.evidence
    assert finding.remedy == "set dense.top_k=64 in the stage that reads it (stages.warmup or stages.sft)"
    smaller = context_of(tmp_path, "stages.warmup.dense.top_k=64", arms=("bridge",), size={"vocabulary": 151_936})
    assert list(resource_checks.disk(smaller)) == []
