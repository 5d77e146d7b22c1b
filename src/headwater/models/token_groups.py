"""Partition two vocabularies into common groups of tokens, so that distributions over both can be compared."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from headwater.models.token_bytes import MARK, TokenBytes, TokenPair, valid_prefix

ROUNDS = 16
"""Times that a piece is tokenized again, by each tokenizer in turn, before it counts as having no common prefix."""


@dataclass(frozen=True)
class VocabularyGroups:
    """A group for each token that both vocabularies hold, and a last one for all that fit no other.

    by  `shared`: a token that only one vocabulary holds is in the last group. `prefix`: it is in the group of the token with which
        its text begins in the other tokenizer (and so on, until both hold that token)

    Example: characters against pairs of digits. By `prefix` the pair `62` is in the group of `6`; by `shared`, in the last.
    """

    pair: TokenPair
    by: Literal["shared", "prefix"]
    _continuations: dict[bytes, tuple[list[int], list[int]]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def shared(self) -> dict[bytes, int]:
        """Bytes of the common tokens -> group, in the order of the student's ids."""
        student, teacher = self.pair.student.ids, self.pair.teacher.ids
        common = sorted((student[piece], piece) for piece in student.keys() & teacher.keys() if piece)
        return {piece: group for group, (_, piece) in enumerate(common)}

    @property
    def count(self) -> int:
        return len(self.shared) + 1

    def of_student(self, width: int) -> list[int]:
        """Group of each id of the student's output layer of this many columns."""
        return self._of_ids(self.pair.student, self.pair.teacher, width)

    def of_teacher(self, width: int) -> list[int]:
        """Group of each id of the teacher's output layer of this many columns."""
        return self._of_ids(self.pair.teacher, self.pair.student, width)

    def continuations(self, begun: bytes) -> tuple[list[int], list[int]]:
        """The teacher's tokens that begin with some bytes and go on: their ids, and the groups of what follows these bytes.

        Example: after `6` of a pair of digits: the ids of `60` … `69`, and the groups of `0` … `9`.
        """
        if begun not in self._continuations:
            pieces, ids = self._sorted_pieces
            start = stop = bisect_left(pieces, begun)
            while stop < len(pieces) and pieces[stop].startswith(begun):
                stop += 1
            rests = {pieces[place][len(begun) :]: ids[place] for place in range(start, stop) if pieces[place] != begun}
            groups = self._groups(rests, self.pair.student, self.pair.teacher)
            self._continuations[begun] = list(rests.values()), [groups[rest] for rest in rests]
        return self._continuations[begun]

    @cached_property
    def _sorted_pieces(self) -> tuple[list[bytes], list[int]]:
        known = sorted((piece, id_) for piece, id_ in self.pair.teacher.ids.items() if not piece.startswith(MARK))
        return [piece for piece, _ in known], [id_ for _, id_ in known]

    def _of_ids(self, own: TokenBytes, other: TokenBytes, width: int) -> list[int]:
        groups = self._groups(own.table.values(), other, own)
        last = self.count - 1
        return [groups[own.table[id_]] if id_ in own.table else last for id_ in range(width)]

    def _groups(self, pieces: Iterable[bytes], first: TokenBytes, second: TokenBytes) -> dict[bytes, int]:
        """Group of each piece of text, divided by the first tokenizer, its first token by the second, and so on."""
        last = self.count - 1
        heads = {piece: piece for piece in pieces}
        for _ in range(ROUNDS if self.by == "prefix" else 0):
            open_ = [
                piece for piece, head in heads.items() if head and head not in self.shared and not head.startswith(MARK)
            ]
            if not open_:
                break
            heads |= zip(open_, first_pieces(first, [heads[piece] for piece in open_]), strict=True)
            first, second = second, first
        return {piece: self.shared.get(head, last) for piece, head in heads.items()}


def first_pieces(tokens: TokenBytes, texts: Sequence[bytes]) -> list[bytes]:
    """The first token of each text, as bytes; of one that is no UTF-8, the longest token that it begins with; else nothing."""
    decodable = {text: prefix for text in texts if (prefix := valid_prefix(text)).encode() == text}
    batch = list(decodable.values())
    ids = tokens.tokenizer(batch, add_special_tokens=False)["input_ids"] if batch else []
    first = {text: tokens.pieces(own)[:1] for text, own in zip(decodable, ids, strict=True)}
    return [
        next((piece for piece in first.get(text, []) if text.startswith(piece)), b"") or _longest(tokens, text)
        for text in texts
    ]


def _longest(tokens: TokenBytes, text: bytes) -> bytes:
    return next((text[:end] for end in range(len(text), 0, -1) if text[:end] in tokens.ids), b"")
