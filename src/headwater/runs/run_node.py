"""Run one node: gather its capabilities, hand them to the loop, keep what comes out.

A stage is handed labels only if its objective has a sparse term. Warm-up, OPD and fine-tuning have none in reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from headwater.config.stage import Stage
from headwater.losses.batch import Row
from headwater.losses.objectives import Objective, objective_of
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.models.save import save_policy
from headwater.models.tokenizer import refuse_different_widths
from headwater.runs.inputs import RunInputs
from headwater.runs.node_context import Asked, NodeContext, NodeProgress, held_out, named
from headwater.runs.plan import Node
from headwater.runs.stage_measurements import beside
from headwater.sampling.base import requests_for
from headwater.sampling.build import importance_cap
from headwater.storage import fault_points
from headwater.storage.files import rows_from, write_rows
from headwater.storage.ledger import record
from headwater.storage.run_dir import NodeDir, cut_back, read_jsonl, write_json, written_aside
from headwater.teachers.build import Teacher
from headwater.teachers.cache import read_cache, refuse_huge_cache, write_cache
from headwater.training import early_stopping, token_signals
from headwater.training.evaluate import refuse_nan
from headwater.training.guards import GuardMonitor
from headwater.training.loop import StepBatch, train
from headwater.training.rollouts import PolicyRollouts, SignalGuard, stored


def run_node(node: Node, context: NodeContext) -> None:
    """Run a node to its end, or from where it was interrupted. Its DONE file says that it is complete."""
    folder = context.node_dir(node)
    fault_points.failpoint("node.begun")
    write_json(
        folder.info,
        {
            "name": folder.name,
            "kind": node.kind,
            "stage": node.stage,
            "role": node.role,
            "seed": node.seed,
            "parents": [context.plan.names[parent] for parent in node.parents],
            "fingerprint": context.plan.fingerprints[node],
            "labels": _label_note(node, context.inputs),
            "settings": None if node.settings is None else node.settings.model_dump(mode="json"),
            "steps": context.steps(node) if node.kind == "train" else None,
        },
    )
    fault_points.failpoint("node.described")
    ended = {"train": run_train, "rollouts": run_rollouts, "evaluate": run_evaluate}[node.kind](node, context)
    fault_points.failpoint("node.worked")
    folder.finish({"fingerprint": context.plan.fingerprints[node], **({"ended": ended} if ended else {})})
    fault_points.failpoint("node.done")


def _label_note(node: Node, inputs: RunInputs) -> dict[str, Any] | None:
    if node.kind != "train" or node.settings is None or node.pool is None:
        return None
    allowed = len(inputs.pool(node.pool)) if node.settings.needs_labels else 0
    return {"pool": node.pool, "distinct_allowed": allowed}


def run_evaluate(node: Node, context: NodeContext) -> None:
    """Evaluate a base model."""
    folder = context.node_dir(node)
    folder.cut_back_to(-1)
    context.watch.start(0, _completions(context), "completions")
    run_evals(context.frozen(node.start), node, context, "final", 0)


def _completions(context: NodeContext) -> int:
    samples = context.inputs.recipe.evaluate.samples
    return sum(len(problems) * samples for problems, _ in context.inputs.evals.values())


def run_evals(policy: Teacher, node: Node, context: NodeContext, when: str, step: int) -> None:
    """Every evaluation of the recipe, its graded texts and its spend; looks here are never those of training."""
    folder = context.node_dir(node)
    for name, asked in context.inputs.evals.items():
        fault_points.failpoint("evaluation.begun")
        told = stoppable(context.watch) if when == "final" else None
        # Every model answers a problem with the same random numbers: paired comparisons are then less noisy.
        rows, spend = held_out(node, context, policy, asked, "eval", step, (node.seed, "eval", name), told)
        if when == "final":
            write_rows(folder.evaluation(when, name), rows)
        else:
            folder.keep(step, folder.evaluation(when, name), rows)
        fault_points.failpoint("evaluation.written")
        record(folder.ledger, spend)
        fault_points.failpoint("evaluation.charged")


def stoppable(watch: NodeProgress) -> Callable[[int], None]:
    """Progress that ends work which leaves nothing behind: it is done again from its beginning. Raises KeyboardInterrupt."""

    def advance(count: int) -> None:
        watch.advance(count, {})
        if watch.should_stop():
            raise KeyboardInterrupt

    return advance


def run_rollouts(node: Node, context: NodeContext) -> None:
    """Sample a teacher on its prompts and keep what it said with its distributions; one cache for all who need it."""
    assert node.settings is not None and node.pool is not None
    started, settings, folder = time.perf_counter(), node.settings, context.node_dir(node)
    folder.cut_back_to(-1)
    policy = context.frozen(node.start, settings)
    prompter = context.prompter(policy)
    names = context.inputs.prompts(node.pool, settings)
    prompts = [(name, prompter.ids(context.inputs.problems[name])) for name in names]
    context.watch.start(0, 2 * len(prompts) * settings.group_size, "rollouts")
    requests = requests_for(prompts, settings.group_size, 0, node.seed, node.stage)
    advance = stoppable(context.watch)
    rollouts = context.sampler(policy).sample(requests, settings.sampling, lambda found: advance(len(found)))
    fault_points.failpoint("cache.sampled")
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
            context.inputs.recipe.compute.microbatch_tokens,
            advance,
        )
    fault_points.failpoint("cache.saved")
    read = tokens + sum(len(rollout.prompt_ids) for rollout in rollouts)
    record(
        folder.ledger,
        replace(
            context.spend(node),
            tokens_sampled=tokens,
            tokens_teacher_scored=tokens,
            flops=2 * policy.shape.flops(read, read / len(rollouts)),
            seconds=time.perf_counter() - started,
        ),
    )


def run_train(node: Node, context: NodeContext) -> dict[str, Any] | None:
    """One stage of training from its start weights to a model folder and its evaluation.

    Returns {"step", "of", "why"} for a stage that ended before its last step.
    """
    assert node.settings is not None and node.pool is not None
    stage, folder, recipe = node.settings, context.node_dir(node), context.inputs.recipe
    policy = context.trainee(node)
    objective = objective_of(stage, importance_cap(recipe))
    steps = context.steps(node)
    prompter = context.prompter(policy)
    spend = context.spend(node)

    asked = cache(partial(context.frozen, stage=stage))

    def update_flops(rows: Sequence[Row]) -> float:
        # The old log-probs of several updates on one batch take a forward pass more, a third of an update's.
        again = 1.0 / 3.0 if objective.source == "policy" and stage.passes * stage.minibatches > 1 else 0.0
        return (stage.passes + again) * policy.pass_flops([row for row in rows if not row.inert], passes=3)

    def write_rollouts(step: int, rows: Sequence[Row]) -> None:
        shown = token_signals.kept(rows) if objective.source == "policy" else []
        mine = {index: token_signals.signal_of(rows[index], prompter.completion) for index in shown if rows[index].here}
        told = {index: found for held in policy.ranks.all_gather(mine) for index, found in held.items()}
        found = [{**rollout_row(row, prompter), **told.get(index, {})} for index, row in enumerate(rows)]
        folder.keep(step, folder.rollouts(step), found)

    taken = train(
        policy,
        stage,
        steps,
        objective,
        gatherer(node, context, policy, objective, steps, asked),
        folder,
        spend,
        microbatch_tokens=recipe.compute.microbatch_tokens,
        update_flops=update_flops,
        on_start=lambda done: context.watch.start(done, steps, "steps"),
        on_step=lambda step, metrics: context.watch.advance(1, metrics),
        write_rollouts=write_rollouts,
        evaluate=lambda when: run_evals(policy, node, context, when, int(when.removeprefix("step-"))),
        beside=beside(node, context, policy, asked),
        ended=ended(stage, folder),
        guards=GuardMonitor(recipe.guards, folder, context.watch.warn),
        should_stop=context.watch.should_stop,
        say=context.watch.say,
    )
    asked.cache_clear()  # who is asked no more need not wait in memory for the evaluation
    fault_points.failpoint("stage.ended")
    # Interrupted between its last step and DONE, a node evaluates again: what it had recorded of that would count twice.
    cut_back(folder.ledger, lambda row: row["purpose"] != "eval" or row["step"] < taken)
    with written_aside(folder.model) as aside:
        save_policy(policy, aside, policy.compute_dtype)
        (aside / "README.md").write_text(model_card(node, context, taken), encoding="utf-8")
        fault_points.failpoint("model.written")
    fault_points.failpoint("model.saved")
    context.watch.start(0, _completions(context), "completions")
    run_evals(policy, node, context, "final", taken)
    if taken == steps or stage.until is None:
        return None
    return {"step": taken, "of": steps, "why": f"plateau of {stage.until.metric}"}


def ended(stage: Stage, folder: NodeDir) -> Callable[[int], bool]:
    """Steps done -> whether the stage's metric has reached its plateau by then, as far as the steps are written down."""
    until = stage.until
    if until is None:
        return lambda done: False
    held: list[dict[str, Any]] = []  # a row a step, of which only the metric is kept
    size = 0  # of what was read of the file: each row is read once

    def reached(done: int) -> bool:
        nonlocal size
        if done % until.every:
            return False
        rows, size = rows_from(folder.metrics, size)
        held.extend({key: row[key] for key in (until.metric,) if key in row} for row in rows)
        return early_stopping.reached(held[:done], until.metric, until.every, until.patience, until.least)

    return reached


def gatherer(
    node: Node, context: NodeContext, policy: Policy, objective: Objective, steps: int, asked: Asked
) -> Callable[[int], StepBatch]:
    """Who samples, and what is written on the samples: step -> annotated rows."""
    assert node.settings is not None and node.pool is not None
    stage, inputs, folder = node.settings, context.inputs, context.node_dir(node)
    if objective.source == "teacher":
        assert node.cache is not None
        cached = context.node_dir(node.cache)
        cached.refuse_damage(f"{cached.cache.name}/")
        return stored(stage, node.seed, read_cache(cached.cache), policy.ranks)
    labels = inputs.labels.only(inputs.pool(node.pool)) if "reward" in objective.signals else None
    teacher = asked(node.teacher) if "teacher" in objective.signals and node.teacher else None
    if teacher is not None:
        refuse_different_widths(policy, teacher, ("models.student", "models.teacher"))
    prompter = context.prompter(policy)
    return PolicyRollouts(
        policy=policy,
        stage=stage,
        name=node.stage,
        seed=node.seed,
        objective=objective,
        prompts={name: prompter.ids(inputs.problems[name]) for name in inputs.prompts(node.pool, stage)},
        sampler=context.sampler(policy),
        text=prompter.completion,
        labels=labels,
        teacher=teacher,
        reference=context.reference(node, policy) if "reference" in objective.signals else None,
        guard=SignalGuard.of(
            inputs.recipe.guards,
            labels,
            steps,
            earlier=lambda: list(read_jsonl(folder.metrics)),
            charged=lambda: {
                label for row in read_jsonl(folder.ledger) if row["purpose"] == "train" for label in row["labels"]
            },
        ),
        budget=BatchBudget(inputs.recipe.compute.microbatch_tokens),
        # What is sampled again takes other rollouts' places under their names, so nothing may be scored before it stands.
        # Ranks pass together, which a thread beside would disturb.
        parts=1
        if teacher is None or stage.sparse.dynamic_sampling or not policy.ranks.alone
        else inputs.recipe.compute.score_ahead,
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


def model_card(node: Node, context: NodeContext, steps: int) -> str:
    recipe = context.inputs.recipe
    start = (
        context.plan.names[node.start]
        if isinstance(node.start, Node)
        else ", ".join(recipe.models.named(node.start).values())
    )
    note = _label_note(node, context.inputs)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- headwater\n---\n\n"
        f"# {recipe.name}: {node.role} after {node.stage} (seed {node.seed})\n\n"
        f"Trained with Headwater from `{start}`: stage `{node.stage}`, objective `{node.settings.objective if node.settings else ''}`, "
        f"{steps} steps. Labels this stage may look at: {note['distinct_allowed'] if note else 0}. "
        "The run's `recipe.json`, `ledger.jsonl` and `report.json` say how it was made and what it scored.\n"
    )
