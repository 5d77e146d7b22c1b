"""Sample a teacher on a stage's prompts and cache its rollouts with their distributions."""

from __future__ import annotations

import time
from dataclasses import replace

from headwater.runs.node_context import NodeContext, after_step
from headwater.runs.plan import Node
from headwater.sampling.base import requests_for
from headwater.storage import fault_points
from headwater.storage.ledger import record
from headwater.storage.run_dir import atomic_folder
from headwater.teachers.cache import refuse_huge_cache, write_cache
from headwater.training.evaluate import refuse_nan


def cache_node(node: Node, context: NodeContext) -> None:
    """Fill the teacher cache that one or several stages read."""
    assert node.settings is not None and node.pool is not None
    started, settings, folder = time.perf_counter(), node.settings, context.node_dir(node)
    folder.cut_back_to(-1)
    teacher = context.frozen(node.start, settings)
    prompter = context.prompter(teacher)
    names = context.inputs.prompts(node.pool, settings)
    prompts = [(name, prompter.ids(context.inputs.problems[name])) for name in names]
    progress, top_k = context.progress, settings.dense.top_k
    progress.start(0, 2 * len(prompts) * settings.group_size, "rollouts")  # sampled, then scored
    requests = requests_for(prompts, settings.group_size, 0, node.seed, node.stage)
    rollouts = context.sampler(teacher).sample(
        requests, settings.sampling, lambda finished: progress.advance_or_stop(len(finished))
    )
    fault_points.failpoint("cache.sampled")
    with after_step(0):
        refuse_nan(rollouts)
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    refuse_huge_cache(teacher, tokens, top_k)
    with atomic_folder(folder.cache) as aside, after_step(0):
        microbatch_tokens = context.inputs.recipe.compute.microbatch_tokens
        write_cache(aside, teacher, rollouts, top_k, microbatch_tokens, progress.advance_or_stop)
    fault_points.failpoint("cache.saved")
    tokens_read = tokens + sum(len(rollout.prompt_ids) for rollout in rollouts)
    record(
        folder.ledger,
        replace(
            context.spend(node),
            tokens_sampled=tokens,
            tokens_teacher_scored=tokens,
            flops=2 * teacher.shape.flops(tokens_read, tokens_read / len(rollouts)),
            seconds=time.perf_counter() - started,
        ),
    )
