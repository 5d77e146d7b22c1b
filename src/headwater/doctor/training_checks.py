"""Doctor checks of settings that train badly without an error: learning rates, lengths, and what is measured and stored."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

from headwater.config.learning_rates import RATES, judge_rate, signal_of, suggested_rate
from headwater.doctor.context import DoctorContext, Sample
from headwater.doctor.finding import Finding, error, note, warning
from headwater.runs.node import base_of
from headwater.sampling.base import requests_for
from headwater.types import Rollout

UNTRAINED = 0.9
"""Share of the entropy of a uniform choice from the vocabulary above which a model's samples show no pretraining."""
MAX_TRUNCATED = 0.5
LENGTH_SECONDS = 30.0
"""Longest time that `headwater doctor` samples one model for the lengths of its completions."""
SMALL_TOP_K, LARGE_VOCABULARY = 8, 1000


def learning_rates(context: DoctorContext) -> Iterator[Finding]:
    """Learning rates against what is published for a pretrained model of this size. A model without pretraining is not judged."""
    for node, stage in context.training:
        base, adapters = base_of(node.start), node.lora(context.recipe) is not None
        if base not in context.roles:
            continue
        parameters = context.inputs.shape(base).parameters
        signal, rate = signal_of(stage), stage.optim.lr
        verdict, rates = judge_rate(rate, signal, adapters, parameters), RATES[signal, adapters]
        if verdict is None or (verdict == "high" and not shows_pretraining(context, base)):
            continue
        field = f"stages.{context.recipe_stage(node)}.optim.lr"
        trained = "adapters on" if adapters else "all weights of"
        size = f"{parameters / 1e6:,.0f} million parameters, pretrained"
        evidence = f"{field}: {rate:g} trains {trained} models.{base} ({size})"
        suggested = suggested_rate(signal, adapters, parameters)
        small = "; small models take more" if suggested > rates.usual else ""
        remedy = f"set {field}={suggested:g} (published: {rates.source}{small})"
        if verdict == "high":
            other = "" if adapters else f", or train adapters (models.lora) at {RATES[signal, True].usual:g}"
            yield warning(
                "learning-rate-high",
                f"{evidence}; above {rates.high:g} the steps are large enough to destroy what it has learned",
                remedy + other,
            )
        else:
            yield warning(
                "learning-rate-low",
                f"{evidence}; below {rates.low:g} adapters hardly change a model in a few hundred steps",
                remedy,
            )


def settings_without_effect(context: DoctorContext) -> Iterator[Finding]:
    """Settings of the teacher's signal in a stage without a teacher, and of the reward's in a stage without a reward."""
    for name, stage in context.recipe.stages.named.items():
        objectives = {settings.objective for node, settings in context.training if node.stage == name}
        if objectives != {stage.objective}:
            continue  # no arm runs the stage, or some with another objective
        parts = [
            ("dense", stage.dense, "teacher", stage.needs_teacher),
            ("sparse", stage.sparse, "reward", "reward" in stage.spec.signals),
        ]
        for part, values, signal, used in parts:
            changed = values.model_dump(exclude_defaults=True)
            if changed and not used:
                fields = " and ".join(f"stages.{name}.{part}.{field}" for field in changed)
                yield warning(
                    "setting-without-effect",
                    f"{fields}: objective {stage.objective} has no {signal}",
                    "remove the setting, or move it to the stage that it was meant for",
                )


def shows_pretraining(context: DoctorContext, role: str) -> bool:
    """Whether a model's own samples are far from uniform draws of tokens, as those of random weights are; True if not sampled."""
    if role not in context.sampled_roles:
        return True
    logp = [value for rollout in context.sample(role).rollouts for value in rollout.sampler_logp]
    return -sum(logp) / len(logp) < UNTRAINED * math.log(context.inputs.shape(role).vocabulary)


def lengths(context: DoctorContext) -> Iterator[Finding]:
    """Completions against `sampling.max_tokens`: those that are cut are graded as they are, and such a model is no teacher."""
    for role in context.sampled_roles:
        sample = context.sample(role)
        limit = sample.sampling.max_tokens
        if not sample.shortened:
            finished, total, seconds = sample.rollouts, len(sample.rollouts), None
        elif context.exhaustive:
            finished, total, seconds = whole_completions(context, role, sample)
        else:
            continue
        cut = sum(rollout.finish == "length" for rollout in finished)
        running = total - len(finished)
        if cut > MAX_TRUNCATED * total:
            yield warning(
                "truncated",
                f"models.{role}: {cut / total:.0%} of {total} sampled completions run into sampling.max_tokens {limit}",
                "raise sampling.max_tokens, or check that the model knows how to end (its stop ids, its chat template)",
            )
        elif seconds is not None and cut + running > MAX_TRUNCATED * total:
            yield note(
                "lengths-not-judged",
                f"models.{role}: {running} of {total} sampled completions had not ended after {LENGTH_SECONDS:g} s; to sample them up "
                f"to sampling.max_tokens {limit} would take about {seconds:,.0f} s here, so the limit was not judged",
                "run `headwater doctor` on the machine that trains, or look at some completions: headwater eval MODEL --data FILE "
                f"--limit 4 --max-tokens {limit} --out completions.jsonl",
            )


def whole_completions(context: DoctorContext, role: str, sample: Sample) -> tuple[list[Rollout], int, float]:
    """(completions that ended within LENGTH_SECONDS, how many were begun, seconds that all would take at full length).

    They continue the requests of the doctor's sample up to the stage's own limit. The seconds follow from that sample's time.
    """
    prompts = list(dict.fromkeys((rollout.problem_id, rollout.prompt_ids) for rollout in sample.rollouts))
    samples = len(sample.rollouts) // len(prompts)
    requests = requests_for(prompts, samples, context.seeds[0], "doctor", role)
    ended: list[Rollout] = []
    deadline = time.perf_counter() + LENGTH_SECONDS

    def keep(rollouts: Sequence[Rollout]) -> None:
        ended.extend(rollouts)
        if time.perf_counter() > deadline:
            raise TimeoutError

    with contextlib.suppress(TimeoutError):
        context.inputs.sampler(sample.policy).sample(requests, sample.sampling, keep)
    steps = max(len(rollout.completion_ids) for rollout in sample.rollouts)
    return ended, len(requests), sample.seconds / steps * sample.sampling.max_tokens


def sampling_ahead(context: DoctorContext) -> Iterator[Finding]:
    """`compute.overlap` in a plan without a stage that samples from its own policy."""
    if context.recipe.compute.overlap and not any(stage.on_policy for _, stage in context.training):
        yield error(
            "overlap-without-sampling",
            "compute.overlap: no stage of these arms samples from its policy; warm-up reads the teacher's rollouts",
            "set compute.overlap=0",
        )


def overlap_width(context: DoctorContext) -> Iterator[Finding]:
    """Tokens that the overlap of student and teacher is measured on, against the vocabulary."""
    conditions, vocabulary = context.recipe.conditions, context.inputs.shape("student").vocabulary
    measured = conditions.problems and any(learner == "student" for learner, _ in context.distillations)
    if measured and conditions.top_k < SMALL_TOP_K and vocabulary >= LARGE_VOCABULARY:
        yield warning(
            "overlap-top-k-small",
            f"conditions.top_k: the overlap of the {conditions.top_k} most probable of {vocabulary:,} tokens says little about how "
            "close student and teacher are; a value this small is for vocabularies of a few dozen tokens",
            "set conditions.top_k=16",
        )
