"""Fuzz cases of hostile tokenizers and configs: bombs of time and memory, ids of any size, parts that make native code fail."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz_models import POCKET, opened
from fuzz_recipes import WrongError
from headwater.config.prompt import Prompt
from headwater.models.folder import ModelFolder
from headwater.models.prompts import Prompter
from headwater.types import Problem
from malformed_inputs import leaf, mutated

NUMBERS = [
    0, 1, -1, 7, 29, 30, 500, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**12, 10**30, 0.5, -1.0, 1e308,
]  # fmt: skip
WORDS = ["", "1", "a", "é", "+", "12", "<s>", "\x1b[2J", "x" * 700, "z" * 200_000, "\u2581", "##"]
PATTERNS = [
    "", "a*", "(?=1)", r"(x+x+)+y", r"(a|a|aa)+$", r"((1|1)+)+\+", r"(.*)*$", "(" * 300 + "a" + ")" * 300,
    "(((1{99}){99}){99})", "[", r"\s+",
    r"(?<=a{1,9})b", r"\p{L}+|\p{N}", r"(\d)\1+", r"(?:1?){40}1{40}", "[" + "a-z" * 200 + "]",
]  # fmt: skip
TEXTS = [
    "17+45=",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!",
    "1111111111111111111111111111111+",
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx é 数\n",
]
CONFIG_FIELDS = [
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "n_positions", "n_layers", "num_experts", "num_local_experts", "sliding_window", "layer_types",
    "rope_parameters", "rope_scaling", "max_window_layers", "eos_token_id", "pad_token_id", "model_type", "text_config", "num_labels",
    "id2label", "torch_dtype", "dtype", "quantization_config",
]  # fmt: skip


def times(draw: random.Random) -> int:
    return draw.choice([1, 1, 2, 3, 9, 33, 400, 12_000])


def pattern(draw: random.Random) -> dict[str, str]:
    return draw.choice([{"Regex": draw.choice(PATTERNS)}, {"String": draw.choice(WORDS)}])


def normalizer(draw: random.Random) -> Any:
    charsmap = base64.b64encode(draw.randbytes(draw.choice([4, 8, 64, 1024]))).decode()
    part = draw.choice([
        {"type": "Replace", "pattern": pattern(draw), "content": draw.choice(WORDS)},
        {"type": "Prepend", "prepend": draw.choice(WORDS)},
        {"type": "Precompiled", "precompiled_charsmap": draw.choice([charsmap, "/////w==", "BAAAAP////8=", ""])},
        {"type": draw.choice(["NFKC", "NFD", "Lowercase", "StripAccents", "Nmt", "ByteLevel"])},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ])  # fmt: skip
    return sequence(draw, part, "normalizers")


def sequence(draw: random.Random, part: Any, key: str) -> Any:
    roll = draw.random()
    if roll < 0.5:
        return part
    if roll < 0.9:
        most = 1 + 5_000_000 // len(json.dumps(part))
        return {"type": "Sequence", key: [part] * min(times(draw), most)}
    for _ in range(draw.choice([2, 60, 300])):
        part = {"type": "Sequence", key: [part, part] if draw.random() < 0.02 else [part]}
    return part


def pre_tokenizer(draw: random.Random) -> Any:
    behavior = draw.choice(["Isolated", "Removed", "MergedWithPrevious", "Contiguous", "x"])
    part = draw.choice([
        {"type": "Split", "pattern": pattern(draw), "behavior": behavior, "invert": draw.random() < 0.3},
        {"type": "FixedLength", "length": draw.choice(NUMBERS)},
        {"type": "Metaspace", "replacement": draw.choice(WORDS), "prepend_scheme": "always", "split": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": draw.random() < 0.5},
        {"type": draw.choice(["Whitespace", "UnicodeScripts", "BertPreTokenizer", "Punctuation", "Digits"])},
    ])  # fmt: skip
    return sequence(draw, part, "pretokenizers")


def post_processor(draw: random.Random) -> Any:
    piece = draw.choice([{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}])
    special = {"<s>": {"id": "<s>", "ids": [draw.choice(NUMBERS)] * times(draw), "tokens": ["<s>"] * times(draw)}}
    ends = {"sep": ["a", draw.choice(NUMBERS)], "cls": ["b", 1]}
    part = draw.choice([
        {"type": "TemplateProcessing", "single": [piece] * times(draw), "pair": [], "special_tokens": special},
        {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": True, **ends},
    ])  # fmt: skip
    return sequence(draw, part, "processors")


def decoder(draw: random.Random) -> Any:
    part = draw.choice([
        {"type": "Replace", "pattern": pattern(draw), "content": draw.choice(WORDS)},
        {"type": "Strip", "content": "1", "start": draw.choice(NUMBERS), "stop": draw.choice(NUMBERS)},
        {"type": "CTC", "pad_token": "1", "word_delimiter_token": "|", "cleanup": True},
        {"type": draw.choice(["Fuse", "ByteFallback", "ByteLevel", "BPEDecoder"])},
    ])  # fmt: skip
    return sequence(draw, part, "decoders")


def model(draw: random.Random, plain: dict[str, Any]) -> Any:
    vocabulary = dict(plain["vocab"])
    for _ in range(draw.choice([0, 1, 3])):
        vocabulary[draw.choice([*WORDS, *vocabulary])] = draw.choice(NUMBERS)
    unigram = [
        [word, draw.choice([-1.0, 0.0, 1e308, float("nan"), -1e-300])]
        for word in list(vocabulary)[: draw.choice([0, 5, 99])]
    ]
    return draw.choice([
        plain | {"vocab": vocabulary, draw.choice(["dropout", "cache_capacity", "byte_fallback", "unk_token"]): draw.choice(NUMBERS)},
        plain | {"vocab": vocabulary, "merges": [draw.choice(["1 2", ["1", "2"], "1", "a a a", ["", ""]])] * times(draw)},
        {"type": "WordLevel", "vocab": vocabulary, "unk_token": draw.choice(WORDS)},
        {"type": "Unigram", "vocab": unigram, "unk_id": draw.choice(NUMBERS), "byte_fallback": draw.random() < 0.5},
        {
            "type": "WordPiece", "vocab": vocabulary, "unk_token": "1", "continuing_subword_prefix": draw.choice(WORDS),
            "max_input_chars_per_word": draw.choice(NUMBERS),
        },
    ])  # fmt: skip


def added_tokens(draw: random.Random, plain: list[Any]) -> list[Any]:
    count, word = draw.choice([1, 30, 3000]), draw.choice(WORDS)
    flags = {name: draw.random() < 0.2 for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    first, most = draw.choice([30, 31, *NUMBERS]), 3_000_000 // (len(word) + 1)
    more = ({"id": first + index, "content": f"{word}{index}", **flags} for index in range(min(count, most)))
    return [*plain, *more]


def padding(draw: random.Random) -> Any:
    strategy = draw.choice(["BatchLongest", {"Fixed": draw.choice(NUMBERS)}])
    return {
        "strategy": strategy, "direction": "Right", "pad_to_multiple_of": draw.choice([None, *NUMBERS]), "pad_id": draw.choice(NUMBERS),
        "pad_type_id": 0, "pad_token": draw.choice(WORDS),
    }  # fmt: skip


SECTIONS: dict[str, Callable[[random.Random], Any]] = {
    "normalizer": normalizer,
    "pre_tokenizer": pre_tokenizer,
    "post_processor": post_processor,
    "decoder": decoder,
    "padding": padding,
}


def spoil(draw: random.Random, folder: Path) -> None:
    names = [*["tokenizer.json"] * 6, "tokenizer_config.json", "config.json", "config.json", "generation_config.json"]
    path = folder / draw.choice(names)
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if path.name == "tokenizer.json":
        for part in draw.sample([*SECTIONS, "model", "added_tokens"], draw.choice([1, 1, 2])):
            if part in SECTIONS:
                value[part] = SECTIONS[part](draw)
            else:
                value[part] = (model if part == "model" else added_tokens)(draw, value[part])
    elif path.name == "config.json":
        for _ in range(draw.choice([1, 1, 2])):
            number = draw.choice(NUMBERS)
            value[draw.choice(CONFIG_FIELDS)] = draw.choice(
                [number, number, leaf(draw), ["full_attention"] * times(draw)]
            )
    elif path.name == "tokenizer_config.json":
        flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        value["added_tokens_decoder"] = {
            str(draw.choice(NUMBERS)): {"content": draw.choice(WORDS), "special": True, **flags}
        }
    with contextlib.suppress(ValueError, RecursionError, UnicodeEncodeError):
        if draw.random() < 0.2:
            value = mutated(draw, value)
        path.write_text(json.dumps(value), encoding="utf-8")


@contextlib.contextmanager
def no_native_output() -> Iterator[None]:
    """Raises WrongError if native code writes a backtrace to the process's standard error."""
    with tempfile.TemporaryFile() as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            text = sink.read(100_000)
            if b"panicked" in text or b"memory allocation" in text:
                raise WrongError(f"native code wrote {text[:500]!r}")


def hostile_tokenizer(draw: random.Random, folder: Path) -> str:
    """The pocket student with hostile files: it is refused in one sentence, or usable on every text."""
    target = folder / "m"
    shutil.copytree(POCKET, target)
    if draw.random() < 0.05:
        path = target / draw.choice(
            ["chat_template.jinja", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"]
        )
        path.unlink(missing_ok=True)
        draw.choice(
            [
                lambda: os.mkfifo(path),
                lambda: path.symlink_to("/dev/zero"),
                lambda: path.symlink_to("/nowhere"),
                path.mkdir,
            ]
        )()
    else:
        spoil(draw, target)
    with no_native_output():
        opened_folder = ModelFolder.open(str(target), "models.student")
        prompter = Prompter(opened_folder.tokenizer, Prompt(max_tokens=100_000))
        for text in TEXTS:
            prompter.completion(prompter.ids(Problem.of(text, "problem 1")))
        assert opened_folder.shape.parameters
        if draw.random() < 0.1:
            opened(target)
    return "usable"
