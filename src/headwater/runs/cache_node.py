"""Sample a teacher on a stage's prompts and cache its rollouts with their distributions."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from headwater.runs.node import CacheNode
from headwater.runs.node_context import NodeContext, after_step
from headwater.sampling.base import Request, requests_for
from headwater.storage import fault_points
from headwater.storage.files import atomic_folder, keep_rows
from headwater.storage.ledger import record
from headwater.teachers.cache import read_rollouts, refuse_huge_cache, write_distributions, write_rollouts
from headwater.teachers.translated import Supervisor, TranslatedTeacher
from headwater.training.evaluate import refuse_nan
from headwater.training.rollouts import epoch_order
from headwater.types import Rollout


def cache_node(node: CacheNode, context: NodeContext) -> dict[str, Any]:
    """Fill the teacher cache that one or several stages read, with as many rollouts as they read.

    Rollouts of an earlier, finished cache are kept, for instance where an arm that was added later reads more of them, or reads
    distributions that were removed after their last use. Returns, for DONE, `scored`: the number of rollouts with distributions.
    """
    started, settings, folder = time.perf_counter(), node.settings, context.node_dir(node)
    kept = kept_rollouts(node, context)
    teacher = context.teacher(node.start, node)
    requests = missing_requests(node, context, teacher, kept)
    # A cache that is repaired after its last use needs its rollouts only, which the report reads.
    score = context.inputs.recipe.compute.keep_checkpoints or context.plan.cached_rollouts(node, context.out) > 0
    scores = len(kept) + len(requests) if score else 0
    if kept:
        context.progress.say(f"{folder.name}: {len(kept)} rollouts are kept, {len(requests)} sampled, {scores} scored")
    context.progress.start(0, len(requests) + scores, "rollouts")
    sampled: list[Rollout] = []
    if requests:
        sampled = context.sampler(teacher).sample(
            requests, settings.sampling, lambda finished: context.progress.advance_or_stop(len(finished))
        )
    fault_points.failpoint("cache.sampled")
    if isinstance(teacher, TranslatedTeacher) and teacher.pair is not None:
        cut = sum(not teacher.pair.is_whole(rollout) for rollout in sampled)
        if cut:
            context.progress.say(
                f"{folder.name}: {cut} of {len(sampled)} rollouts are cut before text that the student's tokenizer does not round-trip"
            )
    with after_step(0):
        refuse_nan(sampled)
    rollouts, top_k = [*kept, *sampled], settings.dense.top_k
    scored = rollouts if score else []
    tokens_scored = sum(len(rollout.completion_ids) for rollout in scored)
    refuse_huge_cache(teacher, tokens_scored, top_k)
    with atomic_folder(folder.cache) as aside, after_step(0):
        write_rollouts(aside, rollouts)
        if score:
            microbatch_tokens = context.inputs.recipe.compute.microbatch_tokens
            write_distributions(aside, teacher, rollouts, top_k, microbatch_tokens, context.progress.advance_or_stop)
        folder.done.unlink(missing_ok=True)  # the cache that it describes is about to be replaced
    fault_points.failpoint("cache.saved")
    keep_rows(folder.ledger, lambda row: True)  # writes the file anew before it grows: another run may share it
    passes = [*sampled, *scored]
    lengths = [rollout.length for rollout in passes]
    record(
        folder.ledger,
        replace(
            context.spend(node),
            labels=tuple(sorted({rollout.problem_id for rollout in passes} & context.labels_shown(node))),
            tokens_sampled=sum(len(rollout.completion_ids) for rollout in sampled),
            tokens_teacher_scored=tokens_scored,
            flops=teacher.shape.flops(sum(lengths), sum(lengths) / max(1, len(lengths))),
            seconds=time.perf_counter() - started,
        ),
    )
    return {"scored": len(scored)}


def kept_rollouts(node: CacheNode, context: NodeContext) -> list[Rollout]:
    """The rollouts of the finished and intact cache that the run directory holds; without one, delete what is left of it."""
    folder = context.out.node(context.plan.names[node])
    done = folder.is_done(context.plan.fingerprints[node]) and folder.damage(f"{folder.cache.name}/") is None
    if context.ranks.broadcast(done):
        return read_rollouts(folder.cache)
    context.node_dir(node).cut_back_to(-1)
    return []


def missing_requests(node: CacheNode, context: NodeContext, teacher: Supervisor, kept: list[Rollout]) -> list[Request]:
    """Requests for the rollouts that the plan's stages read and the cache does not hold, in the order of the prompts."""
    prompter, inputs = context.prompter(node, teacher), context.inputs
    prompts = [(name, prompter.ids(inputs.problems[name])) for name in inputs.prompts(node.pool, node.settings)]
    requests = requests_for(prompts, node.settings.group_size, node.seed, node.stage)
    read = sorted(epoch_order(len(requests), node.seed, 0)[: context.plan.cached_rollouts(node)])
    known = {rollout.key for rollout in kept}
    return [request for request in map(requests.__getitem__, read) if (request.problem_id, request.sample) not in known]
