"""Doctor checks of problems, gold answers, evaluations and label pools."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations

from headwater.data.contamination import find_leaks
from headwater.data.sources import LoadedProblems
from headwater.data.validate import failing
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, error, note, try_each, warning
from headwater.errors import UserError, shortened
from headwater.runs.inputs import VALIDATION
from headwater.tasks import sandbox

MIN_BALANCE = 0.5
"""Smallest ratio of the halves' sizes."""
SLOW_GOLDS = 200
"""Gold answers graded before a run where the grader is a user's own and may take long."""


def data_is_readable(context: DoctorContext) -> Iterator[Finding]:
    yield from try_each(*(partial(context.inputs.source, name) for name in context.inputs.data_fields))


def columns(context: DoctorContext) -> Iterator[Finding]:
    """Columns besides the problem that its text may need: a passage, choices, another problem column."""
    for name in context.inputs.data_fields:
        for unused in context.inputs.source(name).unused:
            yield warning("column-not-read", f"{name}: {unused.evidence}", unused.remedy(f"{name}.columns.problem"))


def _graded(context: DoctorContext) -> dict[str, LoadedProblems]:
    """The sources that need gold answers."""
    return {name: context.inputs.source(name) for name in context.inputs.data_fields if name != "data.unlabeled"}


def answers(context: DoctorContext) -> Iterator[Finding]:
    for name, loaded in _graded(context).items():
        if loaded.without_answer:
            rows = shortened([str(loaded.rows[id_][0]) for id_ in loaded.without_answer])
            yield error(
                "label-without-answer",
                f"{name}: {len(loaded.without_answer)} of {len(loaded.problems)} problems have no answer (rows {rows})",
                'give them answers (of a solution: a box, `#### 42`, or "The answer is 42"), name the column in '
                "data.columns.answer, or move them to data.unlabeled",
            )


def golds(context: DoctorContext) -> Iterator[Finding]:
    """Every gold answer, written as a completion, must grade correct against itself."""
    task = context.recipe.task
    if task is None:
        return
    grader = context.inputs.grader
    if task == "python" and grader.sandbox == "required" and sandbox.refusal():
        return  # has its own finding
    slow = grader.task.bounded and grader.task.quick is None and not context.exhaustive
    for name, loaded in _graded(context).items():
        pairs = list(loaded.gold.items())[: SLOW_GOLDS if slow else None]
        try:
            failed = [f"{id_} ({gold!r:.40}: {reason})" for id_, gold, reason in failing(grader, pairs)]
        except UserError as refused:
            yield error("grader-returns-no-verdict", str(refused), "return a bool, not a score or a text")
            return
        if failed:
            # A built-in grader that fails most golds was not made for this data: every reward would be 0.
            wrong_task = ":" not in task and 2 * len(failed) > len(pairs)
            yield Finding(
                "gold-fails-grader",
                "error" if wrong_task else "warning",
                f"{name}: {len(failed)} of {len(pairs)} labels do not grade correct against themselves under task "
                f"{task}: {shortened(failed)}",
                "a label that fails its own grader is wasted: fix or remove it, or choose another task",
            )


def sandbox_layers(context: DoctorContext) -> Iterator[Finding]:
    """Protections of the machine under which completions of the task `python` run."""
    if context.recipe.task != "python":
        return
    refusal, layers = sandbox.refusal(), ", ".join(sandbox.layers())
    if refusal is None:
        yield note("sandbox-layers", f"completions run under {layers}", "nothing: docs/safety.md describes each layer")
    elif context.recipe.compute.sandbox == "required":
        yield error("sandbox-missing", refusal, "run on Linux with x86-64 or ARM64, or set compute.sandbox=optional")
    else:
        yield warning("sandbox-incomplete", refusal, "read samples, and run on a machine that holds nothing else")


def contamination(context: DoctorContext) -> Iterator[Finding]:
    for name in ("data.labeled", "data.unlabeled"):
        leaks = context.inputs.decontaminated(name).leaks if name in context.inputs.data_fields else ()
        for held_out in dict.fromkeys(leak.eval for leak in leaks):
            shared = [leak for leak in leaks if leak.eval == held_out]
            exact = sum(leak.why == "exact" for leak in shared)
            yield warning(
                "evaluation-leak",
                f"{name}: {len(shared)} problems are also in {held_out if held_out == VALIDATION else f'data.evals.{held_out}'}, "
                f"{exact} of them word for word ({shortened([leak.problem_id for leak in shared])}); they are left out of training",
                "nothing, unless there are many: then check the models' pretraining data for the same",
            )


def repeats(context: DoctorContext) -> Iterator[Finding]:
    for name in context.inputs.data_fields:
        loaded = context.inputs.source(name)
        if loaded.duplicates:
            yield warning(
                "duplicates",
                f"{name}: {loaded.duplicates} rows repeat an earlier problem; each problem counts once",
                "nothing, or remove the repeated rows so that counts agree with the file",
            )
        if loaded.contradictions:
            rows = [" and ".join(map(str, loaded.rows[id_][:2])) for id_ in loaded.contradictions]
            yield warning(
                "contradicting-answers",
                f"{name}: {len(loaded.contradictions)} problems have several different answers (rows {shortened(rows)}); left out",
                "keep the right answer and remove the others",
            )


def evaluations(context: DoctorContext) -> Iterator[Finding]:
    evals = context.inputs.eval_sources
    for name, loaded in evals.items():
        if not loaded.problems:
            yield error(
                "evaluation-empty",
                f"data.evals.{name}: holds no problem that could be graded",
                "give it another file, or remove it from data.evals",
            )
    for (first, loaded), (second, other) in combinations(evals.items(), 2):
        shared = [leak.problem_id for leak in find_leaks(loaded.problems, {second: other.problems})]
        if shared:
            yield warning(
                "evaluations-overlap",
                f"data.evals.{first} and data.evals.{second} share {len(shared)} problems ({shortened(shared)}), so their results are "
                "not independent",
                "remove the shared problems from one of them",
            )


def halves(context: DoctorContext) -> Iterator[Finding]:
    """The two halves of the bought labels must be disjoint, and about equally large where an arm uses them."""
    pools = context.inputs.pools
    both = set(pools.first_half) & set(pools.second_half)
    if both:
        yield error(
            "halves-overlap",
            f"labels.budget: {len(both)} problems are in both halves ({shortened(sorted(both))})",
            "report a bug: halves are split by content hash and must be disjoint",
        )
    sizes = len(pools.first_half), len(pools.second_half)
    used = {node.pool for node in context.nodes} & {"first_half", "second_half"}
    if used and min(sizes) < MIN_BALANCE * max(sizes):
        yield warning(
            "halves-unbalanced",
            f"labels.budget: the halves hold {sizes[0]} and {sizes[1]} problems",
            "buy an even number of labels, or add labelled problems: halves go by content, so a small pool divides unevenly",
        )


def pool_sizes(context: DoctorContext) -> Iterator[Finding]:
    """Every stage's pool must hold the problems of one step."""
    inputs = context.inputs
    for node, stage in context.training:
        pool, needed = len(inputs.prompts(node.pool, stage)), stage.prompts_per_step if stage.on_policy else 1
        if pool < needed:
            yield error(
                "pool-too-small",
                f"labels.budget {len(inputs.pools.all)}: gives stage {node.stage} a pool of {pool} problems ({node.pool}), fewer "
                f"than the {needed} of one step (stages.{context.recipe_stage(node)}.batch_size {stage.batch_size} / group_size "
                f"{stage.group_size})",
                "raise labels.budget, lower the stage's batch_size, or raise its group_size"
                + ("" if stage.needs_labels else ", set its prompts to every, or add prompts as data.unlabeled"),
            )
