"""Check tokenizer files from unknown sources before native code opens them.

The tokenizers library is native code: a file that asks it for too much memory ends the whole process, and nothing can interrupt it.
Ids, sizes and replacements that multiply a text are checked in the JSON. A file with a part of unknown cost is first opened in a
child process with time and memory limits.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from headwater.errors import CONTROL_CHARACTERS
from headwater.models.tokenizer import PROBES
from headwater.models.untrusted_files import parse_object

T = TypeVar("T")

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
CONVERTED = ("tokenizer.model", "spiece.model", "tiktoken.model", "sentencepiece.bpe.model")
"""Files from which transformers makes a tokenizer where there is no tokenizer.json."""
SPARE_IDS, LARGEST_TOKEN_ID = 1 << 16, 1 << 24
"""Ids may exceed the model's rows by the first number (tokens of another model of the family); none reaches the second."""
MAX_CHARACTERS = 64
"""Characters of regular expressions of which a repetition is tried."""
MAX_GROWTH = 32
"""Times that replacements may multiply the length of a text."""
CHILD_SECONDS, CHILD_WALL_SECONDS, CHILD_MEGABYTES = 20, 120.0, 2048
"""Limits of the process that opens an unusual tokenizer: processor time, time, and memory beyond what the packages take."""
MAX_PARTS, MAX_ADDED_CHARACTERS = 10_000, 1 << 20
"""Largest number of JSON objects in a section, and of characters of all added tokens together."""
MAX_SPECIAL = 50_000
"""Most special tokens in a list: transformers takes 0.6 s for 10,000, and 25 times that for these."""
MAX_WORD = 1000
"""Largest word that a WordPiece model splits; BERT's is 100."""
ORDINARY_PARTS, ORDINARY_TEXT = 300, 600
"""Bounds of an ordinary file: objects in all sections, characters of a text in them."""
SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "padding", "truncation")
ENCODING = SECTIONS[:3]
"""Sections that a text passes one after the other."""
ORDINARY = frozenset({
    "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer", "Prepend", "Replace",
    "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Digits", "Punctuation", "Split",
    "TemplateProcessing", "BertProcessing", "RobertaProcessing", "WordPiece", "ByteFallback", "Fuse", "BPE", "WordLevel", "Unigram",
})  # fmt: skip
"""Parts whose time and memory are proportional to the text."""
NESTED_REPEAT = re.compile(r"\)[*+{?]?[*+{]|\\[1-9kg]")
"""In a regular expression: a repeated group or a back reference, which can take exponential time."""
MOST_REPEATS = 3
"""Repetitions in one alternative of an ordinary regular expression: k of them may take time that grows with the k-th power."""


def problem_of_tokenizer(folder: Path, rows: int | None) -> str | None:
    """Why a tokenizer's files are not opened, as the end of a sentence; None if they may be.

    rows  of the model's largest weight, which bounds the ids; None if the weights are not known
    """
    paths = [path for name in (*FILES, *CONVERTED) if (path := folder / name).is_file()]
    states = tuple((path, (status := path.stat()).st_size, status.st_mtime_ns) for path in paths)
    return _problem(states, LARGEST_TOKEN_ID if rows is None else min(rows + SPARE_IDS, LARGEST_TOKEN_ID), rows)


@lru_cache(maxsize=512)
def _problem(states: tuple[tuple[Path, int, int], ...], limit: int, rows: int | None) -> str | None:
    try:
        values = {path.name: parse_object(path) for path, _, _ in states if path.suffix == ".json"}
    except ValueError as error:
        return str(error)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        keys = (key for part in _parts(values.get(name)) for key in part)
        if any(map(CONTROL_CHARACTERS.search, keys)):  # native code prints the names of settings that it does not know
            return f"{name} holds a name with control characters"
        lists = (value for part in _parts(values.get(name)) for value in part.values() if isinstance(value, list))
        if max(map(len, lists), default=0) > MAX_SPECIAL:
            return f"{name} lists over {MAX_SPECIAL:,} special tokens, which are added in time that grows with their square"
    for name, value in values.items():
        largest = max(_ids(name, value), default=0)
        if largest >= limit:
            holds = "no vocabulary reaches it" if rows is None else f"the model's largest weight has {rows} rows"
            return f"{name} gives a token the id {largest}, and {holds}"
    tokenizer = values.get("tokenizer.json", {})
    encoded = 1
    for section in SECTIONS:
        parts = list(itertools.islice(_parts(tokenizer.get(section)), MAX_PARTS + 1))
        if len(parts) > MAX_PARTS:
            return f"the {section} in tokenizer.json has over {MAX_PARTS:,} parts"
        growth = math.prod(map(_growth, parts))
        if growth > MAX_GROWTH:
            return f"the {section} in tokenizer.json makes a text {growth:.3g} times as long"
        if section in ENCODING:
            encoded *= growth
    if encoded > MAX_GROWTH:
        return f"the {', '.join(ENCODING[:-1])} and {ENCODING[-1]} in tokenizer.json together make a text {encoded:.3g} times as long"
    if (longest := _longest_word(tokenizer)) > MAX_WORD:
        return f"tokenizer.json splits words of up to {longest} characters, over {MAX_WORD:,}, in time that grows with their cube"
    if sum(map(len, _added_contents(tokenizer))) > MAX_ADDED_CHARACTERS:
        return f"the added tokens in tokenizer.json have over {MAX_ADDED_CHARACTERS:,} characters"
    if _is_ordinary(tokenizer):
        return None
    first = next((state for state in states if state[0].name in ("tokenizer.json", *CONVERTED)), None)
    if first is None:
        return None
    patterns = {part["Regex"] for part in _parts(tokenizer) if isinstance(part.get("Regex"), str)}
    characters = sorted(set("".join(patterns)))[:MAX_CHARACTERS]
    path, size, _ = first
    return _problem_in_child(path, size, [character * 60 + end for character in characters for end in ("~", "")])


def _ids(name: str, value: dict[str, Any]) -> Iterator[int]:
    """Every token id in a file, and every one that a digit string spells."""
    candidates: list[Any]
    if name == "tokenizer.json":
        vocabulary = _entry(_entry(value, "model", dict), "vocab", dict)
        candidates = [*vocabulary.values(), *(token.get("id") for token in _added_tokens(value))]
    elif name == "tokenizer_config.json":
        candidates = [int(key) for key in _entry(value, "added_tokens_decoder", dict) if key.isdecimal()]
    else:
        candidates = list(value.values())
    yield from (number for number in candidates if isinstance(number, int))


def _entry(value: dict[str, Any], key: str, kind: type[T]) -> T:
    """An entry of a JSON object; an empty value of that type where it is missing or of another type."""
    entry = value.get(key)
    return entry if isinstance(entry, kind) else kind()


def _added_tokens(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return [token for token in _entry(tokenizer, "added_tokens", list) if isinstance(token, dict)]


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in a value."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _growth(part: dict[str, Any]) -> int:
    """How many times as long a text can become in one part."""
    kind = part.get("type")
    if kind == "ByteLevel":
        return 2  # a character for each byte, of up to two bytes
    if kind == "TemplateProcessing":
        return max(1, sum("Sequence" in piece for piece in _entry(part, "single", list) if isinstance(piece, dict)))
    text = part.get("content" if kind == "Replace" else "prepend")
    if kind not in ("Replace", "Prepend") or not isinstance(text, str):
        return 1
    literal = _entry(_entry(part, "pattern", dict), "String", str)
    if literal:
        return max(1, math.ceil(len(text) / len(literal)))
    return max(1, len(text)) if kind == "Prepend" else 1 + len(text)  # a regular expression may match the empty text


def _added_contents(tokenizer: dict[str, Any]) -> list[str]:
    return [_entry(token, "content", str) for token in _added_tokens(tokenizer)]


def _longest_word(tokenizer: dict[str, Any]) -> float:
    """Characters of the longest word that a WordPiece model splits; 0 for other models."""
    longest = _entry(tokenizer, "model", dict).get("max_input_chars_per_word")
    return longest if isinstance(longest, (int, float)) else 0


def _is_ordinary(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json holds only parts whose cost is known."""
    model = _entry(tokenizer, "model", dict)
    if model.get("type") not in ORDINARY or not isinstance(model.get("vocab"), (dict, list)):
        return False
    settings = {key: value for key, value in model.items() if key not in ("vocab", "merges", "type")}
    sections = [tokenizer.get(section) for section in SECTIONS]
    parts = [part for section in (*sections, settings) for part in _parts(section)]
    return (
        max(map(len, _added_contents(tokenizer)), default=0) <= ORDINARY_TEXT
        and len(parts) <= ORDINARY_PARTS
        and all(part["type"] in ORDINARY for part in parts if isinstance(part.get("type"), str))
        and all(part.get("start", 0) in (0, 1) and part.get("stop", 0) == 0 for part in parts)  # else Strip may panic
        and all(_is_small(key, value) for part in parts for key, value in part.items())
    )


def _is_small(key: str, value: Any) -> bool:
    """Whether a value of a part is an ordinary number, text or list of them."""
    if isinstance(value, list):
        return len(value) <= ORDINARY_PARTS and all(_is_small(key, item) for item in value)
    if isinstance(value, str):
        return len(value) <= ORDINARY_TEXT and not (key == "Regex" and _is_slow(value))
    return not isinstance(value, (int, float)) or 0 <= value <= SPARE_IDS or key == "id"


def _is_slow(pattern: str) -> bool:
    plain = re.sub(r"\\[pP]\{[^}]*\}", "", pattern)  # classes of characters, such as \p{L}
    repeats = (sum(map(alternative.count, "*+{")) for alternative in plain.split("|"))
    return NESTED_REPEAT.search(pattern) is not None or max(repeats) > MOST_REPEATS


def _problem_in_child(path: Path, size: int, texts: Sequence[str]) -> str | None:
    """What is wrong with a tokenizer in use on these texts and the probes, by another process."""
    megabytes = CHILD_MEGABYTES + 32 * (size >> 20)
    seconds = CHILD_SECONDS + (size >> 20)
    setup = {
        "path": str(path), "seconds": seconds, "megabytes": megabytes, "texts": ["1", *PROBES, *texts], "sys_path": sys.path,
    }  # fmt: skip
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
    program = str(Path(__file__).with_name("tokenizer_child.py"))
    limits = f"takes more than {seconds} seconds or {megabytes} MiB to open and use"
    try:
        ended = subprocess.run(
            [sys.executable, "-I", program], input=json.dumps(setup).encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, timeout=CHILD_WALL_SECONDS + seconds, check=False,
        )  # fmt: skip
        problem = json.loads(ended.stdout)["problem"] if ended.returncode == 0 else limits
    except subprocess.TimeoutExpired:
        problem = limits
    return None if problem is None else f"{path.name} {problem}"
