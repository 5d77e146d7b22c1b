"""Figures of pairs of tokenizers."""

from __future__ import annotations

import pytest

from headwater.models.pair_figures import measure
from headwater.models.token_bytes import TokenBytes, TokenPair
from tests.support.texts import texts
from tests.support.tokenizer_kinds import token_bytes
from tools.pretrain.pocket import make_tokenizer


def test_figures_by_hand() -> None:
    pair = TokenPair(TokenBytes.of(make_tokenizer(), (3,)), TokenBytes.of(make_tokenizer("pairs"), (3,)))
    figures = measure(pair, ["1234", "1+2"])
    # 12 34 end: two spans of two tokens, one single; 1 + 2 end: four single.
    assert (figures.aligned, figures.not_reversible, figures.unread) == (1.0, 0, 0)
    assert figures.single == pytest.approx(5 / 7) and figures.span_tokens == pytest.approx(9 / 7)
    assert figures.shared == 1.0
    assert "100.0% of the tokens of 2 texts are aligned" in figures.sentence()


def test_texts_not_given_back_are_counted() -> None:
    pair = TokenPair(token_bytes("bytes"), token_bytes("lossy"))
    figures = measure(pair, ["plain text", "With Capitals"])
    assert figures.not_reversible == 1 and 0.3 < figures.aligned < 1.0
    assert measure(TokenPair(token_bytes("lossy"), token_bytes("bytes")), ["With Capitals"]).unread == 1


@pytest.mark.parametrize("pair", [("desk", "sentencepiece"), ("sentencepiece", "wide bytes")], ids="-".join)
def test_reversible_tokenizers_align_every_text(pair: tuple[str, str]) -> None:
    figures = measure(TokenPair(*map(token_bytes, pair)), texts(200))
    assert (figures.aligned, figures.not_reversible, figures.unread) == (1.0, 0, 0)
    assert 0.05 < figures.shared < 1.0 < figures.span_tokens
