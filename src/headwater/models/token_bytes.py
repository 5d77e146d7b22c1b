"""The bytes that each token id of a tokenizer stands for, and the translation of ids from one tokenizer to another by bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from headwater.errors import UserError
from headwater.losses.alignment import Spans, align
from headwater.models.prompts import special_tokens, turn_end
from headwater.types import Rollout

MARK = b"\xff"
"""Begins the bytes of a special token: no UTF-8 text holds it, so special tokens equal one another only, never a text."""
END = MARK + b"end of turn"
"""The end of a completion, whatever a tokenizer calls it."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + index): byte for index, byte in enumerate(_OTHERS)}
"""Character -> byte of byte-level BPE (GPT-2): printable Latin-1 characters are themselves, the others follow from U+0100 on."""


@dataclass(frozen=True)
class TokenBytes:
    """A tokenizer with the bytes of its tokens.

    tokenizer  of transformers, or any that is called with a text and gives `input_ids`
    stop_ids   ids that end a completion
    end_id     the one among them that ends a turn: what another tokenizer's end is translated to
    """

    tokenizer: Any
    stop_ids: tuple[int, ...]
    end_id: int

    @staticmethod
    def of(tokenizer: Any, stop_ids: tuple[int, ...]) -> TokenBytes:
        """The end of a turn is what the chat template writes after one; else the tokenizer's EOS; else the first stop id."""
        if not stop_ids:
            raise UserError(f"{getattr(tokenizer, 'name_or_path', '') or 'a tokenizer'}: no id ends a completion")
        ends = (turn_end(tokenizer), getattr(tokenizer, "eos_token_id", None), stop_ids[0])
        return TokenBytes(tokenizer, stop_ids, next(id_ for id_ in ends if id_ in stop_ids))

    @cached_property
    def table(self) -> Mapping[int, bytes]:
        """Id -> bytes of the token: part of a character where the token holds no more, `MARK` and the name for a special token."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special, kind = special_tokens(self.tokenizer), _kind(self.tokenizer)
        table: dict[int, bytes] = {}
        for name, id_ in self.tokenizer.get_vocab().items():
            if id_ in special:
                table[id_] = MARK + _piece_bytes(name, "text")
            elif id_ in added:
                table[id_] = added[id_].content.encode()
            else:
                table[id_] = _piece_bytes(name, kind)
        return table | {self.end_id: END}

    def ids_of(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    @cached_property
    def starts_with_space(self) -> bool:
        """Whether the tokenizer writes a space before a text that has none (SentencePiece), which is no part of the text."""
        return b"".join(self.table.get(id_, b"") for id_ in self.ids_of("a")) == b" a"

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Bytes of each id of a completion; a last id that ends it is `END`. An id that no token has gives `MARK` and its number.

        Example: a byte-level tokenizer that has no token for `é` gives `[b"\\xc3", b"\\xa9"]`.
        """
        pieces = [self.table.get(id_, MARK + str(id_).encode()) for id_ in ids]
        if ids and ids[-1] in self.stop_ids:
            pieces[-1] = END
        if self.starts_with_space and pieces and pieces[0].startswith(b" "):
            pieces[0] = pieces[0][1:]
        return pieces

    @cached_property
    def ids(self) -> Mapping[bytes, int]:
        """Bytes -> id. Of several tokens with equal bytes the first, and a byte piece such as `<0x61>` only if there is no other."""
        names = {id_: name for name, id_ in self.tokenizer.get_vocab().items()}
        ids: dict[bytes, int] = {}
        for id_ in sorted(self.table, key=lambda id_: (_BYTE.fullmatch(str(names.get(id_))) is not None, id_)):
            ids.setdefault(self.table[id_], id_)
        return ids

    def encode(self, pieces: Sequence[bytes]) -> list[int]:
        """Ids of a text that is given in pieces of another tokenizer.

        Special tokens become those of equal name, and the other's end this one's. It ends before the first special token that this
        tokenizer lacks, and before the first byte that is no UTF-8.
        """
        ids: list[int] = []
        text = bytearray()
        for piece in pieces:
            if not piece.startswith(MARK):
                text += piece
                continue
            whole = valid_prefix(bytes(text))
            ids += self.ids_of(whole)
            if len(whole.encode()) < len(text) or piece not in self.ids:
                return ids
            ids.append(self.ids[piece])
            text.clear()
        return ids + self.ids_of(valid_prefix(bytes(text)))

    def translate(self, pieces: Sequence[bytes]) -> tuple[tuple[int, ...], Spans]:
        """Ids of another tokenizer's text in this one, and the spans of (the other, this one).

        The spans end before the first byte that this tokenizer does not give back.
        """
        ids = tuple(self.encode(pieces))
        return ids, align(pieces, self.pieces(ids))


@dataclass(frozen=True)
class TokenPair:
    """Tokenizers of a student and of its teacher."""

    student: TokenBytes
    teacher: TokenBytes

    def to_teacher(self, rollout: Rollout) -> tuple[tuple[int, ...], Spans]:
        """A completion in the teacher's ids, and the common spans of (student, teacher). At least one id, also where none agrees."""
        pieces = self.student.pieces(rollout.completion_ids)
        if rollout.teacher_ids:
            return rollout.teacher_ids, align(pieces, self.teacher.pieces(rollout.teacher_ids))
        ids, spans = self.teacher.translate(pieces)
        return ids or (self.teacher.end_id,), spans

    def to_student(self, rollout: Rollout, prompt_ids: tuple[int, ...]) -> Rollout:
        """A rollout of the teacher in the student's ids, up to the first byte that they do not give back.

        The log-prob of a span is divided equally among its tokens. Where nothing is given back, an end alone is left, which is
        compared with nothing.
        """
        ids, spans = self.student.translate(self.teacher.pieces(rollout.completion_ids))
        read = spans.first_read
        logp: list[float] = []
        for own, other in spans.pairs():
            logp += [sum(rollout.sampler_logp[i] for i in own) / len(other)] * len(other)
        return replace(
            rollout,
            prompt_ids=prompt_ids,
            completion_ids=ids[: len(logp)] if read else (self.student.end_id,),
            sampler_logp=tuple(logp) if read else (0.0,),
            finish=rollout.finish if read == len(rollout.completion_ids) else "length",
            teacher_ids=rollout.completion_ids,
        )

    def is_whole(self, rollout: Rollout) -> bool:
        """Whether a rollout of the teacher has all of its text in the student's ids."""
        written, read = self.teacher.pieces(rollout.teacher_ids), self.student.pieces(rollout.completion_ids)
        return b"".join(written) == b"".join(read)


def same_tokens(student: TokenBytes, teacher: TokenBytes) -> bool:
    """Whether every id stands for the same bytes in both, and the two divide texts alike: same table and same merges."""
    return student.table == teacher.table and _backend(student.tokenizer) == _backend(teacher.tokenizer)


def _backend(tokenizer: Any) -> str | int:
    """All that decides how a text is divided; of a tokenizer without a description, its identity."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return id(tokenizer)
    parts = json.loads(backend.to_str())
    return json.dumps([parts.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")])


def valid_prefix(text: bytes) -> str:
    """The longest prefix that is UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start].decode()


def _kind(tokenizer: Any) -> str:
    """How the names of tokens spell their bytes: `bytes` (GPT-2's alphabet), `sentencepiece` (▁ and <0x0A>), or `text`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        steps = _steps(json.loads(backend.to_str()).get("decoder"))
    else:
        names = [name for name in tokenizer.get_vocab() if isinstance(name, str)]
        steps = {"Metaspace"} if any("▁" in name for name in names) else {"ByteLevel"} if "Ġ" in names else set()
    if "ByteLevel" in steps:
        return "bytes"
    return "sentencepiece" if steps & {"Metaspace", "ByteFallback", "Replace"} else "text"


def _steps(decoder: Any) -> set[str]:
    """Types of a decoder's steps."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*(_steps(step) for step in decoder.get("decoders", [])))


def _piece_bytes(name: Any, kind: str) -> bytes:
    if isinstance(name, bytes):  # tiktoken
        return name
    if kind == "bytes" and all(character in _ALPHABET for character in name):
        return bytes(_ALPHABET[character] for character in name)
    if kind == "sentencepiece":
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return name.replace("▁", " ").encode()
    return str(name).encode()
