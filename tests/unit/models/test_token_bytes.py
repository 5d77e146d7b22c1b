"""Bytes of tokens, and translation of ids between tokenizers of every kind."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest

from headwater.models.token_bytes import END, MARK, TokenBytes, same_tokens
from tests.support.texts import texts
from tests.support.tokenizer_kinds import REVERSIBLE, byte_level, token_bytes


def ids_of(tokens: TokenBytes, text: str) -> tuple[int, ...]:
    return tuple(tokens.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", REVERSIBLE)
def test_pieces_give_text_back(kind: str) -> None:
    tokens = token_bytes(kind)
    for text in texts(200):
        assert b"".join(tokens.pieces(ids_of(tokens, text))).decode() == text


@pytest.mark.parametrize("pair", permutations(REVERSIBLE, 2), ids="-".join)
def test_translated_ids_are_those_of_text(pair: tuple[str, str]) -> None:
    student, teacher = map(token_bytes, pair)
    for text in texts(1000)[:: 1 if pair == ("bytes", "sentencepiece") else 20]:
        own = (*ids_of(student, text), student.end_id)
        pieces = student.pieces(own)
        ids, spans = teacher.translate(pieces)
        assert ids == (*ids_of(teacher, text), teacher.end_id)
        other = teacher.pieces(ids)
        assert (spans.first_ends[-1], spans.second_ends[-1]) == (len(own), len(ids))
        for left, right in spans.pairs():
            assert b"".join(pieces[i] for i in left) == b"".join(other[j] for j in right)
        assert all(a < b for a, b in pairwise((0, *spans.first_ends)))


def test_partial_characters_have_their_bytes() -> None:
    tokens = token_bytes("bytes")
    ids = ids_of(tokens, "👩")
    pieces = tokens.pieces(ids)
    assert len(pieces) > 1 and b"".join(pieces) == "👩".encode()
    assert any(piece.decode("utf-8", "ignore").encode() != piece for piece in pieces)


def test_text_cut_within_character_is_read_up_to_it() -> None:
    student, teacher = token_bytes("bytes"), token_bytes("sentencepiece")
    whole, ids = ids_of(student, "x = 1 "), ids_of(student, "👩")
    translated, spans = teacher.translate(student.pieces((*whole, *ids[:1])))
    assert translated == ids_of(teacher, "x = 1 ")
    assert spans.first_read == len(whole)


def test_end_is_translated_by_role_and_text_spelling_it_is_not() -> None:
    student, teacher = token_bytes("characters"), token_bytes("bytes")
    own = (*ids_of(student, "17+45"), student.end_id)
    ids, spans = teacher.translate(student.pieces(own))
    assert ids[-1] == teacher.end_id and student.pieces(own)[-1] == END == teacher.pieces(ids)[-1]
    assert spans.first_read == len(own)
    # `</s>` as text is read by the other tokenizer as its end: not the same, so it is not compared.
    spelt = ids_of(token_bytes("desk"), "2</s>3")
    ids, spans = teacher.translate(token_bytes("desk").pieces(spelt))
    assert b"".join(token_bytes("desk").pieces(spelt)[: spans.first_read]) in (b"2", b"")


def test_every_stop_id_counts_as_end() -> None:
    tokenizer = byte_level()
    tokens = TokenBytes(tokenizer, (2, 3), 2)
    assert tokens.pieces((10, 3))[-1] == END
    assert tokens.pieces((3, 10))[0] == MARK + b"<|user|>"


def test_special_token_without_counterpart_ends_text() -> None:
    student, teacher = token_bytes("bytes"), token_bytes("desk")
    own = (*ids_of(student, "a b"), 1, *ids_of(student, "c"))  # <s>
    _, spans = teacher.translate(student.pieces(own))
    assert spans.first_read == len(ids_of(student, "a b"))


def test_lossy_texts_are_not_compared() -> None:
    student, teacher = token_bytes("bytes"), token_bytes("lossy")
    own = ids_of(student, "ok FINE")
    _, spans = teacher.translate(student.pieces(own))
    assert b"".join(student.pieces(own)[: spans.first_read]) in (b"ok", b"ok ")
    assert spans.first_read < len(own)


def test_byte_pieces_yield_to_plain_tokens() -> None:
    """SentencePiece has `a` twice: as a token and as the byte <0x61>."""
    tokens = token_bytes("sentencepiece")
    assert tokens.table[tokens.ids[b"x"]] == b"x"
    assert tokens.tokenizer.convert_ids_to_tokens(tokens.ids[b"x"]) == "x"


def test_same_tokens_needs_equal_tables_and_merges() -> None:
    bytes_, again = token_bytes("bytes"), byte_level()
    assert same_tokens(bytes_, TokenBytes(again, bytes_.stop_ids, bytes_.end_id))
    assert not same_tokens(bytes_, token_bytes("wide bytes"))
