"""Run one node: gather its capabilities, hand them to the loop, keep what comes out.

A stage is handed labels only if its objective has a sparse term. Warm-up, OPD and fine-tuning have none in reach.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from headwater import model, seeds
from headwater.batch import Row
from headwater.config import Stage
from headwater.errors import TrainingStoppedError
from headwater.evaluate import evaluate, refuse_nan
from headwater.labels import Labels
from headwater.ledger import Spend, record
from headwater.materials import Materials
from headwater.model import Policy, Shape
from headwater.objective import Objective, objective_of, with_rewards
from headwater.plan import Node, Plan, Role
from headwater.prompts import Prompter
from headwater.rundir import NodeDir, RunDir, append_jsonl, cut_back, read_jsonl, write_json, written_aside
from headwater.sampler import Sampler, TorchSampler, requests_for
from headwater.teacher import distributions_of, logp_of, read_cache, refuse_huge_cache, write_cache
from headwater.train import Gathered, Metrics, train


@dataclass(frozen=True)
class Watch:
    """Who is told how far a node is: start(steps already done, total, unit), advance(count, metrics)."""

    start: Callable[[int, int, str], None]
    advance: Callable[[int, Metrics], None]
    should_stop: Callable[[], bool]


@dataclass(frozen=True)
class Workplace:
    """What a node needs beside its own description."""

    plan: Plan
    materials: Materials
    out: RunDir
    watch: Watch

    def node_dir(self, node: Node) -> NodeDir:
        return self.out.node(self.plan.names[node])

    def spend(self, node: Node, stage: str | None = None) -> Spend:
        return Spend(self.plan.names[node], stage or node.stage, node.seed, 0, "train")

    def load(self, whose: Role | Node, frozen: bool) -> Policy:
        """Base weights of the recipe, or those that a node trained."""
        models, device = self.materials.recipe.models, self.materials.device
        if isinstance(whose, Node):
            folder = self.node_dir(whose).model
            return model.load(str(folder), str(folder), models, device, frozen, self.plan.fingerprints[whose])
        return model.load(getattr(models, whose), f"models.{whose}", models, device, frozen)

    def sampler(self, policy: Policy) -> Sampler:
        return TorchSampler(policy, self.materials.recipe.compute.sample_batch)

    def prompter(self, policy: Policy) -> Prompter:
        return Prompter(policy.tokenizer, self.materials.recipe.prompt)


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
    {"train": run_train, "rollouts": run_rollouts, "evaluate": run_evaluate}[node.kind](node, place)
    write_json(folder.done, {"fingerprint": place.plan.fingerprints[node]})


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
    settings, folder = place.materials.recipe.evaluate, place.node_dir(node)
    shape = Shape.from_config(policy.model.config)
    for name, (problems, labels) in place.materials.evals.items():
        with named(node, step):
            rows, spent = evaluate(
                place.sampler(policy),
                place.prompter(policy),
                problems,
                labels,
                settings,
                # Every model answers a problem with the same random numbers: paired comparisons are then less noisy.
                (node.seed, "eval", name),
                place.materials.task.extract,
                (lambda count: place.watch.advance(count, {})) if when == "final" else None,
            )
        path = folder.evaluation(when, name)
        path.unlink(missing_ok=True)
        append_jsonl(path, rows)
        tokens = spent["tokens_sampled"] + spent["tokens_prompt"]
        record(
            folder.ledger,
            replace(
                place.spend(node),
                purpose="eval",
                step=step,
                labels=tuple(problem.id for problem in problems),
                checks=int(spent["checks"]),
                tokens_sampled=int(spent["tokens_sampled"]),
                flops=shape.flops(tokens, tokens / max(1, spent["checks"])),
                seconds=spent["seconds"],
            ),
        )


@contextlib.contextmanager
def named(node: Node, step: int) -> Iterator[None]:
    """Put the stage and the step in front of the sentence with which something below stops."""
    try:
        yield
    except TrainingStoppedError as error:
        raise TrainingStoppedError(f"{node.stage}, after step {step}: {error}") from None


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
    rollouts = place.sampler(policy).sample(requests, settings.sampling, lambda count: place.watch.advance(count, {}))
    with named(node, 0):
        refuse_nan(rollouts)
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    refuse_huge_cache(policy, tokens, settings.dense.top_k)
    with written_aside(folder.cache) as aside:
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


def run_train(node: Node, place: Workplace) -> None:
    """One stage of training from its start weights to a model folder and its evaluation."""
    assert node.settings is not None and node.pool is not None
    stage, folder, recipe = node.settings, place.node_dir(node), place.materials.recipe
    policy = place.load(node.start, frozen=False)
    objective = objective_of(stage)
    names = place.materials.prompts(node.pool, stage)
    steps = stage.steps_over(len(names))
    prompter = place.prompter(policy)
    shape = Shape.from_config(policy.model.config)
    spend = place.spend(node)

    def update_flops(rows: Sequence[Row]) -> float:
        live = [len(row.rollout.prompt_ids) + row.tokens for row in rows if not row.inert]
        again = 1.0 / 3.0 if stage.passes * stage.minibatches > 1 else 0.0  # the forward pass for the old log-probs
        return (stage.passes + again) * sum(shape.flops(length, length / 2, passes=3) for length in live)

    def write_rollouts(step: int, rows: Sequence[Row]) -> None:
        path = folder.rollouts(step)
        path.unlink(missing_ok=True)
        append_jsonl(path, [rollout_row(row, prompter) for row in rows])

    train(
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
        should_stop=place.watch.should_stop,
    )
    # Interrupted between its last step and DONE, a node evaluates again: what it had recorded of that would count twice.
    cut_back(folder.ledger, lambda row: row["purpose"] != "eval" or row["step"] < steps)
    with written_aside(folder.model) as aside:
        model.save(policy, aside, policy.compute)
        (aside / "README.md").write_text(model_card(node, place, steps), encoding="utf-8")
    place.watch.start(0, _completions(place), "completions")
    run_evals(policy, node, place, "final", steps)


def gatherer(
    node: Node, place: Workplace, policy: Policy, objective: Objective, steps: int
) -> Callable[[int], Gathered]:
    """Who samples, and what is written on the samples: step -> annotated rows."""
    assert node.settings is not None and node.pool is not None
    stage, materials = node.settings, place.materials
    if objective.source == "teacher":
        assert node.cache is not None
        return stored(stage, node.seed, read_cache(place.node_dir(node.cache).cache))
    labels = materials.labels.only(materials.pool(node.pool)) if "reward" in objective.signals else None
    teacher = place.load(node.teacher, frozen=True) if "teacher" in objective.signals and node.teacher else None
    if teacher is not None:
        model.refuse_different_widths(policy, teacher, ("models.student", "models.teacher"))
    reference = place.load(node.start, frozen=True) if "reference" in objective.signals else None
    names = materials.prompts(node.pool, stage)
    prompter = place.prompter(policy)
    prompts = {name: prompter.ids(materials.problems[name]) for name in names}
    watch_signal = SignalGuard.of(node, place, labels, steps)
    return on_policy(stage, node, place, policy, objective, prompts, labels, teacher, reference, watch_signal)


def stored(stage: Stage, seed: int, rows: Sequence[Row]) -> Callable[[int], Gathered]:
    """Cached teacher rollouts, gone through in a fresh order each epoch."""

    def gather(step: int) -> Gathered:
        chosen = []
        for position in range(step * stage.batch_size, (step + 1) * stage.batch_size):
            epoch, place = divmod(position, len(rows))
            chosen.append(rows[orders(epoch)[place]])
        return Gathered(chosen, {"seconds_sample": 0.0, "seconds_score": 0.0, "truncated": truncated(chosen)})

    held: dict[int, list[int]] = {}

    def orders(epoch: int) -> list[int]:
        if epoch not in held:
            held.clear()
            held[epoch] = seeds.generator(seed, "stored", epoch).permutation(len(rows)).tolist()
        return held[epoch]

    return gather


def on_policy(
    stage: Stage,
    node: Node,
    place: Workplace,
    policy: Policy,
    objective: Objective,
    prompts: dict[str, tuple[int, ...]],
    labels: Labels | None,
    teacher: Policy | None,
    reference: Policy | None,
    guard: SignalGuard,
) -> Callable[[int], Gathered]:
    """Rollouts of the policy as it is now, with the signals that the objective asks for."""
    names, sampler, text = list(prompts), place.sampler(policy), place.prompter(policy).completion
    limit = place.materials.recipe.compute.microbatch_tokens
    shape = Shape.from_config(policy.model.config)

    def problems_of(step: int, attempt: int) -> list[str]:
        count = stage.prompts_per_step
        if attempt:  # replacements for groups without a signal come from an order of their own
            return seeds.shuffled(names, node.seed, node.stage, "again", step, attempt)[:count]
        chosen: list[str] = []
        for position in range(step * count, (step + 1) * count):
            epoch, index = divmod(position, len(names))
            order = seeds.shuffled(names, node.seed, node.stage, "epoch", epoch)
            # Where an epoch ends within a step, its successor must not bring a problem twice into one batch.
            chosen.append(next(name for name in order[index:] + order[:index] if name not in chosen))
        return chosen

    def sampled(step: int, attempt: int) -> list[Row]:
        wanted = requests_for(
            [(name, prompts[name]) for name in problems_of(step, attempt)],
            stage.group_size, 0, node.seed, node.stage, step, attempt,
        )  # fmt: skip
        return [Row(rollout) for rollout in refuse_nan(sampler.sample(wanted, stage.sampling))]

    def gather(step: int) -> Gathered:
        seconds, started = {"sample": 0.0, "score": 0.0}, time.perf_counter()
        everything: list[Row] = []
        kept: list[Row] = []
        for attempt in range(1 + stage.sparse.dynamic_sampling):
            started = time.perf_counter()
            rows = sampled(step, attempt)
            seconds["sample"] += time.perf_counter() - started
            if labels is not None:
                started = time.perf_counter()
                rows = with_rewards(rows, stage, labels.check, text, objective.idle_without_advantage)
                seconds["score"] += time.perf_counter() - started
            everything += rows
            kept = merged(kept, rows, stage)
            if labels is None or stage.sparse.dynamic_sampling == 0 or uninformative(kept, stage) == 0:
                break
        started = time.perf_counter()
        kept = scored(kept)
        seconds["score"] += time.perf_counter() - started
        metrics: Metrics = {f"seconds_{name}": value for name, value in seconds.items()} | {
            "truncated": truncated(everything)
        }
        metrics["completion_tokens"] = sum(row.tokens for row in everything) / len(everything)
        if labels is not None:
            groups = len(everything) // stage.group_size
            metrics["reward"] = sum(row.verdict.correct for row in everything if row.verdict) / len(everything)
            metrics["informative"] = 1.0 - uninformative(everything, stage) / groups
            guard.look(step, groups, metrics)
        tokens = sum(row.tokens for row in everything)
        read = [len(row.rollout.prompt_ids) + row.tokens for row in kept]
        context = sum(read) / len(read)
        flops = shape.flops(
            tokens + sum(len(prompts[name]) for name in {r.rollout.problem_id for r in everything}), context / 2
        )
        for scorer in (teacher, reference):
            if scorer is not None:
                flops += Shape.from_config(scorer.model.config).flops(sum(read), context / 2)
        return Gathered(
            kept,
            metrics,
            labels=() if labels is None else tuple(sorted({row.rollout.problem_id for row in everything})),
            checks=0 if labels is None else len(everything),
            tokens_sampled=tokens,
            tokens_teacher_scored=0 if teacher is None else sum(row.tokens for row in kept),
            flops=flops,
        )

    def scored(rows: list[Row]) -> list[Row]:
        rollouts = [row.rollout for row in rows]
        if reference is not None:
            logps = logp_of(reference, rollouts, limit)
            rows = [replace(row, reference_logp=logp) for row, logp in zip(rows, logps, strict=True)]
        if teacher is not None:
            with torch.no_grad():
                found = distributions_of(teacher, rollouts, limit)
            rows = [replace(row, teacher=one) for row, one in zip(rows, found, strict=True)]
        return rows

    return gather


def merged(kept: list[Row], fresh: list[Row], stage: Stage) -> list[Row]:
    """Keep what was there, but let informative fresh groups take the places of uninformative ones (dynamic sampling)."""
    if not kept:
        return fresh
    size = stage.group_size
    groups = [kept[start : start + size] for start in range(0, len(kept), size)]
    spare = [fresh[start : start + size] for start in range(0, len(fresh), size)]
    better = iter([group for group in spare if uninformative(group, stage) == 0])
    out = [group if uninformative(group, stage) == 0 else next(better, group) for group in groups]
    return [row for group in out for row in group]


def uninformative(rows: Sequence[Row], stage: Stage) -> int:
    """Groups whose verdicts are all the same."""
    size = stage.group_size
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return sum(len({row.verdict.correct for row in group if row.verdict}) < 2 for group in groups)


def truncated(rows: Sequence[Row]) -> float:
    return sum(row.rollout.finish == "length" for row in rows) / len(rows)


@dataclass(frozen=True)
class SignalGuard:
    """Stops a stage whose labels buy nothing: no group of its first steps has rewards that differ."""

    stop: bool
    patience: int
    pool: int
    looked_at: Callable[[], int]
    earlier: Callable[[], list[dict[str, Any]]]

    @staticmethod
    def of(node: Node, place: Workplace, labels: Labels | None, steps: int) -> SignalGuard:
        guards, folder = place.materials.recipe.guards, place.node_dir(node)
        return SignalGuard(
            stop=guards.no_signal == "stop",
            patience=min(guards.patience, steps),
            pool=0 if labels is None else len(labels),
            looked_at=lambda: 0 if labels is None else len(labels.looked_at),
            earlier=lambda: list(read_jsonl(folder.metrics)),
        )

    def look(self, step: int, groups: int, metrics: Metrics) -> None:
        """Raises TrainingStoppedError at the end of the patience if nothing was informative until then."""
        if not self.stop or step + 1 != self.patience or metrics["informative"] > 0.0:
            return
        if any(row.get("informative", 0.0) > 0.0 for row in self.earlier()):
            return
        said = "wrong" if metrics["reward"] == 0.0 else "right" if metrics["reward"] == 1.0 else "graded alike"
        raise TrainingStoppedError(
            f"no group is informative: in each of the {groups * (step + 1)} groups so far all completions were {said}, so sparse "
            f"reward gives no gradient; {self.looked_at()} labels were looked at and bought nothing, and the other "
            f"{self.pool - self.looked_at()} of this stage's {self.pool} labels would be wasted too (set "
            "guards.no_signal=continue to go on all the same)"
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


def clear(folder: NodeDir) -> None:
    shutil.rmtree(folder.path, ignore_errors=True)
