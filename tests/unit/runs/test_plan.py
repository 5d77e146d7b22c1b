"""Plan: nodes of each arm, shared nodes, and what changes a fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headwater.config.arms import ARMS
from headwater.config.builtin import find_recipe
from headwater.config.recipe import Recipe
from headwater.errors import UserError
from headwater.runs.node import Node, TrainNode
from headwater.runs.plan import Plan, make_plan
from headwater.storage.run_dir import RunDir

POOLS = {"all": ("a", "b", "c", "d"), "first_half": ("a", "b"), "second_half": ("c", "d")}


def content(**other: Any) -> dict[str, Any]:
    """What a run's data and models would say of themselves."""
    plain = {
        "models": lambda role: f"weights of {role}",
        "pools": POOLS,
        "reads": lambda pool, stage, unknown_steps: (
            len(POOLS[pool]) if unknown_steps else min(len(POOLS[pool]), stage.steps)
        ),
        "labels": {name: f"answers of {name}" for name in POOLS},
        "unlabeled": (),
        "every_prompt": ["a", "b", "c", "d", "e"],
        "evals": {"sums": ["answers", "x", "y"]},
    }
    return plain | other


def recipe_with(*changes: str) -> Recipe:
    return find_recipe("pocket", list(changes))


def plan_of(*changes: str, arms: tuple[str, ...] = tuple(ARMS), seeds: tuple[int, ...] = (0,), **other: Any) -> Plan:
    return make_plan(recipe_with(*changes), arms, seeds, content(**other))


def chain(plan: Plan, arm: str, seed: int = 0) -> list[Node]:
    return list(plan.arms[arm][seed].ancestry())


def source_name(source: Node | str | None) -> str | None:
    return source if isinstance(source, str) or source is None else f"{source.stage}/{source.pool}"


def line(node: Node) -> tuple[str, str | None, str | None, str | None]:
    """(what on which pool, from which weights, supervised by whom, on whose cached samples)."""
    return (
        source_name(node) or "",
        source_name(node.start),
        source_name(node.teacher),
        None if node.cache is None else source_name(node.cache.start),
    )


def trained(plan: Plan, arm: str) -> list[tuple[str, str | None, str | None, str | None]]:
    return [line(node) for node in chain(plan, arm) if node.kind == "train"]


def test_bridge_plan_chains_stages_from_trained_teacher() -> None:
    assert trained(plan_of(), "bridge_rl") == [
        ("teacher_rl/first_half", "teacher", None, None),
        ("warmup/first_half", "student", None, "teacher_rl/first_half"),
        ("opd/first_half", "warmup/first_half", "teacher_rl/first_half", None),
        ("student_rl/second_half", "opd/first_half", None, None),
    ]


def test_raw_teacher_plan_uses_untrained_teacher() -> None:
    assert trained(plan_of(), "raw_teacher") == [
        ("warmup/all", "student", None, "teacher"),
        ("opd/all", "warmup/all", "teacher", None),
    ]


def test_sft_teacher_plan_fine_tunes_teacher_on_expert_rollouts() -> None:
    assert trained(plan_of(), "sft_teacher") == [
        ("sft/all", "teacher", None, "expert"),
        ("warmup/all", "student", None, "sft/all"),
        ("opd/all", "warmup/all", "sft/all", None),
    ]


def test_teacher_2h_plan_trains_teacher_on_both_halves() -> None:
    assert trained(plan_of(), "teacher_2h") == [
        ("teacher_rl/first_half", "teacher", None, None),
        ("teacher_rl/second_half", "teacher_rl/first_half", None, None),
        ("warmup/first_half", "student", None, "teacher_rl/second_half"),
        ("opd/first_half", "warmup/first_half", "teacher_rl/second_half", None),
    ]


def test_direct_grpo_plan_is_one_stage_without_teacher() -> None:
    assert [line(node) for node in chain(plan_of(), "direct_grpo")] == [("student_rl/all", "student", None, None)]


def test_bridge_ablations_keep_one_part_of_bridge() -> None:
    plan = plan_of()
    rl = ("teacher_rl/all", "teacher", None, None)
    assert trained(plan, "opd_only") == [rl, ("opd/all", "student", "teacher_rl/all", None)]
    assert trained(plan, "warmup_only") == [rl, ("warmup/all", "student", None, "teacher_rl/all")]
    assert trained(plan, "teacher_sft") == [rl, ("sft/all", "student", None, "teacher_rl/all")]


def test_replay_and_bridge_rl_share_every_node_but_last() -> None:
    plan = plan_of()
    fresh, replay = chain(plan, "bridge_rl"), chain(plan, "replay")
    assert [plan.names[node] for node in fresh[:-1]] == [plan.names[node] for node in replay[:-1]]
    assert fresh[-1].settings is replay[-1].settings
    assert (fresh[-1].pool, replay[-1].pool) == ("second_half", "first_half")
    assert fresh[-1].start == replay[-1].start
    assert plan.names[fresh[-1]] != plan.names[replay[-1]]


def test_shared_nodes_have_one_name_across_arms() -> None:
    plan = plan_of()

    def named(arm: str, stage: str) -> str:
        return next(plan.names[node] for node in reversed(chain(plan, arm)) if node.stage == stage)

    full = {named(arm, "teacher_rl") for arm in ("bridge", "opd_only", "warmup_only", "teacher_sft")}
    halves = {named(arm, "teacher_rl") for arm in ("bridge_rl", "replay")}
    assert len(full) == len(halves) == 1 and full != halves
    assert named("bridge", "warmup") == named("warmup_only", "warmup")
    assert named("bridge", "warmup") != named("raw_teacher", "warmup")
    assert named("bridge", "opd") != named("opd_only", "opd")


def test_warmup_and_teacher_sft_share_cache() -> None:
    plan = plan_of()
    caches = {
        arm: [plan.names[node] for node in chain(plan, arm) if node.kind == "rollouts"]
        for arm in ("bridge", "warmup_only", "teacher_sft", "raw_teacher")
    }
    assert caches["bridge"] == caches["warmup_only"] == caches["teacher_sft"]
    assert len(caches["bridge"]) == 1
    assert caches["raw_teacher"] != caches["bridge"]


def test_cache_does_not_depend_on_training_of_its_readers() -> None:
    def cache_name(*changes: str) -> str:
        plan = plan_of(*changes, arms=("warmup_only",))
        return next(plan.names[node] for node in chain(plan, "warmup_only") if node.kind == "rollouts")

    plain = cache_name()
    for reader in ("optim.lr=0.5", "steps=3", "batch_size=32", "loss_mean=sequence", "checkpoint_every=1"):
        assert cache_name(f"stages.warmup.{reader}") == plain
    for sampled in ("group_size=2", "sampling.max_tokens=9", "sampling.temperature=0.5", "dense.top_k=4"):
        assert cache_name(f"stages.warmup.{sampled}") != plain


def test_cache_is_done_with_rollouts_of_its_unfinished_readers(tmp_path: Path) -> None:
    """Pools of 4 problems; the fake data's stages read as many rollouts as they have steps."""
    plan = plan_of(
        "stages.warmup.steps=2",
        "stages.sft={steps: 3, sampling: {max_tokens: 48}}",
        arms=("warmup_only", "teacher_sft"),
    )
    folder = RunDir(tmp_path)
    warmup, sft = (plan.arms[arm][0] for arm in ("warmup_only", "teacher_sft"))
    cache = warmup.cache
    assert cache is not None and plan.names[cache] == plan.names[sft.cache or cache]
    assert plan.cached_rollouts(cache) == 3

    def finish(node: Node, **value: int) -> None:
        folder.node(plan.names[node]).path.mkdir(parents=True, exist_ok=True)
        folder.node(plan.names[node]).finish({"fingerprint": plan.fingerprints[node], **value})

    finish(cache, scored=2)
    assert not plan.is_done(cache, folder)
    finish(cache)  # of an earlier version: its whole pool
    assert plan.is_done(cache, folder)
    finish(cache, scored=2)
    finish(sft)
    assert plan.is_done(cache, folder) and plan.cached_rollouts(cache, folder) == 2
    finish(cache, scored=0)
    assert not plan.is_done(cache, folder)
    finish(warmup)
    assert plan.is_done(cache, folder)


def test_plan_lists_parents_before_children() -> None:
    plan = plan_of(seeds=(0, 1))
    order = [plan.names[node] for node in plan.order()]
    for node in plan.order():
        assert all(order.index(plan.names[parent]) < order.index(plan.names[node]) for parent in node.parents)
    written = plan.to_json()
    assert list(written["arms"]) == ["base_student", "base_teacher", *ARMS]
    assert written["seeds"] == [0, 1]
    for arm, by_seed in plan.arms.items():
        for seed, last in by_seed.items():
            assert written["arms"][arm][str(seed)][-1] == plan.names[last]


def test_seeds_share_no_node() -> None:
    plan = plan_of(seeds=(0, 1))
    by_seed = [{plan.names[node] for node in plan.order() if node.seed == seed} for seed in (0, 1)]
    assert by_seed[0] and not by_seed[0] & by_seed[1]
    assert len(by_seed[0]) == len(by_seed[1])


def prints(plan: Plan, arm: str = "bridge_rl") -> dict[str, str]:
    return {node.stage: plan.fingerprints[node] for node in chain(plan, arm)}


@pytest.mark.parametrize(
    "change",
    [
        "compute.device=cpu",
        "compute.microbatch_tokens=64",
        "compute.threads=1",
        "compute.sample_batch=3",
        "compute.grader_workers=1",
        "models.gradient_checkpointing=true",
        "guards.no_signal=continue",
        "guards.patience=9",
        "name=another",
        "seed=5",  # the seeds of a plan are given beside the recipe
    ],
)
def test_fingerprint_does_not_depend_on_compute_or_folder(change: str) -> None:
    assert prints(plan_of(change)) == prints(plan_of())


ALL = {"teacher_rl", "teacher_rollouts", "warmup", "opd", "student_rl"}
AFTER = {
    "teacher_rl": ALL,
    "warmup": {"warmup", "opd", "student_rl"},
    "opd": {"opd", "student_rl"},
    "student_rl": {"student_rl"},
}


@pytest.mark.parametrize("stage", AFTER)
@pytest.mark.parametrize(
    "change",
    ["steps=3", "optim.lr=0.5", "optim.grad_clip=7", "optim.schedule=cosine", "batch_size=16", "loss_mean=sequence"],
)
def test_stage_settings_change_its_node_and_descendants_only(stage: str, change: str) -> None:
    before, after = prints(plan_of()), prints(plan_of(f"stages.{stage}.{change}"))
    assert {name for name in before if before[name] != after[name]} == AFTER[stage]


@pytest.mark.parametrize(
    "change",
    [
        "task=maths",
        "prompt.thinking=true",
        "prompt.template='Q: {problem}'",
        "prompt.system=Be brief.",
        "models.dtype=bfloat16",
    ],
)
def test_global_settings_change_every_node(change: str) -> None:
    before, after = prints(plan_of()), prints(plan_of(change))
    assert {name for name in before if before[name] != after[name]} == ALL


def test_evaluation_settings_change_evaluated_nodes_but_not_cache_inputs() -> None:
    before, after = prints(plan_of()), prints(plan_of("evaluate.samples=9"))
    assert {name for name in before if before[name] != after[name]} == ALL  # the cache depends on the evaluated teacher
    raw = [prints(plan_of(*changes), "raw_teacher") for changes in ((), ("evaluate.samples=9",))]
    assert {name for name in raw[0] if raw[0][name] != raw[1][name]} == {"warmup", "opd"}


def test_model_weights_change_nodes_using_them() -> None:
    before = prints(plan_of())
    student = prints(plan_of(models=lambda role: "new" if role == "student" else f"weights of {role}"))
    teacher = prints(plan_of(models=lambda role: "new" if role == "teacher" else f"weights of {role}"))
    assert {name for name in before if before[name] != student[name]} == {"warmup", "opd", "student_rl"}
    assert {name for name in before if before[name] != teacher[name]} == ALL


def test_pool_problems_change_stages_using_them() -> None:
    before = prints(plan_of())
    after = prints(plan_of(pools=POOLS | {"second_half": ("c", "e")}))
    assert {name for name in before if before[name] != after[name]} == {"student_rl"}


def test_corrected_answer_changes_stages_with_labels() -> None:
    before, labels = prints(plan_of()), content()["labels"]
    after = prints(plan_of(labels=labels | {"second_half": "corrected"}))
    assert {name for name in before if before[name] != after[name]} == {"student_rl"}
    raw = [prints(plan_of(**kw), "raw_teacher") for kw in ({}, {"labels": dict.fromkeys(labels, "corrected")})]
    assert raw[0] == raw[1]  # no label is in reach there


def test_added_bridge_prompts_change_dense_stages_and_descendants_only() -> None:
    before, after = prints(plan_of()), prints(plan_of(unlabeled=("u",)))
    assert {name for name in before if before[name] != after[name]} == ALL - {"teacher_rl"}


def test_every_prompt_changes_its_stages_and_descendants() -> None:
    before, every = prints(plan_of()), prints(plan_of("stages.opd.prompts=every"))
    assert {name for name in before if before[name] != every[name]} == {"opd", "student_rl"}
    added = prints(plan_of("stages.opd.prompts=every", every_prompt=["a", "b", "c", "d", "e", "f"]))
    assert {name for name in before if every[name] != added[name]} == {"opd", "student_rl"}
    assert prints(plan_of(every_prompt=[])) == before


def test_adapter_of_stage_changes_its_node_and_descendants() -> None:
    plan = plan_of("stages.warmup.lora={r: 4, alpha: 8}")
    adapters = {node.stage: node.lora(plan.recipe) for node in chain(plan, "bridge_rl") if node.kind == "train"}
    assert {stage: None if lora is None else lora.r for stage, lora in adapters.items()} == {
        "teacher_rl": None, "warmup": 4, "opd": None, "student_rl": None
    }  # fmt: skip
    before, after = prints(plan_of()), prints(plan)
    assert {name for name in before if before[name] != after[name]} == {"warmup", "opd", "student_rl"}


def test_arm_with_unnamed_model_is_refused_when_weights_are_needed() -> None:
    def weights(role: str) -> str:
        if role == "expert":
            raise UserError("models.expert: an arm needs this model, and the recipe names none")
        return role

    assert plan_of(arms=("bridge",), models=weights).names
    with pytest.raises(UserError, match=r"models\.expert"):
        plan_of(arms=("sft_teacher",), models=weights)


def test_user_grader_is_part_of_grading_nodes_and_not_of_caches() -> None:
    before, after, none = plan_of(grader="one"), plan_of(grader="two"), plan_of(grader=None)
    assert none.names == plan_of().names  # a task of the table has none
    kinds = {
        node.kind: before.names[node] == after.names[node]
        for node in before.order()
        if node.start in ("student", "teacher")
    }
    assert kinds["train"] is False and kinds["evaluate"] is False and kinds["rollouts"] is True


def test_fingerprints_hold_chat_only_if_off() -> None:
    default, off = plan_of(), plan_of("prompt.chat=false")
    assert prints(plan_of("prompt.chat=true")) == prints(default)
    assert not set(off.names.values()) & set(default.names.values())


def test_fingerprints_hold_day_for_clock_templates_only() -> None:
    arms = ("direct_grpo", "sft_teacher")
    plain = plan_of(arms=arms)
    assert plan_of(arms=arms, day=lambda role: None).names == plain.names

    def day_of(role: str, day: str) -> str | None:
        return day if role == "student" else None

    first, other = (
        plan_of(arms=arms, day=lambda role, day=day: day_of(role, day)) for day in ("2024-02-29", "2024-03-01")
    )
    for node, name in plain.names.items():
        same = name == first.names[node] == other.names[node]
        assert same == all(ancestor.role != "student" for ancestor in node.ancestry()), name
        assert same or len({name, first.names[node], other.names[node]}) == 3


def opd_node(weights: str, arm: str = "bridge") -> TrainNode:
    plan = plan_of(f"stages.opd.dense.teacher_weights={weights}", arms=(arm,))
    return next(node for node in chain(plan, arm) if isinstance(node, TrainNode) and node.stage == "opd")


def test_scorers_are_models_with_weights_of_composed_teacher() -> None:
    node = opd_node("{teacher: 1.25, base_teacher: -0.25}")
    assert node.scorers() == {node.teacher: 1.25, "teacher": -0.25}
    node = opd_node("{start: 1.0, teacher: 2.0, base_teacher: -2.0}")
    assert node.scorers() == {node.start: 1.0, node.teacher: 2.0, "teacher": -2.0}


def test_scorers_of_weight_one_on_one_model_are_plain_teacher() -> None:
    node = opd_node("{teacher: 1.0, base_teacher: 0.0}")
    assert node.scorers() == {node.teacher: 1.0}
    # The raw teacher is its own reference: 1.25 − 0.25.
    assert opd_node("{teacher: 1.25, base_teacher: -0.25}", "raw_teacher").scorers() == {"teacher": 1.0}


def test_scorers_of_gain_are_teacher_and_model_compared_with() -> None:
    plan = plan_of("stages.opd.dense.gain_over=base_teacher", arms=("bridge",))
    node = next(node for node in chain(plan, "bridge") if node.stage == "opd")
    assert node.scorers() == {node.teacher: 1.0, "teacher": -1.0}
    plan = plan_of("stages.opd.dense.gain_over=start", arms=("bridge",))
    node = next(node for node in chain(plan, "bridge") if node.stage == "opd")
    assert node.scorers() == {node.teacher: 1.0, node.start: -1.0}
    with pytest.raises(UserError, match=r"stages.opd.dense.gain_over: base_teacher is the teacher itself"):
        chain(plan_of("stages.opd.dense.gain_over=base_teacher", arms=("raw_teacher",)), "raw_teacher")[-1].scorers()


def test_fingerprints_hold_later_settings_of_dense_only_if_set() -> None:
    plain = prints(plan_of())
    assert prints(plan_of("stages.opd.dense.clip=null")) == plain
    for change in ("clip=2.0", "entropy_above=0.5", "gain_over=start", "token_weights.first=9"):
        changed = prints(plan_of(f"stages.opd.dense.{change}"))
        assert changed["opd"] != plain["opd"] and changed["warmup"] == plain["warmup"], change


def test_overlap_changes_sampling_stages_and_their_descendants_only() -> None:
    plain, ahead = (prints(plan_of(*changes)) for changes in ((), ("compute.overlap=1",)))
    assert prints(plan_of("compute.overlap=0")) == plain
    assert {stage for stage in plain if plain[stage] != ahead[stage]} >= {"teacher_rl", "opd", "student_rl"}
    raw = [plan_of(*changes, arms=("raw_teacher",)) for changes in ((), ("compute.overlap=1",))]
    warmup, opd = (
        [plan.names[node] for plan in raw for node in plan.order() if node.stage == stage]
        for stage in ("warmup", "opd")
    )
    assert warmup[0] == warmup[1] and opd[0] != opd[1]
    capped = plan_of("compute.overlap=1", "compute.vllm.importance_cap=3", arms=("raw_teacher",))
    assert capped.names[capped.arms["raw_teacher"][0]] != opd[1]


def test_stage_of_no_steps_takes_none_at_equal_compute() -> None:
    node = plan_of(arms=("direct_grpo_compute",)).arms["direct_grpo_compute"][0]
    assert node.compute is not None
    assert node.matched_steps(0, lambda other: 0.0) == 0
    assert node.matched_steps(5, lambda other: 10.0) > 5
