"""Groups of tokens that divide two vocabularies."""

from __future__ import annotations

import pytest

from headwater.models.token_bytes import END, TokenBytes, TokenPair
from headwater.models.token_groups import VocabularyGroups, first_pieces
from tests.support.tokenizer_kinds import token_bytes
from tools.pretrain.pocket import make_tokenizer


@pytest.fixture(scope="module")
def digits() -> TokenPair:
    characters, pairs = make_tokenizer(), make_tokenizer("pairs")
    return TokenPair(TokenBytes.of(characters, (3,)), TokenBytes.of(pairs, (3,)))


def test_pairs_of_digits_are_in_group_of_first_digit(digits: TokenPair) -> None:
    groups, vocabulary = VocabularyGroups(digits, "prefix"), digits.teacher.tokenizer.get_vocab()
    teacher, student = groups.of_teacher(len(vocabulary)), groups.of_student(30)
    assert teacher[vocabulary["62"]] == teacher[vocabulary["6"]] == student[vocabulary["6"]] != teacher[vocabulary["2"]]
    assert teacher[3] == student[3] == groups.shared[END]
    assert len(set(student)) == 30 and max(teacher) < groups.count


def test_shared_groups_put_pairs_together(digits: TokenPair) -> None:
    groups, vocabulary = VocabularyGroups(digits, "shared"), digits.teacher.tokenizer.get_vocab()
    teacher = groups.of_teacher(len(vocabulary) + 2)  # two columns that no token has
    assert {teacher[vocabulary[a + b]] for a in "0123456789" for b in "0123456789"} == {groups.count - 1}
    assert teacher[-2:] == [groups.count - 1] * 2


def test_continuations_are_tokens_with_begun_bytes(digits: TokenPair) -> None:
    groups, vocabulary = VocabularyGroups(digits, "prefix"), digits.teacher.tokenizer.get_vocab()
    ids, of_rest = groups.continuations(b"6")
    assert sorted(ids) == sorted(vocabulary["6" + digit] for digit in "0123456789")
    assert dict(zip(ids, of_rest, strict=True)) == {
        vocabulary["6" + digit]: groups.shared[digit.encode()] for digit in "0123456789"
    }
    assert groups.continuations(b"+") == ([], [])


@pytest.mark.parametrize(
    "pair", [("bytes", "sentencepiece"), ("desk", "wide bytes"), ("sentencepiece", "added")], ids="-".join
)
def test_groups_begin_with_their_common_token(pair: tuple[str, str]) -> None:
    both = TokenPair(*map(token_bytes, pair))
    groups = VocabularyGroups(both, "prefix")
    names = {group: piece for piece, group in groups.shared.items()}
    for tokens, of_ids in ((both.student, groups.of_student), (both.teacher, groups.of_teacher)):
        width = max(tokens.table) + 1
        made = of_ids(width)
        assert len(made) == width
        texts = {id_: piece for id_, piece in tokens.table.items() if not piece.startswith(b"\xff")}
        grouped = {id_: piece for id_, piece in texts.items() if made[id_] < groups.count - 1}
        assert len(grouped) > 0.95 * len(texts)
        assert all(piece.startswith(names[made[id_]]) for id_, piece in grouped.items())


def test_first_piece_of_partial_character_is_longest_token() -> None:
    tokens = token_bytes("bytes")
    assert first_pieces(tokens, [b"\xc3", "é".encode()])[0] == b"\xc3"
