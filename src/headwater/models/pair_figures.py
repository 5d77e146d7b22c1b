"""Measure how well two tokenizers align on given texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwater.models.token_bytes import TokenPair
from headwater.models.token_groups import VocabularyGroups


@dataclass(frozen=True)
class PairFigures:
    """Figures of a pair of tokenizers over some texts, each continued by an end.

    texts           number of texts
    aligned         share of the student's tokens that lie in a common span
    single          share of the common spans that are one token on both sides
    span_tokens     mean number of the student's tokens in a common span
    shared          share of the student's vocabulary that the teacher has too
    not_reversible  texts that do not round-trip through the teacher's tokenizer
    unread          texts that do not round-trip through the student's own
    """

    texts: int
    aligned: float
    single: float
    span_tokens: float
    shared: float
    not_reversible: int
    unread: int

    def sentence(self) -> str:
        return (
            f"{self.aligned:.1%} of the tokens of {self.texts} texts are aligned, in spans of {self.span_tokens:.2f} tokens of the "
            f"student ({self.single:.1%} of the spans are one token on both sides); {self.shared:.1%} of the student's vocabulary is "
            f"the teacher's too; {self.not_reversible} texts do not round-trip through the teacher's tokenizer, {self.unread} through "
            "the student's own"
        )


def measure(pair: TokenPair, texts: Sequence[str]) -> PairFigures:
    """Align texts as a run would, from the student's ids.

    Example: characters against pairs of digits on `1234`: all aligned, spans of 2 and, for the end, 1 token.
    """
    tokens = aligned = spans_count = single = lost = unread = 0
    for text in texts:
        ids = (*pair.student.ids_of(text), pair.student.end_id)
        pieces = pair.student.pieces(ids)
        _, spans = pair.teacher.translate(pieces)
        unread += b"".join(pieces[:-1]) != text.encode()
        lost += spans.first_read < len(ids)
        tokens, aligned = tokens + len(ids), aligned + spans.first_read
        pairs = spans.pairs()
        spans_count, single = spans_count + len(pairs), single + sum(len(a) == len(b) == 1 for a, b in pairs)
    return PairFigures(
        len(texts),
        aligned / max(1, tokens),
        single / max(1, spans_count),
        aligned / max(1, spans_count),
        len(VocabularyGroups(pair, "shared").shared) / len(pair.student.table),
        lost,
        unread,
    )
