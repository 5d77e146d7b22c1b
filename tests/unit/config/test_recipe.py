"""Recipe schema: defaults, overrides, and invalid fields refused in one sentence that names the field."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from headwater.config.prompt import Prompt
from headwater.config.recipe import Conditions, Recipe, canonical_json, parse_recipe, read_recipe
from headwater.config.stage import Sampling, Stage
from headwater.errors import UserError
from tiny import stage_of

RAW: dict[str, Any] = {
    "name": "tiny",
    "task": "sums",
    "models": {"student": "pocket:a", "teacher": "pocket:b"},
    "data": {"labeled": "train.jsonl", "evals": {"test": {"generate": {"pool": "eval", "count": 10}}}},
    "stages": {
        "teacher_rl": {"objective": "grpo", "steps": 3},
        "warmup": {"objective": "forward_kl", "epochs": 1},
        "opd": {"objective": "opd", "steps": 3},
        "student_rl": {"objective": "grpo", "steps": 3},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """RAW with one field set, or removed where the value is ..."""
    raw = copy.deepcopy(RAW)
    *keys, last = path.split(".")
    parent = raw
    for key in keys:
        parent = parent.setdefault(key, {})
    if value is ...:
        del parent[last]
    else:
        parent[last] = value
    return raw


def complaint(path: str, value: Any) -> str:
    with pytest.raises(UserError) as refused:
        parse_recipe(changed(path, value), "recipe tiny.yaml")
    message = str(refused.value)
    assert message.startswith("recipe tiny.yaml: ") and "\n" not in message and refused.value.exit_code == 2
    return message.removeprefix("recipe tiny.yaml: ")


def test_minimal_recipe_gets_paper_defaults() -> None:
    recipe = parse_recipe(RAW, "here")
    opd = recipe.stages.opd
    assert recipe.data.labeled.path == "train.jsonl"
    assert (opd.optim.lr, opd.optim.grad_clip, opd.batch_size, opd.group_size) == (1e-6, 1.0, 64, 8)
    assert (opd.sampling.temperature, opd.sampling.top_p, opd.sampling.top_k) == (1.0, 1.0, 0)
    assert (opd.sparse.clip_low, opd.sparse.clip_high, opd.sparse.kl_coef) == (0.2, 0.2, 5e-4)
    assert opd.dense.divergence == "reverse" and opd.loss_mean == "token"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stages.opd.learning_rate", 1e-6, "unknown field stages.opd.learning_rate"),
        ("extra", 1, "unknown field extra"),
        ("stages.opd.optim.lr", "fast", "stages.opd.optim.lr: input should be a valid number"),
        ("stages.opd.optim.lr", 0.0, "stages.opd.optim.lr: input should be greater than 0 (given: 0.0)"),
        ("stages.opd.optim.lr", float("nan"), "stages.opd.optim.lr: input should be a finite number"),
        ("stages.opd.optim.warmup", 1.5, "stages.opd.optim.warmup: input should be less than or equal to 1"),
        ("stages.opd.batch_size", 2.5, "stages.opd.batch_size: input should be a valid integer"),
        ("stages.opd.steps", -1, "stages.opd.steps: input should be greater than or equal to 0 (given: -1)"),
        ("stages.opd.objective", "ppo", "stages.opd.objective: input should be 'grpo', 'opd', 'mixed', 'forward_kl', "),
        ("stages.opd.sampling.temperature", 0.0, "stages.opd: sampling.temperature must be above 0"),
        ("stages.opd.dense.beta", 1.0, "stages.opd.dense.beta: input should be less than 1"),
        ("stages", {}, "stages: name at least one of teacher_rl, warmup, opd, student_rl, sft"),
        ("stages", ..., "stages: field required"),
        ("task", ..., "task is missing: name the grader of the answers of data.labeled, such as maths"),
        ("data.labeled", ..., "data: give labeled (problems with answers) or unlabeled (prompts alone)"),
        ("models.student", ..., "models.student: field required"),
        ("models.dtype", "float16", "models.dtype: input should be 'float32' or 'bfloat16' (given: 'float16')"),
        ("labels.budget", 0, "labels.budget: input should be greater than or equal to 1 (given: 0)"),
        ("labels.split", "third", "labels.split: input should be 'full' or 'half'"),
        ("data.evals", {"../x": "a.jsonl"}, "data.evals.../x"),
        ("data.labeled", {"path": "a", "generate": {"pool": "train", "count": 1}}, "data.labeled: give either path or generate"),
        ("data.labeled", {}, "data.labeled: give either path or generate"),
        ("prompt.template", "no place for it", "prompt: template must contain {problem}"),
        ("name", "../../etc", "name: string should match pattern"),
    ],
)  # fmt: skip
def test_wrong_field_is_named_with_its_fault(path: str, value: Any, message: str) -> None:
    assert message in complaint(path, value)


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("opd", {"objective": "grpo"}, "stages: opd.objective is grpo; this stage takes opd or mixed"),
        ("opd", {"objective": "forward_kl"}, "stages: opd.objective is forward_kl"),
        ("teacher_rl", {"objective": "opd"}, "stages: teacher_rl.objective is opd; this stage takes grpo"),
        ("warmup", {"objective": "opd"}, "stages: warmup.objective is opd; this stage takes forward_kl or sft"),
        ("student_rl", {"objective": "sft"}, "stages: student_rl.objective is sft; this stage takes grpo or mixed"),
        ("opd", {"objective": "mixed"}, "stages.opd: sparse_share belongs to objective mixed, and mixed needs it"),
        ("opd", {"sparse_share": 0.5}, "stages.opd: sparse_share belongs to objective mixed"),
        ("opd", {"batch_size": 10, "group_size": 4}, "stages.opd: batch_size 10 is not a multiple of group_size 4"),
        ("student_rl", {"batch_size": 4, "group_size": 1}, "stages.student_rl: group_size must be at least 2"),
        ("opd", {"sampling": {"top_p": 0.9}}, "stages.opd: training must sample with top_p 1 and top_k 0"),
        ("opd", {"sampling": {"top_k": 20}}, "stages.opd: training must sample with top_p 1 and top_k 0"),
        ("opd", {"steps": None}, "stages.opd: give steps or epochs"),
        ("opd", {"minibatches": 99}, "stages.opd: minibatches 99 is more than batch_size 64"),
    ],
)
def test_inconsistent_stage_settings_are_refused_at_parse_time(
    stage: str, fields: dict[str, Any], message: str
) -> None:
    changed = {**RAW["stages"][stage], **fields}
    assert message in complaint(f"stages.{stage}", changed)


def test_sampling_settings_refused_in_training_are_allowed_in_evaluation() -> None:
    recipe = parse_recipe(changed("evaluate.sampling", {"top_p": 0.8, "top_k": 20, "temperature": 0.7}), "here")
    assert recipe.evaluate.sampling == Sampling(top_p=0.8, top_k=20, temperature=0.7)


def test_group_size_one_is_allowed_without_group_comparison() -> None:
    fields = {**RAW["stages"]["opd"], "group_size": 1}
    assert parse_recipe(changed("stages.opd", fields), "here").stages.opd.group_size == 1
    only_dense = {**fields, "objective": "mixed", "sparse_share": 0.0}
    assert not parse_recipe(changed("stages.opd", only_dense), "here").stages.opd.needs_labels


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("stages.opd.optim.lr=1e-4", "stages.opd.optim.lr", 1e-4),
        ("stages.opd.optim.lr=1E-4", "stages.opd.optim.lr", 1e-4),
        ("stages.opd.optim.lr=2.5e-5", "stages.opd.optim.lr", 2.5e-5),
        ("stages.opd.steps=5", "stages.opd.steps", 5),
        ("labels.budget=null", "labels.budget", None),
        ("labels.budget=32", "labels.budget", 32),
        ("prompt.thinking=true", "prompt.thinking", True),
        ("models.student=pocket:other", "models.student", "pocket:other"),
        ("name=1e-4", None, None),
        ("data.labeled.limit=7", "data.labeled.limit", 7),
        ("prompt.template=Q={problem}", "prompt.template", "Q={problem}"),
        ("prompt.system=", "prompt.system", None),
        ('stages.opd.sampling={"max_tokens": 9}', "stages.opd.sampling.max_tokens", 9),
    ],
)
def test_override_sets_one_field_with_its_type(override: str, path: str | None, value: Any) -> None:
    if path is None:  # a name is text; the number that was meant elsewhere is refused here
        with pytest.raises(UserError, match="name: input should be a valid string"):
            parse_recipe(RAW, "here", [override])
        return
    recipe: Any = parse_recipe(RAW, "here", [override])
    for key in path.split("."):
        recipe = getattr(recipe, key)
    assert recipe == value and type(recipe) is type(value)


def test_overrides_keep_other_fields_and_last_one_wins() -> None:
    before = copy.deepcopy(RAW)
    recipe = parse_recipe(RAW, "here", ["stages.opd.steps=5", "data.labeled.limit=7", "stages.opd.steps=6"])
    assert recipe.stages.opd.steps == 6 and recipe.stages.opd.objective == "opd"
    assert (recipe.data.labeled.path, recipe.data.labeled.limit) == ("train.jsonl", 7)
    assert before == RAW


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.opd.steps", r"--set stages\.opd\.steps: write it as path=value"),
        ("=5", "--set =5: write it as path=value"),
        ("stages..steps=5", r"--set stages\.\.steps=5: write it as path=value"),
        ("stages.opd.step=5", r"unknown field stages\.opd\.step"),
        ("nowhere.at.all=5", "unknown field nowhere"),
        ("name.first=5", r"--set name\.first=5: name holds a value, not fields"),
        ("stages.opd.steps=[1", r"--set stages\.opd\.steps=\[1: the value is not YAML"),
        ("stages.opd.steps=many", r"stages\.opd\.steps: input should be a valid integer.*\(given: 'many'\)"),
    ],
)
def test_invalid_override_is_refused_by_text_or_field(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe(RAW, "here", [override])


def test_unreadable_recipe_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    with pytest.raises(UserError, match=r"recipe .*r\.yaml: cannot be read"):
        read_recipe(path)
    for text, message in (("a: [1", "is not YAML"), ("- 1", "must be a mapping of fields, not list"), ("", "not NoneType"),
                       ("a: !!python/object/apply:os.system ['true']", "is not YAML")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=message) as refused:
            read_recipe(path)
        assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_recipe(path)


def test_recipe_round_trips_through_json(tmp_path: Path) -> None:
    recipe = parse_recipe(RAW, "here", ["stages.opd.optim.lr=1e-4", "labels.budget=64"])
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert read_recipe(path) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_recipe_is_immutable() -> None:
    recipe = parse_recipe(RAW, "here")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.stages.opd.optim.lr = 1.0


def test_length_schedule_grows_to_max_tokens_by_hand() -> None:
    stage = stage_of("opd", sampling={"max_tokens": 48}, length_schedule={"start": 16, "steps": 4})
    assert [stage.sampling_at(step).max_tokens for step in range(6)] == [16, 24, 32, 40, 48, 48]
    with pytest.raises(ValueError, match=r"length_schedule.start 48 must be below sampling.max_tokens 48"):
        stage_of("opd", sampling={"max_tokens": 48}, length_schedule={"start": 48, "steps": 4})
    with pytest.raises(ValueError, match="reads cached rollouts"):
        stage_of("forward_kl", length_schedule={"start": 4, "steps": 4})
    assert "length_schedule" not in stage_of("opd").model_dump()


def test_every_prompt_needs_stage_without_labels() -> None:
    assert stage_of("opd", prompts="every").prompts == "every" and "prompts" not in stage_of("opd").model_dump()
    with pytest.raises(ValueError, match="every needs a stage without labels, and objective grpo grades"):
        stage_of("grpo", prompts="every", group_size=8)
    with pytest.raises(ValueError, match="every needs a stage without labels, and objective opd grades"):
        stage_of("opd", prompts="every", group_size=8, dense={"token_weights": {"prompts": "pass_rate"}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": {"roles": ["student"]}}, "lora.roles: a stage's adapter belongs to the role"),
        ({"lora": {"output": "adapter"}}, "lora.output: the adapter of a stage is merged"),
        (
            {"lora": {"r": 4}, "dense": {"teacher_weights": {"start": 1}, "start_update": {"every": 2}}},
            "dense.start_update: the start under a stage's own adapter cannot move",
        ),
    ],
)
def test_adapter_of_stage_refuses_settings_of_role(fields: dict[str, Any], message: str) -> None:
    assert "lora" not in stage_of("opd").model_dump()
    with pytest.raises(ValueError, match=message):
        stage_of("opd", **fields)


def test_steps_over_pool_by_hand() -> None:
    # 100 prompts × 8 rollouts × 2 epochs / 128 a step = 12.5, so 13.
    assert Stage(objective="grpo", epochs=2, batch_size=128).steps_over(100) == 13
    assert Stage(objective="grpo", epochs=2, steps=5).steps_over(100) == 5
    assert Stage(objective="grpo", steps=1, batch_size=128, group_size=8).prompts_per_step == 16


def test_canonical_text_does_not_depend_on_key_order() -> None:
    assert (
        canonical_json({"b": 1, "a": [1.5, "é"]})
        == '{"a":[1.5,"é"],"b":1}'
        == canonical_json({"a": [1.5, "é"], "b": 1})
    )
    recipe = parse_recipe(RAW, "here")
    assert canonical_json(recipe) == canonical_json(parse_recipe(dict(reversed(RAW.items())), "here"))
    assert canonical_json(recipe) != canonical_json(parse_recipe(RAW, "here", ["seed=1"]))


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({}, 0.1),
        ({"top_k": 4}, 0.1),
        ({"problems": 64}, None),
        ({"every": 5}, None),
        ({"problems": 64, "max_share": 0.3}, 0.3),
        ({"max_share": None}, None),
    ],
)
def test_conditions_are_limited_unless_recipe_says_how_to_measure(fields: dict[str, Any], share: float | None) -> None:
    settings = Conditions.model_validate(fields)
    assert settings.max_share == share
    assert Conditions.model_validate(settings.model_dump()) == settings  # as recipe.json is read again


def test_chat_is_written_only_if_off() -> None:
    earlier = {"system": None, "template": "{problem}", "thinking": False, "max_tokens": 2048}
    assert Prompt().model_dump(mode="json") == earlier  # run directories from before the field stay the same run's
    assert Prompt(chat=False).model_dump(mode="json") == {**earlier, "chat": False}
    assert Prompt.model_validate(Prompt(chat=False).model_dump()) == Prompt(chat=False)
