"""Rules of `headwater init mine`: facts in, settings out, each against a value computed by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from headwater.config import yaml
from headwater.config.commented_yaml import Setting, commented_yaml, flow
from headwater.config.fitted import (
    DataFacts,
    DeviceFacts,
    Effort,
    Form,
    ModelFacts,
    duration,
    forms,
    max_tokens,
    passes,
    steps_for,
)
from headwater.config.fitted_recipe import FittedRecipe
from headwater.config.learning_rates import judge_rate
from headwater.config.recipe import Recipe, parse_recipe

STUDENT = ModelFacts("/models/s", 494_000_000, 151_936, 32_768, 12_288, True, True, {"temperature": 0.7, "top_p": 0.8})
TEACHER = replace(STUDENT, name="/models/t", parameters=1_544_000_000, cache_numbers=14_336)
DATA = DataFacts(
    path="train.jsonl", evals_path="test.jsonl", task="maths", task_reason="7473 of 7473 answers hold a number", labels=300,
    held_out=1319, held_out_share=None, prompt_tokens=256, solution_tokens=(120.0, 220.0), asks_for_form=False,
)  # fmt: skip
H100 = DeviceFacts("cuda", "h100", 80 * 2**30, 0.4 * 989.4e12, "datasheet")
LAPTOP = DeviceFacts("cpu", "cpu with 2 cores", 22 * 2**30, 40e9, "measured")


def fitted(**changes: Any) -> FittedRecipe:
    return FittedRecipe(
        **({"student": STUDENT, "teacher": TEACHER, "data": DATA, "device": H100, "form": Form("bfloat16")} | changes)
    )


def recipe_of(settings: FittedRecipe) -> Recipe:
    return parse_recipe(yaml.read(settings.text(), "text"), "text")


@pytest.mark.parametrize(
    ("changes", "positions", "tokens"),
    [
        ({}, 32_768, 448),  # 2 × 220 = 440, up to a multiple of 64
        ({}, None, 448),
        ({}, 512, 256),  # 512 − 256
        ({"solution_tokens": None}, 32_768, 1024),
        ({"solution_tokens": None, "task": "choice"}, 32_768, 512),
        ({"solution_tokens": None, "task": "my_graders:same"}, 32_768, 512),
    ],
)
def test_max_tokens_follow_solutions_task_and_positions(
    changes: dict[str, Any], positions: int | None, tokens: int
) -> None:
    assert max_tokens(replace(DATA, **changes), positions).value == tokens


@pytest.mark.parametrize(
    ("wanted", "one_pass", "most_passes", "seconds", "steps"),
    [
        (200, 64, 10, 1.0, 200),
        (200, 300, 10, 1.0, 300),  # at least one pass
        (200, 2, 10, 1.0, 20),  # at most ten
        (200, 17, 10, 300.0, 24),  # 7,200 s of 300 s each
        (200, 17, 10, 3000.0, 5),  # never fewer than five
        (200, 1, 3, 3000.0, 3),  # unless the passes allow no more
    ],
)
def test_steps_follow_passes_and_time(wanted: int, one_pass: int, most_passes: int, seconds: float, steps: int) -> None:
    assert steps_for(wanted, one_pass, most_passes, seconds) == steps


def test_recipe_for_gpu_is_valid_and_follows_labels() -> None:
    recipe = recipe_of(fitted())
    stages = recipe.stages
    assert (recipe.models.student, recipe.models.teacher, recipe.models.dtype) == ("/models/s", "/models/t", "bfloat16")
    assert recipe.models.lora is None and recipe.labels.budget == 300 and recipe.data.labeled.path == "train.jsonl"
    # 128 rollouts are 16 problems; 300 labels are 18.75 steps a pass, so ten passes are 190 steps
    assert (stages.teacher_rl.steps, stages.teacher_rl.batch_size, stages.teacher_rl.group_size) == (190, 128, 8)
    # 2,400 cached rollouts are 37.5 steps of 64; 60 are wanted
    assert (stages.warmup.steps, stages.warmup.batch_size, stages.warmup.dense.top_k) == (60, 64, 64)
    assert (stages.opd.steps, stages.opd.batch_size, stages.opd.group_size) == (100, 64, 4)
    assert [stage.optim.lr for stage in (stages.teacher_rl, stages.warmup, stages.opd, stages.student_rl)] == [
        1e-6,
        3e-5,
        3e-5,
        3e-6,
    ]
    assert {
        stage.sampling.max_tokens for stage in (stages.teacher_rl, stages.warmup, stages.opd, stages.student_rl)
    } == {448}
    assert recipe.prompt.max_tokens == 320 and recipe.prompt.template.endswith("within \\boxed{}.")
    assert (recipe.data.evals["held_out"].path, recipe.data.evals["held_out"].limit) == ("test.jsonl", 500)
    sampling = recipe.evaluate.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, recipe.evaluate.samples) == (0.7, 0.8, 448, 4)


def test_recipe_for_slow_device_uses_fewer_labels_rollouts_and_problems() -> None:
    """A token of a GRPO step costs 8 FLOPs a parameter, a rollout has 224 + 256 tokens: 16 rollouts take 2,372 s at 40 GFLOP/s."""
    settings = fitted(device=LAPTOP, form=Form("float32"))
    assert settings.rl_seconds("teacher", 16) == pytest.approx(16 * 480 * 8 * 1.544e9 / 40e9)
    recipe = recipe_of(settings)
    stage = recipe.stages.teacher_rl
    assert (stage.batch_size, stage.steps) == (16, 5)
    assert recipe.labels.budget == 8  # 5 steps of 2 problems, down to a multiple of 8
    assert recipe.evaluate.samples == 1 and recipe.compute.workers == 1 and recipe.models.dtype == "float32"
    assert recipe.data.evals["held_out"].limit == int(600 / (480 * 2 * 1.544e9 / 40e9))
    assert "--hours changes the limit" in settings.text() and "--device h100" in settings.text()


def test_estimated_times_stand_in_head_and_beside_steps() -> None:
    text = fitted(
        times={"total": 5400.0, "teacher_rl": 1200.0, "warmup": 60.0, "opd": 600.0, "student_rl": 12.0}
    ).text()
    assert "# time     1.5 h for `headwater run my.yaml`" in text
    assert "overhead of small models come on top" in text
    lines = [line for line in text.splitlines() if "steps" in line and "; about " in line]
    assert [line.split("; about ")[1] for line in lines] == ["20 min", "60 s", "10 min", "12 s"]


def test_smaller_effort_gives_smaller_sizes_and_longer_patience() -> None:
    large, small = fitted(device=LAPTOP), fitted(device=LAPTOP, effort=Effort.scaled(0.01))
    assert (small.rollouts, small.transfer_rollouts, small.budget) == (8, 8, 8)
    assert recipe_of(small).stages.teacher_rl.steps == 2
    assert (large.rollouts, large.patience, small.patience) == (16, 8, 15)  # 15 groups of 2 and 1 a step
    assert recipe_of(small).guards.patience == 15 and "guards" not in fitted().text()


def test_recipe_with_held_out_part_divides_one_file() -> None:
    recipe = recipe_of(fitted(data=replace(DATA, evals_path="train.jsonl", held_out_share=0.2, held_out=60)))
    assert recipe.data.labeled.hash_range == (0.2, 1.0) and recipe.data.evals["held_out"].hash_range == (0.0, 0.2)
    assert recipe.data.labeled.path == recipe.data.evals["held_out"].path == "train.jsonl"
    assert recipe.data.evals["held_out"].limit is None


@pytest.mark.parametrize("device", [H100, LAPTOP])
def test_every_form_gives_valid_recipe_with_published_rates(device: DeviceFacts) -> None:
    for form in forms(device.kind):
        recipe = recipe_of(fitted(device=device, form=form))
        lora = recipe.models.lora
        assert (() if lora is None else tuple(sorted(lora.roles))) == tuple(sorted(form.adapted))
        assert recipe.models.gradient_checkpointing == form.checkpointing
        assert (lora is not None and lora.quantize == "nf4") == form.quantize
        assert lora is None or lora.output == "adapter"  # a stage keeps no whole model
        rates = {
            ("teacher", "teacher_rl"): "reward",
            ("student", "warmup"): "teacher",
            ("student", "student_rl"): "reward",
        }
        for (role, stage), signal in rates.items():
            rate, adapters = getattr(recipe.stages, stage).optim.lr, role in form.adapted
            parameters = (STUDENT if role == "student" else TEACHER).parameters
            assert judge_rate(rate, signal, adapters, parameters) is None  # type: ignore[arg-type]
            whole = {"reward": 1e-6, "teacher": 1e-5}[signal] * (3 if role == "student" else 1)
            assert rate == pytest.approx(10 * {"reward": 1e-6, "teacher": 1e-5}[signal] if adapters else whole)


def test_small_vocabulary_keeps_whole_distributions_and_small_overlap() -> None:
    recipe = recipe_of(fitted(student=replace(STUDENT, vocabulary=28), teacher=replace(TEACHER, vocabulary=28)))
    assert recipe.stages.warmup.dense.top_k is None and recipe.conditions.top_k == 7


def test_problems_asking_for_box_get_no_second_request() -> None:
    assert recipe_of(fitted(data=replace(DATA, asks_for_form=True))).prompt.template == "{problem}"


def test_every_value_but_names_has_comment_with_reason() -> None:
    """Each line with a value has a comment beside it or above it, once for stages that repeat a value."""
    lines = fitted().text().splitlines()
    bare = [
        line.split(":")[0].strip()
        for above, line in pairwise(lines)
        if line and "#" not in line and not line.endswith(":") and not above.lstrip().startswith("#")
    ]
    assert set(bare) == {"name", "seed", "student", "teacher", "objective", "sampling", "sparse"}


def test_sample_batch_fits_cache_into_fifth_of_memory() -> None:
    settings = fitted(device=replace(H100, memory=8 * 2**30))
    row = (320 + 448) * 14_336 * 2
    assert settings.sample_batch() * row <= 8 * 2**30 / 5 < 2 * settings.sample_batch() * row


@pytest.mark.parametrize(
    "value",
    [3e-6, 1e-4, 0.05, 0.2, 1, True, None, "plain", "no", "NULL", "a: b # c", "~", "1e3", "./data/x.jsonl", "C:\\x", [0, 0.2],
     {"lr": 3e-6, "warmup": 0.05}, "{problem}\n\\boxed{}", "pocket:qwen3-student", "ünï", "5", "-", ""],
)  # fmt: skip
def test_flow_values_are_read_back_equal(value: Any) -> None:
    assert yaml.read(f"x: {flow(value)}", "") == {"x": value}
    assert yaml.read(f"x: {flow({'inner': value})}", "") == {"x": {"inner": value}}


def test_commented_yaml_puts_long_comments_above() -> None:
    text = commented_yaml({"a": Setting(1, "short"), "b": Setting({"c": Setting(2, "word " * 40)}, "block")})
    assert text.splitlines()[0] == "a: 1".ljust(38) + "  # short"
    assert text.splitlines()[1] == "b:".ljust(38) + "  # block"
    assert text.splitlines()[2].startswith("  # word word") and text.splitlines()[-1] == "  c: 2"
    assert yaml.read(text, "") == {"a": 1, "b": {"c": 2}}


def test_durations_and_passes_read_naturally() -> None:
    assert [duration(seconds) for seconds in (12.3, 600, 5400, 86_400)] == ["12 s", "10 min", "1.5 h", "24 h"]
    assert [passes(number) for number in (1.0, 0.5, 1.25, 10)] == ["1 pass", "0.5 passes", "1.2 passes", "10 passes"]
