"""Tokenizer files from unknown sources: refused from the JSON, or by a process with limits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from headwater.models import untrusted_tokenizer
from headwater.models.folder import ModelFolder
from headwater.models.untrusted_tokenizer import problem_of_tokenizer

PLAIN: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
    "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"1": 0, "<unk>": 1}, "unk_token": "<unk>"},
}  # fmt: skip
DOUBLING = {"type": "Replace", "pattern": {"String": "zebra"}, "content": "zebrazebra"}
ADDED = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def replaced(**sections: Any) -> dict[str, Any]:
    return PLAIN | sections


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def problem(folder: Path, tokenizer: Any, rows: int | None = 30, name: str = "tokenizer.json") -> str | None:
    (folder / name).write_text(json.dumps(tokenizer), encoding="utf-8")
    return problem_of_tokenizer(folder, rows)


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a test fail that starts a process."""
    monkeypatch.delattr(untrusted_tokenizer, "subprocess")


FROM_JSON: dict[str, tuple[dict[str, Any], str]] = {
    "doubling": (
        replaced(normalizer=sequence(*[DOUBLING] * 32)),
        "normalizer in tokenizer.json makes a text 4.29e+09 times",
    ),
    "empty matches": (
        replaced(normalizer=sequence(*[DOUBLING | {"pattern": {"Regex": "(?=z)"}, "content": "z"}] * 32)),
        "makes a text 4.29e+09 times as long",
    ),
    "prepended": (replaced(normalizer={"type": "Prepend", "prepend": "x" * 100}), "makes a text 100 times as long"),
    "decoder": (replaced(decoder={"type": "Sequence", "decoders": [DOUBLING] * 9}), "the decoder in tokenizer.json"),
    "bytes of bytes": (
        replaced(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "use_regex": False}] * 33}),
        "the pre_tokenizer in tokenizer.json makes a text 8.59e+09 times",
    ),
    "repeated template": (
        replaced(
            post_processor={"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 99}
        ),
        "the post_processor in tokenizer.json makes a text 99 times",
    ),
    "growth in each section": (
        replaced(
            normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 30},
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 20,
            },
        ),
        "the normalizer, pre_tokenizer and post_processor in tokenizer.json together make a text 600 times as long",
    ),
    "long words": (
        replaced(model={"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 65_536}),
        "splits words of up to 65536 characters, over 1,000",
    ),
    "many parts": (replaced(normalizer=sequence(*[{"type": "Lowercase"}] * 10_001)), "has over 10,000 parts"),
    "added tokens": (
        replaced(
            added_tokens=[{"id": 2, "content": "x" * 600_000, **ADDED}, {"id": 3, "content": "y" * 600_000, **ADDED}]
        ),
        "have over 1,048,576 characters",
    ),
    "id of an added token": (
        replaced(added_tokens=[{"id": 2**31, "content": "x", **ADDED}]),
        "the id 2147483648, and the model",
    ),
    "id of the vocabulary": (
        replaced(model={"type": "BPE", "vocab": {"a": 100_000}}),
        "the id 100000, and the model's largest weight has 30 rows",
    ),
}


@pytest.mark.parametrize("kind", FROM_JSON)
@pytest.mark.usefixtures("no_child")
def test_tokenizer_bomb_is_refused_from_json_alone(kind: str, tmp_path: Path) -> None:
    tokenizer, sentence = FROM_JSON[kind]
    assert sentence in (problem(tmp_path, tokenizer) or "")


@pytest.mark.parametrize("name", ["vocab.json", "added_tokens.json", "tokenizer_config.json"])
@pytest.mark.usefixtures("no_child")
def test_ids_of_other_tokenizer_files_are_compared_with_rows(name: str, tmp_path: Path) -> None:
    value = {"added_tokens_decoder": {"2147483648": {}}} if name == "tokenizer_config.json" else {"x": 1 << 31}
    assert (
        problem(tmp_path, value, name=name)
        == f"{name} gives a token the id 2147483648, and the model's largest weight has 30 rows"
    )
    assert problem(tmp_path, {}, name=name) is None


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_long_list_of_special_tokens_is_refused(name: str, tmp_path: Path) -> None:
    tokens = [f"<{number}>" for number in range(50_001)]
    refusal = problem(tmp_path, {"extra_special_tokens": tokens}, name=name)
    assert refusal is not None and f"{name} lists over 50,000 special tokens" in refusal
    assert problem(tmp_path, {"extra_special_tokens": tokens[1:]}, name=name) is None


def test_unprintable_name_of_setting_is_refused(tmp_path: Path) -> None:
    token = {"content": "<s>", "\x1b[2J": True}
    refusal = problem(tmp_path, {"added_tokens_decoder": {"1": token}}, name="tokenizer_config.json")
    assert refusal == "tokenizer_config.json holds a name with control characters"


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[1]"])
def test_malformed_tokenizer_json_is_refused_in_own_words(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    refusal = problem_of_tokenizer(tmp_path, 30)
    assert refusal in (
        "tokenizer.json is nested too deeply",
        "tokenizer.json is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "tokenizer.json is no JSON object but list",
    )


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    "tokenizer",
    [
        PLAIN,
        replaced(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [split(QWEN), {"type": "ByteLevel", "use_regex": False}],
            }
        ),
        replaced(
            normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            padding={"strategy": {"Fixed": 20}},
        ),
    ],
)
@pytest.mark.usefixtures("no_child")
def test_ordinary_tokenizer_needs_no_process(tokenizer: dict[str, Any], tmp_path: Path) -> None:
    assert problem(tmp_path, tokenizer) is None


IN_CHILD: dict[str, tuple[dict[str, Any], str | None]] = {
    "abort": (replaced(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}), "more than 20 seconds or 2048 MiB"),
    "decoder": (
        replaced(decoder={"type": "Strip", "content": "1", "start": 0, "stop": 2}),
        "makes the tokenizers library fail",
    ),
    "panic": (replaced(pre_tokenizer=split("(k|k|kk)+$")), "makes the tokenizers library fail"),
    "polynomial time": (replaced(pre_tokenizer=split("k*k*k*k*k*k*k*k*[^k\\s]")), "makes the tokenizers library fail"),
    "many ids": (
        replaced(
            post_processor={
                "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "1", "type_id": 0}}] * 3000,
                "pair": [], "special_tokens": {"1": {"id": "1", "ids": [0], "tokens": ["1"]}},
            }
        ),
        "gives 30",
    ),
    "unusual and harmless": (replaced(pre_tokenizer=split("(ab)+")), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_CHILD)
def test_unusual_tokenizer_is_first_opened_in_bounded_process(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer, sentence = IN_CHILD[kind]
    refusal = problem(tmp_path, tokenizer)
    assert refusal is None if sentence is None else sentence in (refusal or "")
    assert capfd.readouterr() == ("", "")  # no backtrace of native code


def test_every_tokenizer_file_of_hub_is_checked_before_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    remote.mkdir()
    cache.mkdir()
    (remote / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (remote / "vocab.json").write_text(json.dumps({"x": 1 << 31}), encoding="utf-8")

    def download(repository: str, name: str, **options: bool) -> str | None:
        return shutil.copy(remote / name, cache) if (remote / name).exists() else None

    monkeypatch.setattr("headwater.models.folder.cached_file", download)
    problem = ModelFolder("owner/name", "models.student", "owner/name")._problem_of_tokenizer()
    assert problem == "vocab.json gives a token the id 2147483648, and no vocabulary reaches it"
