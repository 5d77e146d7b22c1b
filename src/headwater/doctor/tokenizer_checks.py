"""Doctor checks of pairs of models with different tokenizers; no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator

from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, error, note, warning
from headwater.doctor.model_checks import compared_texts
from headwater.models.pair_figures import PairFigures, measure
from headwater.models.tokenizer import PROBES
from headwater.runs.translated_teacher import token_pair

MIN_SINGLE = 0.9
"""Least share of spans of one token on both sides for comparing shared tokens alone."""
MIN_ALIGNED, MIN_SHARED, MAX_LOST = 0.9, 0.05, 0.1
"""Least shares of aligned tokens and of common vocabulary, and largest share of texts that do not round-trip, of a useful pair."""


def far_apart(figures: PairFigures) -> str:
    """From which figures on a pair is useful, where these are worse; else empty."""
    lost = figures.not_reversible + figures.unread
    if figures.aligned >= MIN_ALIGNED and figures.shared >= MIN_SHARED and lost <= MAX_LOST * figures.texts:
        return ""
    return (
        f"recommended: at least {MIN_ALIGNED:.0%} aligned tokens and {MIN_SHARED:.0%} common vocabulary, with at most "
        f"{MAX_LOST:.0%} of the texts not round-tripping"
    )


def alignment(context: DoctorContext) -> Iterator[Finding]:
    """How well the tokenizers of a student and a teacher fit each other, where the recipe aligns them."""
    texts = compared_texts(context) or list(PROBES)
    for (learner, teacher), stages in context.aligned_pairs.items():
        fields, pair = f"models.{learner} and models.{teacher}", token_pair(context.inputs, learner, teacher)
        where = " and ".join(f"stages.{stage}.dense.tokenizers" for stage in dict.fromkeys(stages))
        if pair is None:
            yield note(
                "tokenizers-equal",
                f"{fields}: have the same tokenizer; {where} changes nothing",
                "leave it out",
            )
            continue
        figures = measure(pair, texts)
        evidence = f"{fields}: {figures.sentence()}"
        if not figures.aligned:
            yield error(
                "tokenizers-unalignable",
                evidence,
                "choose another teacher: no text of this data can be compared",
            )
        elif limits := far_apart(figures):
            yield warning(
                "tokenizers-far-apart",
                f"{evidence}; {limits}",
                "choose a teacher whose tokenizer round-trips these texts, such as byte-level BPE",
            )
        else:
            yield note("tokenizers-aligned", evidence, "nothing")
        shared = any(context.recipe.stages.require(stage).dense.tokenizers == "shared" for stage in stages)
        if shared and figures.single < MIN_SINGLE:
            yield warning(
                "shared-tokens-mislead",
                f"{fields}: only {figures.single:.1%} of the spans are one token on both sides, and {where} is shared: where the "
                "teacher writes a token that the student lacks, the student learns to avoid that text",
                "set it to prefix",
            )
