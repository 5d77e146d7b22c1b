"""Small tokenizers of every kind that a pair of models may have: byte-level BPE, SentencePiece with byte fallback, characters."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import headwater
from headwater.models.token_bytes import TokenBytes
from tests.support.texts import texts
from tools.pretrain.pocket import make_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]


def byte_level(size: int = 400, split: bool = True, seed_texts: int = 200) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seed_texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def sentencepiece(size: int = 500) -> PreTrainedTokenizerFast:
    """As Llama 2's: ▁ for a space, also before the text, and bytes for unknown characters."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIAL, *pieces], limit_alphabet=60, show_progress=False
    )
    trained.train_from_iterator(texts(200), trainer)
    # The trainer declares the byte pieces special; a real SentencePiece file has them as plain tokens.
    state = json.loads(trained.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def lossy() -> PreTrainedTokenizerFast:
    """Byte-level with NFKC and lower case: most texts are not given back."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def with_added_tokens() -> PreTrainedTokenizerFast:
    tokenizer = byte_level(size=350)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def desk() -> Any:
    return AutoTokenizer.from_pretrained(Path(headwater.__file__).parent / "desk/student")


@cache
def token_bytes(kind: str) -> TokenBytes:
    tokenizers = {
        "bytes": byte_level,
        "wide bytes": lambda: byte_level(size=600, split=False),
        "sentencepiece": sentencepiece,
        "added": with_added_tokens,
        "lossy": lossy,
        "desk": desk,
        "characters": make_tokenizer,
    }
    tokenizer = tokenizers[kind]()
    return TokenBytes(tokenizer, (tokenizer.eos_token_id,), tokenizer.eos_token_id)


REVERSIBLE = ("bytes", "wide bytes", "sentencepiece", "added", "desk")
