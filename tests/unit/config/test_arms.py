"""Table of arms: stages of each, and what differs between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from headwater.config.arm import Step
from headwater.config.arms import ARMS, CONTRASTS, DESCRIPTIONS, OWN_STAGES, arm_of, stage_of
from headwater.config.builtin import builtin_names, builtin_text, find_recipe
from headwater.config.follow_up_arms import FOLLOW_UPS
from headwater.config.recipe import Recipe, parse_recipe
from headwater.config.stage import Stage
from headwater.errors import UserError
from runs import call


def recipe_with(*changes: str) -> Recipe:
    return find_recipe("pocket", list(changes))


def steps(*pairs: str) -> tuple[Step, ...]:
    """`teacher_rl:all` -> Step("teacher_rl", "all")."""
    return tuple(Step(*pair.split(":")) for pair in pairs)  # type: ignore[arg-type]


def steps_of(arm: str, recipe: Recipe) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The teacher's steps and the student's."""
    result = arm_of(arm, recipe)
    return result.teacher, result.student


# The paper's table: what is done to the teacher, then to the student, where P is what an arm without stage 3 works on.
TABLE = {
    "direct_grpo": ((), ("student_rl:all",)),
    "bridge": (("teacher_rl:P",), ("warmup:P", "opd:P")),
    "raw_teacher": ((), ("warmup:P", "opd:P")),
    "sft_teacher": (("sft:P",), ("warmup:P", "opd:P")),
    "teacher_sft": (("teacher_rl:P",), ("sft:P",)),
    "opd_only": (("teacher_rl:P",), ("opd:P",)),
    "warmup_only": (("teacher_rl:P",), ("warmup:P",)),
    "bridge_rl": (
        ("teacher_rl:first_half",),
        ("warmup:first_half", "opd:first_half", "student_rl:second_half"),
    ),
    "replay": (
        ("teacher_rl:first_half",),
        ("warmup:first_half", "opd:first_half", "student_rl:first_half"),
    ),
    "teacher_2h": (
        ("teacher_rl:first_half", "teacher_rl:second_half"),
        ("warmup:first_half", "opd:first_half"),
    ),
}


@pytest.mark.parametrize("arm", TABLE)
@pytest.mark.parametrize(("split", "pool"), [("full", "all"), ("half", "first_half")])
def test_arm_equals_its_row_of_paper_table_in_both_splits(arm: str, split: str, pool: str) -> None:
    teacher, student = ([pair.replace(":P", f":{pool}") for pair in part] for part in TABLE[arm])
    assert steps_of(arm, recipe_with(f"labels.split={split}")) == (steps(*teacher), steps(*student))


def test_arms_are_distinct() -> None:
    assert set(TABLE) <= set(ARMS)
    for split in ("full", "half"):
        recipe = recipe_with(f"labels.split={split}")
        trained = {}
        for name in ARMS:
            arm = arm_of(name, recipe)
            assert arm.student and all(step.pool for step in arm.steps)
            stages = [(step.pool, stage_of(recipe, step).model_dump_json()) for step in arm.steps]
            trained[name] = (len(arm.teacher), *stages, arm.same_compute)
        # On halves the bridge trains on the first half anyway.
        names = [name for name in trained if (name, split) != ("bridge_1h", "half")]
        assert len({trained[name] for name in names}) == len(names)


def test_contrasts_name_existing_arms_each_pair_once() -> None:
    assert {name for pair in CONTRASTS for name in pair} == set(ARMS)
    assert len({frozenset(pair) for pair in CONTRASTS}) == len(CONTRASTS) == 20 + len(FOLLOW_UPS)
    assert {("bridge", "direct_grpo"), ("direct_grpo", "raw_teacher"), ("bridge_rl", "replay")} <= set(CONTRASTS)
    assert list(DESCRIPTIONS) == ["base_student", "base_teacher", *ARMS, OWN_STAGES] and all(DESCRIPTIONS.values())


@pytest.mark.parametrize("split", ["full", "half"])
def test_bridge_1h_starts_at_stage_three_in_either_split(split: str) -> None:
    recipe = recipe_with(f"labels.split={split}")
    teacher, student = steps_of("bridge_rl", recipe)
    assert steps_of("bridge_1h", recipe) == (teacher, student[:-1])


def changed_in(arm: str, of: str) -> dict[str, dict[str, tuple[object, object]]]:
    """stage -> field -> (in `of`, in `arm`), for the student's stages of two arms that have the same ones."""
    recipe = recipe_with()
    first, second = arm_of(of, recipe), arm_of(arm, recipe)
    assert first.teacher == second.teacher
    assert [(s.stage, s.pool) for s in first.student] == [(s.stage, s.pool) for s in second.student]
    changed = {}
    for a, b in zip(first.student, second.student, strict=True):
        unset = {name: field.default for name, field in Stage.model_fields.items()}
        before, after = ({**unset, **stage_of(recipe, planned).model_dump()} for planned in (a, b))
        fields = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
        if fields:
            changed[a.stage] = fields
    return changed


def test_bridge_controls_differ_from_bridge_in_one_setting() -> None:
    assert changed_in("bridge_constant", "bridge") == {"opd": {"objective": ("opd", "constant")}}
    forward = changed_in("forward_kl_on_student", "bridge")
    assert set(forward) == {"opd"} and set(forward["opd"]) == {"dense"}
    before, after = forward["opd"]["dense"]
    assert after == {**before, "divergence": "forward"}  # type: ignore[dict-item]
    # Rewards are compared in groups, so J_λ samples 8 prompts × 8 where OPD samples 64 × 1: as many rollouts.
    mixed = {"objective": ("opd", "mixed"), "sparse_share": (None, 0.5), "group_size": (1, 8)}
    assert changed_in("mixed", "bridge") == {"opd": mixed}


def test_constant_advantage_needs_neither_teacher_nor_labels() -> None:
    recipe = recipe_with()
    arm = arm_of("constant_advantage", recipe)
    stage = stage_of(recipe, arm.student[0])
    assert arm.teacher == () and not stage.needs_teacher and not stage.needs_labels and stage.on_policy


def test_equal_compute_arms_differ_only_in_length() -> None:
    recipe = recipe_with()
    for arm, like in (("direct_grpo_compute", "direct_grpo"), ("opd_then_rl_compute", "opd_then_rl")):
        assert steps_of(arm, recipe) == steps_of(like, recipe)
        assert arm_of(arm, recipe).same_compute == (like, "bridge")


def test_replay_differs_from_bridge_rl_only_in_last_pool() -> None:
    recipe = recipe_with("labels.split=half")
    fresh, replay = arm_of("bridge_rl", recipe), arm_of("replay", recipe)
    assert replay.teacher == fresh.teacher and replay.same_compute is fresh.same_compute is None
    assert replay.student == (*fresh.student[:-1], replace(fresh.student[-1], pool="first_half"))
    # The same stage of the recipe, so the same steps, batch, rate, verifier, lengths and KL.
    assert stage_of(recipe, replay.student[-1]) is stage_of(recipe, fresh.student[-1])


def test_half_split_bridge_is_bridge_rl_without_last_stage() -> None:
    recipe = recipe_with("labels.split=half")
    teacher, student = steps_of("bridge_rl", recipe)
    assert steps_of("bridge", recipe) == (teacher, student[:-1])


def test_sft_defaults_to_warmup_settings() -> None:
    recipe = recipe_with("stages.warmup.optim.lr=0.5", "stages.warmup.steps=7")
    taken = stage_of(recipe, Step("sft", "all"))
    assert taken == recipe.stages.warmup.model_copy(update={"objective": "sft"})
    own = recipe_with("stages.sft={objective: sft, steps: 3, optim: {lr: 0.25}}")
    assert (stage_of(own, Step("sft", "all")).steps, stage_of(own, Step("sft", "all")).optim.lr) == (3, 0.25)


def test_unknown_arm_is_refused_with_known_names() -> None:
    with pytest.raises(UserError, match=r"--arm brigde: no such arm; there are direct_grpo, .*bridge_rl, replay"):
        arm_of("brigde", recipe_with())


def test_builtin_recipes_parse_and_init_prints_them() -> None:
    assert "pocket" in builtin_names()
    for name in builtin_names():
        printed = call("init", name).out
        assert printed == builtin_text(name)
        assert parse_recipe(yaml.safe_load(printed), name) == find_recipe(name, [])
        assert sum("#" in line for line in printed.splitlines()) > 5  # commented


def test_user_file_takes_precedence_over_builtin_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pocket").write_text(builtin_text("pocket").replace("name: pocket", "name: mine"), encoding="utf-8")
    assert find_recipe("pocket", []).name == "mine"


def test_unknown_recipe_is_refused_with_builtin_names() -> None:
    with pytest.raises(UserError, match=r"recipe poket: no such file, and no built-in .*pocket"):
        find_recipe("poket", [])


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ("stages.opd.steps=5", "stages.opd.steps", 5),
        ("stages.opd.optim.lr=1e-4", "stages.opd.optim.lr", 1e-4),  # YAML 1.1 alone would read this as text
        ("models.student=pocket:llama-student", "models.student", "pocket:llama-student"),
        ("labels.budget=null", "labels.budget", None),
        ("data.unlabeled=prompts.jsonl", "data.unlabeled.path", "prompts.jsonl"),
        ("prompt.template='Solve: {problem}'", "prompt.template", "Solve: {problem}"),
        ("stages.warmup.dense={top_k: 8}", "stages.warmup.dense.top_k", 8),
    ],
)
def test_set_option_changes_only_its_field(change: str, field: str, value: object) -> None:
    before, after = recipe_with().model_dump(), recipe_with(change).model_dump()
    *path, last = field.split(".")
    there, here = after, before
    for key in path:
        there, here = there[key], here[key] or {}
    assert there.pop(last) == value
    here.pop(last, None)
    if change.startswith("data.unlabeled"):
        before["data"]["unlabeled"] = after["data"]["unlabeled"] = None
    assert after == before


def test_data_source_given_as_path_accepts_further_fields() -> None:
    changes = ["data.evals.sums=test.jsonl", "data.evals.sums.limit=9", "data.labeled=a.jsonl", "data.labeled.limit=3"]
    data = recipe_with(*changes).data
    assert (data.evals["sums"].path, data.evals["sums"].limit) == ("test.jsonl", 9)
    assert (data.labeled.path, data.labeled.limit) == ("a.jsonl", 3)


def test_epochs_override_replaces_recipe_steps() -> None:
    assert recipe_with().stages.warmup.steps == 80
    stage = recipe_with("stages.warmup.epochs=0.5", "stages.warmup.group_size=4").stages.warmup
    assert stage.steps_over(256) == 8  # half of 256 prompts × 4 rollouts, 64 a step
    assert recipe_with("stages.warmup.epochs=0.5", "stages.warmup.steps=3").stages.warmup.steps_over(256) == 3
    assert recipe_with("stages.teacher_rl.steps=2").stages.teacher_rl.steps_over(256) == 2


def test_steps_stay_when_epochs_are_removed_after_them() -> None:
    stage = find_recipe("pocket", ["stages.teacher_rl.steps=7", "stages.teacher_rl.epochs=null"]).stages.require(
        "teacher_rl"
    )
    assert (stage.steps, stage.epochs) == (7, None)


@pytest.mark.parametrize(
    ("arm", "change", "field"),
    [
        ("exopd", "stages.opd.dense.tokenizers=prefix", "stages.opd"),
        ("mixed", "stages.opd.dense={teacher_weights: {start: 1}, start_update: {every: 2}}", "stages.opd"),
        (
            "pass_rate",
            "stages.opd={objective: opd, steps: 5, batch_size: 6, group_size: 1, minibatches: 6}",
            "stages.opd",
        ),
    ],
)
def test_arm_excluded_by_recipe_field_is_refused_in_one_sentence(arm: str, change: str, field: str) -> None:
    recipe = find_recipe("pocket", [change])
    with pytest.raises(
        UserError, match=rf"^arm {arm}: its change of {field} does not fit: [^\n]*; change that field"
    ) as refused:
        arm_of(arm, recipe)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("arm", ["exopd", "exopd_start", "opd2", "proximal", "soft_or"])
def test_follow_ups_take_no_moving_start_from_recipe(arm: str) -> None:
    change = "stages.opd.dense={teacher_weights: {start: 1}, start_update: {every: 2}}"
    recipe = find_recipe("pocket", [change])
    last = arm_of(arm, recipe).student[-1]
    assert stage_of(recipe, last).dense.start_update is None


def test_list_of_arms_is_no_arm() -> None:
    with pytest.raises(UserError, match="--arms improved: is a list of"):
        arm_of("improved", find_recipe("pocket", []))


def test_stages_on_unequal_halves_take_equal_steps() -> None:
    from headwater.data.labels import Pools
    from headwater.runs.inputs import RunInputs

    recipe = recipe_with(
        "stages.student_rl.epochs=2", "stages.student_rl.batch_size=16", "stages.student_rl.group_size=8"
    )
    pools = Pools(tuple(f"a{i}" for i in range(10)), tuple(f"b{i}" for i in range(13)))
    inputs = RunInputs(recipe, memo={("pools",): pools})
    stage = recipe.stages.student_rl
    # 2 epochs over the smaller half: 20 prompts, 2 a step; over all 23 labels: 46 prompts, 2 a step.
    assert inputs.steps("first_half", stage) == inputs.steps("second_half", stage) == 10
    assert inputs.steps("all", stage) == 23


def test_controls_leave_out_settings_of_replaced_objective() -> None:
    recipe = recipe_with("stages.opd.dense.gain_over=start", "stages.opd.dense.token_weights.first=9")
    (constant,) = arm_of("constant_advantage", recipe).student
    assert stage_of(recipe, constant).dense.token_weights is None and stage_of(recipe, constant).dense.gain_over is None
    forward = stage_of(recipe, arm_of("forward_kl_on_student", recipe).student[-1]).dense
    assert (forward.divergence, forward.gain_over) == ("forward", None) and forward.token_weights is not None


OTHER_STAGES = ("lora_warmup", "every_prompt", "short_rl", "bridge_plus")
"""Follow-ups that change other stages than the last."""


def test_lora_warmup_trains_adapter_for_twice_as_many_steps() -> None:
    change = changed_in("lora_warmup", "bridge")
    assert set(change) == {"warmup"} and set(change["warmup"]) == {"lora", "optim", "steps"}
    stage = stage_of(recipe_with(), arm_of("lora_warmup", recipe_with()).student[0])
    assert stage.lora is not None and (stage.lora.r, stage.steps) == (16, 160)
    assert stage.optim.lr == pytest.approx(0.003)  # three times the recipe's


def test_bridge_plus_is_short_rl_and_every_prompt_together() -> None:
    recipe = recipe_with()
    prompts = {"prompts": ("pool", "every")}
    assert changed_in("every_prompt", "bridge") == {"warmup": {**prompts, "group_size": (8, 1)}, "opd": prompts}
    short, plus = arm_of("short_rl", recipe), arm_of("bridge_plus", recipe)
    assert short.student == arm_of("bridge", recipe).student and short.teacher == plus.teacher
    assert plus.student == arm_of("every_prompt", recipe).student
    assert stage_of(recipe, plus.teacher[0]).epochs == 1.25  # a quarter of 5
    in_steps = recipe_with("stages.teacher_rl.steps=3")
    assert stage_of(in_steps, plus.teacher[0]).steps == 1
    assert {arm.same_compute for arm in (short, plus)} == {("bridge", "bridge")}


def test_recipe_improved_spends_as_bridge_plus_does() -> None:
    pocket, improved = recipe_with(), find_recipe("improved", [])
    plus = arm_of("bridge_plus", pocket)
    for step in plus.steps:
        stage = stage_of(pocket, step)
        ours = getattr(improved.stages, step.stage)
        # At equal compute the arm takes as many OPD steps as the FLOPs pay for; the recipe names their number on seed 101.
        assert ours == (stage.model_copy(update={"steps": 158}) if step.stage == "opd" else stage)
    same = ("task", "data", "labels", "prompt", "evaluate", "conditions")
    assert [getattr(improved, name) for name in same] == [getattr(pocket, name) for name in same]


def test_every_prompt_leaves_grading_stages_alone() -> None:
    recipe = recipe_with("stages.opd={objective: mixed, sparse_share: 0.5, steps: 3, group_size: 4, batch_size: 8}")
    step = arm_of("every_prompt", recipe).student[-1]
    assert stage_of(recipe, step) == recipe.stages.opd


def test_every_prompt_is_refused_beside_privileged_contexts() -> None:
    privileged = ("data.labeled.columns.context=solution", "prompt.teacher={privileged: '{problem} {context}'}")
    recipe = recipe_with("data.labeled={path: train.jsonl}", *privileged)
    arm_of("bridge", recipe)
    with pytest.raises(UserError, match=r"prompt.teacher.privileged: contexts may hold answers that the budget"):
        arm_of("bridge_plus", recipe)
    with pytest.raises(UserError, match=r"every cannot be combined with prompt.teacher.privileged"):
        recipe_with("data.labeled={path: train.jsonl}", *privileged, "stages.opd.prompts=every")


def test_follow_ups_change_one_stage_of_bridge_or_bridge_rl() -> None:
    recipe = recipe_with()
    for name in [name for name in FOLLOW_UPS if name.removesuffix("_compute") not in OTHER_STAGES]:
        base = "bridge_rl" if name == "rescue" else "bridge"
        follow_up, plain = arm_of(name, recipe), arm_of(base, recipe)
        assert follow_up.teacher == plain.teacher, name
        settings = [[stage_of(recipe, step) for step in arm.student] for arm in (follow_up, plain)]
        assert [ours == other for ours, other in zip(*settings, strict=True)] == [True] * (len(settings[0]) - 1) + [
            False
        ]
        assert settings[0][-1].optim == settings[1][-1].optim and settings[0][-1].steps == settings[1][-1].steps


def test_follow_ups_compare_equal_numbers_of_labels() -> None:
    recipe = recipe_with()
    pools = {name: {step.pool for step in arm_of(name, recipe).student} for name in FOLLOW_UPS}
    assert pools.pop("rescue") == {"first_half", "second_half"} and set(map(frozenset, pools.values())) == {
        frozenset({"all"})
    }
