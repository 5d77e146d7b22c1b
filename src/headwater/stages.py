"""Run one node: gather its capabilities, hand them to the loop, keep what comes out.

A stage is handed labels only if its objective has a sparse term. Warm-up, OPD and fine-tuning have none in reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from headwater import model, plateau
from headwater.batch import Row
from headwater.beside import beside
from headwater.evaluate import refuse_nan
from headwater.gather import OnPolicy, SignalGuard, stored
from headwater.guards import Watchman
from headwater.ledger import record
from headwater.materials import Materials
from headwater.memory import Budget
from headwater.model import Policy, Shape
from headwater.objective import Objective, objective_of
from headwater.plan import Node
from headwater.prompts import Prompter
from headwater.rundir import NodeDir, append_jsonl, cut_back, read_jsonl, write_json, written_aside
from headwater.sampler import requests_for
from headwater.settings import Stage
from headwater.teacher import read_cache, refuse_huge_cache, write_cache
from headwater.train import Gathered, train
from headwater.workplace import Workplace, held_out, named


def run_node(node: Node, place: Workplace) -> None:
    """Run a node to its end, or from where it was interrupted. Its DONE file says that it is complete."""
    folder = place.node_dir(node)
    write_json(
        folder.info,
        {
            "name": folder.name,
            "kind": node.kind,
            "stage": node.stage,
            "role": node.role,
            "seed": node.seed,
            "parents": [place.plan.names[parent] for parent in node.parents],
            "fingerprint": place.plan.fingerprints[node],
            "labels": _label_note(node, place.materials),
            "settings": None if node.settings is None else node.settings.model_dump(mode="json"),
        },
    )
    ended = {"train": run_train, "rollouts": run_rollouts, "evaluate": run_evaluate}[node.kind](node, place)
    write_json(folder.done, {"fingerprint": place.plan.fingerprints[node], **({"ended": ended} if ended else {})})


def _label_note(node: Node, materials: Materials) -> dict[str, Any] | None:
    if node.kind != "train" or node.settings is None or node.pool is None:
        return None
    allowed = len(materials.pool(node.pool)) if node.settings.needs_labels else 0
    return {"pool": node.pool, "distinct_allowed": allowed}


def run_evaluate(node: Node, place: Workplace) -> None:
    """Evaluate a base model."""
    folder = place.node_dir(node)
    folder.cut_back_to(-1)
    place.watch.start(0, _completions(place), "completions")
    run_evals(place.load(node.start, frozen=True), node, place, "final", 0)


def _completions(place: Workplace) -> int:
    samples = place.materials.recipe.evaluate.samples
    return sum(len(problems) * samples for problems, _ in place.materials.evals.values())


def run_evals(policy: Policy, node: Node, place: Workplace, when: str, step: int) -> None:
    """Every evaluation of the recipe, its graded texts and its spend; looks here are never those of training."""
    folder = place.node_dir(node)
    for name, asked in place.materials.evals.items():
        told = (lambda count: place.watch.advance(count, {})) if when == "final" else None
        # Every model answers a problem with the same random numbers: paired comparisons are then less noisy.
        rows, spend = held_out(node, place, policy, asked, "eval", step, (node.seed, "eval", name), told)
        path = folder.evaluation(when, name)
        path.unlink(missing_ok=True)
        append_jsonl(path, rows)
        record(folder.ledger, spend)


def run_rollouts(node: Node, place: Workplace) -> None:
    """Sample a teacher on its prompts and keep what it said with its distributions; one cache for all who need it."""
    assert node.settings is not None and node.pool is not None
    started, settings, folder = time.perf_counter(), node.settings, place.node_dir(node)
    folder.cut_back_to(-1)
    policy = place.load(node.start, frozen=True)
    prompter = place.prompter(policy)
    names = place.materials.prompts(node.pool, settings)
    prompts = [(name, prompter.ids(place.materials.problems[name])) for name in names]
    place.watch.start(0, 2 * len(prompts) * settings.group_size, "rollouts")
    requests = requests_for(prompts, settings.group_size, 0, node.seed, node.stage)
    rollouts = place.sampler(policy).sample(
        requests, settings.sampling, lambda found: place.watch.advance(len(found), {})
    )
    with named(node, 0):
        refuse_nan(rollouts)
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    refuse_huge_cache(policy, tokens, settings.dense.top_k)
    with written_aside(folder.cache) as aside, named(node, 0):
        write_cache(
            aside,
            policy,
            rollouts,
            settings.dense.top_k,
            place.materials.recipe.compute.microbatch_tokens,
            lambda count: place.watch.advance(count, {}),
        )
    shape = Shape.from_config(policy.model.config)
    read = tokens + sum(len(rollout.prompt_ids) for rollout in rollouts)
    record(
        folder.ledger,
        replace(
            place.spend(node),
            tokens_sampled=tokens,
            tokens_teacher_scored=tokens,
            flops=2 * shape.flops(read, read / len(rollouts)),
            seconds=time.perf_counter() - started,
        ),
    )


def run_train(node: Node, place: Workplace) -> dict[str, Any] | None:
    """One stage of training from its start weights to a model folder and its evaluation.

    Returns {"step", "of", "why"} for a stage that ended before its last step.
    """
    assert node.settings is not None and node.pool is not None
    stage, folder, recipe = node.settings, place.node_dir(node), place.materials.recipe
    policy = place.load(node.start, frozen=False)
    objective = objective_of(stage)
    steps = place.steps(node)
    prompter = place.prompter(policy)
    spend = place.spend(node)

    def update_flops(rows: Sequence[Row]) -> float:
        # The old log-probs of several updates on one batch take a forward pass more, a third of an update's.
        again = 1.0 / 3.0 if objective.source == "policy" and stage.passes * stage.minibatches > 1 else 0.0
        return (stage.passes + again) * policy.pass_flops([row for row in rows if not row.inert], passes=3)

    def write_rollouts(step: int, rows: Sequence[Row]) -> None:
        path = folder.rollouts(step)
        path.unlink(missing_ok=True)
        append_jsonl(path, [rollout_row(row, prompter) for row in rows])

    taken = train(
        policy,
        stage,
        steps,
        objective,
        gatherer(node, place, policy, objective, steps),
        folder,
        spend,
        microbatch_tokens=recipe.compute.microbatch_tokens,
        update_flops=update_flops,
        on_start=lambda done: place.watch.start(done, steps, "steps"),
        on_step=lambda step, metrics: place.watch.advance(1, metrics),
        write_rollouts=write_rollouts,
        evaluate=lambda when: run_evals(policy, node, place, when, int(when.removeprefix("step-"))),
        beside=beside(node, place, policy),
        ended=partial(ended, stage, folder),
        guards=Watchman(recipe.guards, folder, place.watch.warn),
        should_stop=place.watch.should_stop,
    )
    # Interrupted between its last step and DONE, a node evaluates again: what it had recorded of that would count twice.
    cut_back(folder.ledger, lambda row: row["purpose"] != "eval" or row["step"] < taken)
    with written_aside(folder.model) as aside:
        model.save(policy, aside, policy.compute)
        (aside / "README.md").write_text(model_card(node, place, taken), encoding="utf-8")
    place.watch.start(0, _completions(place), "completions")
    run_evals(policy, node, place, "final", taken)
    if taken == steps or stage.until is None:
        return None
    return {"step": taken, "of": steps, "why": f"plateau of {stage.until.metric}"}


def ended(stage: Stage, folder: NodeDir, done: int) -> bool:
    """Whether the stage's metric has reached its plateau after `done` steps, as far as they are written down."""
    until = stage.until
    if until is None or done % until.every:
        return False
    return plateau.reached(
        list(read_jsonl(folder.metrics))[:done], until.metric, until.every, until.patience, until.least
    )


def gatherer(
    node: Node, place: Workplace, policy: Policy, objective: Objective, steps: int
) -> Callable[[int], Gathered]:
    """Who samples, and what is written on the samples: step -> annotated rows."""
    assert node.settings is not None and node.pool is not None
    stage, materials, folder = node.settings, place.materials, place.node_dir(node)
    if objective.source == "teacher":
        assert node.cache is not None
        return stored(stage, node.seed, read_cache(place.node_dir(node.cache).cache))
    labels = materials.labels.only(materials.pool(node.pool)) if "reward" in objective.signals else None
    teacher = place.load(node.teacher, frozen=True) if "teacher" in objective.signals and node.teacher else None
    if teacher is not None:
        model.refuse_different_widths(policy, teacher, ("models.student", "models.teacher"))
    prompter = place.prompter(policy)
    return OnPolicy(
        policy=policy,
        stage=stage,
        name=node.stage,
        seed=node.seed,
        objective=objective,
        prompts={name: prompter.ids(materials.problems[name]) for name in materials.prompts(node.pool, stage)},
        sampler=place.sampler(policy),
        text=prompter.completion,
        labels=labels,
        teacher=teacher,
        reference=place.load(node.start, frozen=True) if "reference" in objective.signals else None,
        guard=SignalGuard.of(materials.recipe.guards, labels, steps, lambda: list(read_jsonl(folder.metrics))),
        budget=Budget(materials.recipe.compute.microbatch_tokens),
        # What is sampled again takes other rollouts' places under their names, so nothing may be scored before it stands.
        parts=1 if teacher is None or stage.sparse.dynamic_sampling else materials.recipe.compute.score_ahead,
    )


def rollout_row(row: Row, prompter: Prompter) -> dict[str, Any]:
    out: dict[str, Any] = {
        "problem_id": row.rollout.problem_id,
        "sample": row.rollout.sample,
        "completion": prompter.completion(row.rollout.completion_ids),
        "tokens": row.tokens,
        "finish": row.rollout.finish,
        "sampler": row.rollout.sampler,
    }
    if row.verdict is not None:
        out |= {"correct": row.verdict.correct, "reason": row.verdict.reason, "advantage": row.advantage}
    return out


def model_card(node: Node, place: Workplace, steps: int) -> str:
    recipe = place.materials.recipe
    start = place.plan.names[node.start] if isinstance(node.start, Node) else getattr(recipe.models, node.start)
    note = _label_note(node, place.materials)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- headwater\n---\n\n"
        f"# {recipe.name}: {node.role} after {node.stage} (seed {node.seed})\n\n"
        f"Trained with Headwater from `{start}`: stage `{node.stage}`, objective `{node.settings.objective if node.settings else ''}`, "
        f"{steps} steps. Labels this stage may look at: {note['distinct_allowed'] if note else 0}. "
        "The run's `recipe.json`, `ledger.jsonl` and `report.json` say how it was made and what it scored.\n"
    )
