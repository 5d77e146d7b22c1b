"""Train one node: a stage from its initial weights, or its last checkpoint, to a saved and evaluated model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from headwater.config.guards import Guards
from headwater.config.recipe import Recipe
from headwater.config.stage import Stage
from headwater.errors import StopRequested, TrainingStoppedError, UserError
from headwater.losses.batch import Row
from headwater.losses.objectives import Objective, objective_of
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.models.save import save_policy
from headwater.models.tokenizer import refuse_different_widths
from headwater.runs.evaluate_node import run_evals
from headwater.runs.node import Node, TrainNode, base_of
from headwater.runs.node_context import LoadTeacher, NodeContext, after_step
from headwater.runs.stage_measurements import StageMeasurements
from headwater.sampling.ahead import AheadSampler
from headwater.sampling.build import importance_cap
from headwater.sampling.sharded_sampler import ShardedSampler
from headwater.storage import fault_points
from headwater.storage.files import Logs, append_jsonl, atomic_folder, keep_rows, read_jsonl
from headwater.storage.ledger import record
from headwater.teachers.build import uses_candidates
from headwater.teachers.cache import read_cache
from headwater.teachers.composed import ComposedTeacher, gain, product
from headwater.teachers.exchanged_scores import can_exchange_scores, on_group
from headwater.teachers.served_teacher import NO_CANDIDATES
from headwater.teachers.server_client import is_served
from headwater.teachers.translated import Supervisor, TranslatedTeacher
from headwater.training import token_signals
from headwater.training.checkpoint import load_checkpoint, prune, save_checkpoint
from headwater.training.early_stopping import has_plateau
from headwater.training.guards import GuardMonitor, StageOutcomes, no_signal, unchanged_teacher
from headwater.training.lagged_copy import lagged_copy
from headwater.training.loop import Source, StepResult, train_steps
from headwater.training.rollouts import CachedRollouts, PolicyRollouts
from headwater.training.update import make_optimizer, needs_old_logp


def train_node(node: TrainNode, context: NodeContext) -> dict[str, Any] | None:
    """Train a stage, save its model and evaluate it.

    Returns, for DONE, `ended`: {"step", "of", "why"} of a stage that stopped before its last step.
    """
    stage, folder = node.settings, context.node_dir(node)
    policy = context.trainee(node)
    steps = context.steps(node)
    ahead = ahead_sampler(node, context, policy, steps)
    with contextlib.nullcontext() if ahead is None else contextlib.closing(ahead):
        step = train_stage(node, context, policy, steps, ahead)
    fault_points.failpoint("stage.ended")
    if node.role == "teacher":
        outcomes = StageOutcomes(folder, f"stages.{node.stage}", stage.sampling.max_tokens)
        if why := unchanged_teacher(context.inputs.recipe.guards, outcomes, context.progress.warn):
            raise TrainingStoppedError(f"step {step} of {steps}: {why}")
    # A node that was interrupted between its last step and DONE evaluates again: drop the ledger rows of the first time.
    keep_rows(folder.ledger, lambda row: row["purpose"] != "eval" or row["step"] < step)
    with atomic_folder(folder.model) as aside:
        save_policy(policy, aside, policy.compute_dtype)
        (aside / "README.md").write_text(model_card(node, context, step), encoding="utf-8")
        fault_points.failpoint("model.written")
    fault_points.failpoint("model.saved")
    run_evals(policy, node, context, "final", step)
    if step == steps or stage.until is None:
        return None
    return {"ended": {"step": step, "of": steps, "why": f"plateau of {stage.until.metric}"}}


def ahead_sampler(node: TrainNode, context: NodeContext, policy: Policy, steps: int) -> AheadSampler | None:
    """The stage's sampler of the next step's rollouts; None without `compute.overlap`, and for a stage that samples nothing."""
    if not (context.inputs.recipe.compute.overlap and node.settings.on_policy):
        return None
    sampler = context.inputs.recipe.compute.sampler
    if sampler != "torch" and not policy.ranks.single_process:
        raise UserError(f"compute.overlap: with compute.sampler {sampler} it runs in one process; leave torchrun out")
    return AheadSampler(policy, context.sampling_copy(node), context.inputs.sampler, context.sampler(policy), steps)


def guards_of(recipe: Recipe) -> Guards:
    """The recipe's guards without `teacher_jump` where every teacher is in this process: its weights change only as the recipe says."""
    if any(is_served(name) for name in recipe.models.by_role("teacher").values()):
        return recipe.guards
    off = recipe.guards.teacher_jump.model_copy(update={"action": "off"})
    return recipe.guards.model_copy(update={"teacher_jump": off})


def train_stage(
    node: TrainNode, context: NodeContext, policy: Policy, steps: int, ahead: AheadSampler | None = None
) -> int:
    """Train the policy from its last checkpoint to the end of the stage; return the number of finished steps.

    Each step is recorded in the order metrics, ledger, rollouts, condition C2, evaluation, checkpoint: exact resume depends on it.
    Whatever stops training, the step is recorded first: its labels were used. A step that was not finished leaves no
    checkpoint; one that is resumed is measured first if an interrupt left that out.

    Raises TrainingStoppedError when a guard or the loop stops training, KeyboardInterrupt when asked to stop. Both leave a
    checkpoint to resume from.
    """
    stage, recipe, folder, progress = node.settings, context.inputs.recipe, context.node_dir(node), context.progress
    objective = objective_of(stage, importance_cap(recipe))
    load_teacher: LoadTeacher = cache(partial(context.teacher, node=node))
    reference = context.reference(node, policy) if uses_reference(node, objective) else None
    copy = None
    if stage.dense.start_update is not None and reference is not None:
        copy = lagged_copy(policy, reference, stage.dense.start_update)
    source = rollout_source(node, context, policy, objective, reference, load_teacher, ahead)
    measurements = StageMeasurements(node, context, policy, load_teacher)
    optimizer = make_optimizer(policy, stage.optim)
    parts = [part for part in (copy, ahead) if part is not None]
    done = load_checkpoint(folder, policy.model, optimizer, progress.say, policy.ranks, parts)
    fault_points.failpoint("stage.loaded")
    folder.cut_back_to(done if done else -1)
    prune(folder)  # a process killed right after its last checkpoint has not pruned
    fault_points.failpoint("stage.begun")
    logs = Logs(folder.logs)
    progress.start(done, steps, "steps")

    outcomes = StageOutcomes(folder, f"stages.{node.stage}", stage.sampling.max_tokens)
    guards = GuardMonitor(guards_of(recipe), outcomes, steps, progress.warn)
    pool = len(context.inputs.pool(node.pool))
    microbatch_tokens = recipe.compute.microbatch_tokens
    rows = list(read_jsonl(folder.metrics))
    if why := no_signal(recipe.guards, outcomes, rows, steps, pool, stage.dense) or guards.catch_up(rows):
        raise TrainingStoppedError(f"step {done} of {steps}: {why}")
    if rows:  # sums over smaller microbatches differ in their last bits, so a resumed stage keeps the size
        microbatch_tokens = min(microbatch_tokens, int(rows[-1].get("microbatch_tokens", microbatch_tokens)))

    def measure(step: int) -> bool:
        """Measure what is due after a step and not written yet; whether the step is the last."""
        last = step == steps or has_plateau(rows, stage.until)
        measurements.condition_c2(step, last=step == steps)
        if stage.eval_every and step and step % stage.eval_every == 0 and not last:
            run_evals(policy, node, context, f"step-{step:06d}", step)
            fault_points.failpoint("step.evaluated")
        return last

    def checkpoint(step: int) -> None:
        if ahead is not None and step < steps:
            with after_step(step):
                ahead.wait()
        save_checkpoint(folder, step, policy.model, optimizer, logs, policy.ranks, parts)

    marks = logs.marks()
    ended = measure(done)
    if done and logs.marks() != marks:  # an interrupt had left it out: the checkpoint refers to it as any other does
        checkpoint(done)
    if ended and done:
        return done
    for result in train_steps(policy, optimizer, source, objective, range(done, steps), microbatch_tokens):
        step = result.step
        row, stopped = result.metrics, result.stopped
        if copy is not None and stopped is None:
            copy.follow(step)
        error = None if stopped is None else TrainingStoppedError(f"step {step} of {steps}: {stopped}")
        if error is None:
            try:
                row = {**row, **measurements.validation(step)}
            except TrainingStoppedError as measuring:
                error = measuring
        append_jsonl(folder.metrics, [row])
        rows.append(row)
        fault_points.failpoint("step.measured")
        charge(node, context, result, policy)
        fault_points.failpoint("step.charged")
        write_rollouts(node, context, result, policy)
        fault_points.failpoint("step.kept")
        progress.advance(1, row)
        if error is not None:
            raise error
        guard_stop = guards.check(row)  # also where the next line stops: it records what it warns of
        why = no_signal(recipe.guards, outcomes, rows, steps, pool, stage.dense) or guard_stop
        last = stop = False
        try:
            last = measure(step)
        except StopRequested:  # measured when the stage is resumed
            stop = True
        fault_points.failpoint("step.ended")
        stop = stop or progress.should_stop()
        if last or stop or why or (stage.checkpoint_every and step % stage.checkpoint_every == 0):
            checkpoint(step)
        if why:
            raise TrainingStoppedError(f"step {step} of {steps}: {why}")
        if last:
            return step
        if stop:
            raise KeyboardInterrupt
    return steps


def rollout_source(
    node: TrainNode,
    context: NodeContext,
    policy: Policy,
    objective: Objective,
    reference: Policy | None,
    load_teacher: LoadTeacher,
    ahead: AheadSampler | None = None,
) -> Source:
    """The stage's source of rollouts. It is given labels only when its objective has a sparse term."""
    stage, inputs = node.settings, context.inputs
    prompts = inputs.prompts(node.pool, stage)
    tags = {problem.id: problem.tag for problem in inputs.all_problems} if stage.dense.normalize == "tags" else {}
    if node.cache is not None:
        folder = context.node_dir(node.cache)
        folder.refuse_damage(f"{folder.cache.name}/")
        return CachedRollouts(read_cache(folder.cache), prompts, stage, node.seed, policy.ranks, tags)
    teacher = stage_teacher(node, context, policy, reference, load_teacher)
    prompter = context.prompter(node, policy)
    if stage.grades_spent_labels:
        spent = spent_labels(node, context)
        prompts = tuple(name for name in prompts if name in spent)
    # Dynamic sampling reuses (problem, sample) keys, so scores made while sampling could belong to discarded rollouts.
    # The base under an adapter is the policy that samples, with the adapter switched off.
    shares_policy = policy.adapter is not None and node.start in node.scorers()
    parts = (
        1 if teacher is None or stage.sparse.dynamic_sampling or shares_policy else inputs.recipe.compute.score_ahead
    )
    chooser = None
    if stage.dense.candidates != "teacher":
        if uses_candidates(teacher.model if isinstance(teacher, TranslatedTeacher) else teacher):
            chooser = policy
        else:
            context.progress.warn(f"{node.stage}: {NO_CANDIDATES}")
    sampler = context.sampler(policy) if ahead is None else ahead
    if parts > 1 and not policy.ranks.single_process:
        if teacher is None or not can_exchange_scores(teacher) or not isinstance(sampler, ShardedSampler):
            parts = 1  # scores that cannot be sent, or vLLM, whose ranks sample together
        elif not isinstance(teacher, ComposedTeacher):
            group = policy.ranks.duplicate()
            teacher, chooser = on_group(teacher, group), None if chooser is None else replace(chooser, ranks=group)
    return PolicyRollouts(
        policy=policy,
        stage=stage,
        draw=(node.seed, node.stage),
        objective=objective,
        prompts={name: prompter.ids(inputs.problems[name]) for name in prompts},
        sampler=sampler,
        prompter=prompter,
        labels=inputs.labels.only(inputs.pool(node.pool)) if stage.needs_labels else None,
        teacher=teacher,
        reference=reference if stage.needs_reference else None,
        budget=BatchBudget(inputs.recipe.compute.microbatch_tokens),
        parts=parts,
        labels_shown=context.labels_shown(node),
        chooser=chooser,
        tags=tags,
    )


def spent_labels(node: TrainNode, context: NodeContext) -> set[str]:
    """Ids of the problems whose labels the stages before this one used."""
    earlier = [context.node_dir(parent).ledger for parent in node.lineage() if parent != node]
    spends = (spend for ledger in earlier for spend in read_jsonl(ledger))
    return {label for spend in spends if spend["purpose"] == "train" for label in spend["labels"]}


def uses_reference(node: TrainNode, objective: Objective) -> bool:
    """Whether a stage needs its initial weights: for a KL term, or as a part of its teacher."""
    return "reference" in objective.signals or node.start in node.scorers()


def stage_teacher(
    node: TrainNode, context: NodeContext, policy: Policy, reference: Policy | None, load_teacher: LoadTeacher
) -> Supervisor | ComposedTeacher | None:
    """The model that scores a stage's rollouts, or the combination of several; None without one.

    reference  the stage's initial weights, where they are one of them

    Raises UserError where vocabularies have different widths.
    """
    models: list[Supervisor] = []
    for source in node.scorers():
        if source == node.start and reference is not None:
            models.append(context.translated_teacher(reference, base_of(source), node))
        else:
            models.append(load_teacher(source))
        refuse_different_widths(policy, models[-1], ("models.student", "models.teacher"))
    if not models:
        return None
    weights = tuple(node.scorers().values())
    if weights == (1.0,):
        return models[0]
    return ComposedTeacher(tuple(models), gain if node.settings.dense.gain_over is not None else product(weights))


def charge(node: TrainNode, context: NodeContext, result: StepResult, policy: Policy) -> None:
    """Add the step's ledger row: labels, completions graded, tokens, FLOPs and seconds."""
    batch = result.batch
    updated = 0.0 if result.stopped else update_flops(node.settings, policy, batch.rows)
    record(
        context.node_dir(node).ledger,
        replace(
            context.spend(node),
            step=result.step,
            labels=batch.labels,
            checks=batch.checks,
            tokens_sampled=batch.tokens_sampled,
            tokens_trained=int(result.metrics["tokens_trained"]),
            tokens_teacher_scored=batch.tokens_teacher_scored,
            flops=batch.flops + updated,
            seconds=result.seconds,
        ),
    )


def update_flops(stage: Stage, policy: Policy, rows: Sequence[Row]) -> float:
    """FLOPs of a step's forward and backward passes.

    Several updates on one batch need the old log-probs: one more forward pass, a third of an update.
    """
    passes = stage.passes + (1.0 / 3.0 if needs_old_logp(stage) else 0.0)
    return passes * policy.pass_flops([row for row in rows if not row.zero_gradient], passes=3)


def write_rollouts(node: TrainNode, context: NodeContext, result: StepResult, policy: Policy) -> None:
    """Write the step's completions and verdicts; a few with the teacher's signal per token."""
    on_policy = node.settings.on_policy
    folder, prompter, rows = context.node_dir(node), context.prompter(node, policy), result.batch.rows
    # Ranks exchange the signals; one that stopped may be alone.
    shown = token_signals.kept(rows) if on_policy and result.stopped is None else []
    own = {i: token_signals.signal_of(rows[i], prompter.completion) for i in shown if rows[i].local}
    parts = policy.ranks.all_gather(own) if shown else []
    signals = {i: signal for part in parts for i, signal in part.items()}
    lines = [{**rollout_row(row, prompter), **signals.get(i, {})} for i, row in enumerate(rows)]
    shown_labels = context.labels_shown(node) if on_policy else frozenset()
    lines = [line | ({"label_shown": True} if line["problem_id"] in shown_labels else {}) for line in lines]
    folder.keep(result.step, folder.rollouts(result.step), lines)


def rollout_row(row: Row, prompter: Prompter) -> dict[str, Any]:
    line: dict[str, Any] = {
        "problem_id": row.rollout.problem_id,
        "sample": row.rollout.sample,
        "completion": prompter.completion(row.rollout.completion_ids),
        "tokens": row.tokens,
        "finish": row.rollout.finish,
        "sampler": row.rollout.sampler,
    }
    if row.verdict is not None:
        line |= {"correct": row.verdict.correct, "reason": row.verdict.reason, "advantage": row.advantage}
    return line


def label_note(node: TrainNode, context: NodeContext) -> dict[str, Any]:
    """The labels that a stage may use: {"pool", "distinct_allowed"}."""
    pool = context.inputs.pool(node.pool)
    shown = context.labels_shown(node) & set(pool) if node.settings.on_policy else ()
    allowed = len(pool) if node.settings.needs_labels else len(shown)
    return {"pool": node.pool, "distinct_allowed": allowed}


def model_card(node: TrainNode, context: NodeContext, steps: int) -> str:
    """README.md of a trained model."""
    recipe = context.inputs.recipe
    if isinstance(node.start, Node):
        start = context.plan.names[node.start]
    else:
        start = ", ".join(recipe.models.by_role(node.start).values())
    stage = node.settings
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- headwater\n---\n\n"
        f"# {recipe.name}: {node.role} after {node.stage} (seed {node.seed})\n\n"
        f"Trained with Headwater from `{start}`: stage `{node.stage}`, objective `{stage.objective}` "
        f"({stage.spec.description}), {steps} steps. Labels this stage may use: {label_note(node, context)['distinct_allowed']}. "
        "The run's `recipe.json`, `ledger.jsonl` and `report.json` say how it was made and what it scored.\n"
    )
