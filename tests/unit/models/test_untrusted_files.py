"""Model folders are untrusted: pickles, code, false sizes and hostile chat templates are refused in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import signal
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headwater.config.builtin import find_recipe
from headwater.errors import UserError
from headwater.models import prompts, untrusted_files
from headwater.models import resource_limits as limits
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.prompts import Prompter
from headwater.models.resource_limits import OutOfTimeError, resource_limits
from headwater.runs.inputs import RunInputs
from headwater.types import Problem
from tiny import CPU, MODELS, tiny_folder
from untrusted import HOSTILE_TEMPLATES, TouchOnUnpickle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


def test_safetensors_length_resembling_pickle_is_read(folder: Path) -> None:
    """One header in 32 has a length whose first byte is the one that pickles begin with."""
    path = folder / "model.safetensors"
    content = load_file(path)
    for padding in range(0, 256, 8):
        save_file(content, path, metadata={"format": "pt", "padding": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert torch.equal(
        load_policy(
            ModelFolder.open(str(folder), "models.student"), LoadOptions(MODELS, CPU, frozen=True)
        ).model.lm_head.weight,
        content["model.embed_tokens.weight"],
    )


@pytest.mark.parametrize("kind", ["torch", "pickle", "text", "empty", "length"])
def test_false_safetensors_file_is_refused_unread(kind: str, folder: Path, tmp_path: Path) -> None:
    path, touched = folder / "model.safetensors", tmp_path / "touched"
    if kind == "torch":
        torch.save({"weight": TouchOnUnpickle(touched)}, path)
        assert zipfile.is_zipfile(path)
    else:
        path.write_bytes({"pickle": pickle.dumps(TouchOnUnpickle(touched)), "text": b"weights", "empty": b"",
                          "length": (1 << 40).to_bytes(8, "little") + b"{"}[kind])  # fmt: skip
    with pytest.raises(UserError, match=r"MODEL: .* \(model\.safetensors is no safetensors file") as refused:
        load_policy(ModelFolder.open(str(folder), "MODEL"), LoadOptions(MODELS, CPU, frozen=True))
    assert ("it is a pickle" in str(refused.value)) is (kind in ("torch", "pickle"))
    assert not touched.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_in_config_is_refused_by_field_unimported(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\nclass Model: pass\n", encoding="utf-8")
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    auto = {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Model", None]}
    (folder / name).write_text(json.dumps({**content, "auto_map": auto, "model_type": "unheard-of"}), encoding="utf-8")
    for act in (
        lambda: load_policy(ModelFolder.open(str(folder), "MODEL"), LoadOptions(MODELS, CPU, frozen=True)),
        lambda: RunInputs(find_recipe("pocket", [f"models.student={folder}"])).tokenizer("student"),
    ):
        with pytest.raises(UserError, match=f"auto_map in .*{name} names code .* models.trust_remote_code"):
            act()
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_config_naming_code_for_attention_is_refused(key: str, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for value in ("kernels-community/flash-attn2", "paged|owner/name:function", {"": "owner/name@main"}):
        path.write_text(json.dumps(config | {key: value}), encoding="utf-8")
        with pytest.raises(UserError, match=r"asks for attention by '.*/.*', code that would be downloaded and run"):
            assert ModelFolder.open(str(folder), "models.student").config
    path.write_text(json.dumps(config | {key: "sdpa"}), encoding="utf-8")
    assert ModelFolder.open(str(folder), "models.student").config._attn_implementation == "sdpa"


def test_config_entry_of_wrong_type_is_one_sentence(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"architectures": 5}), encoding="utf-8")
    with pytest.raises(UserError, match=r"^models\.student: the config of .* cannot be read \(TypeError: "):
        assert ModelFolder.open(str(folder), "models.student").config


def test_shard_index_leading_outside_folder_is_refused(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"names '\.\./\.\./secret\.safetensors', which is not a file of the folder"):
        ModelFolder.open(str(folder), "models.student")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"vocab_size": 10**12}, "vocab_size 1000000000000"),
        ({"num_labels": 10**9}, "num_labels 1000000000"),
        ({"intermediate_size": 10**12}, "intermediate_size 1000000000000"),
        ({"text_config": {"hidden_size": 10**12}}, "hidden_size 1000000000000"),
        ({"num_hidden_layers": 3}, "lack 11 weights"),
        ({"intermediate_size": 65}, "in another shape"),
    ],
)
def test_config_larger_than_weights_is_refused_without_random_weights(
    change: dict[str, Any], named: str, folder: Path
) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8")) | change
    content.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(UserError, match=named):
        load_policy(ModelFolder.open(str(folder), "MODEL"), LoadOptions(MODELS, CPU, frozen=True))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_hostile_chat_template_is_refused_in_time(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 1.0)
    (folder / "chat_template.jinja").write_text(HOSTILE_TEMPLATES[name], encoding="utf-8")
    recipe, started = find_recipe("pocket", [f"models.student={folder}"]), time.monotonic()
    with pytest.raises(UserError, match=rf"the chat template of {re.escape(str(folder))}") as refused:
        Prompter(RunInputs(recipe).tokenizer("student"), recipe.prompt).ids(Problem.of("17+45", "d.jsonl"))
    assert "\n" not in str(refused.value) and "d.jsonl" in str(refused.value)
    assert time.monotonic() - started < 10


def test_time_and_memory_limits_hold_and_are_reset() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with pytest.raises(OutOfTimeError), resource_limits(0.05, 100):
        time.sleep(5)
    with pytest.raises(MemoryError), resource_limits(5.0, 100):
        bytearray(16 << 30)  # more than the process may hold of what it was given before
    with resource_limits(5.0, 400):
        assert len(bytearray(200 << 20)) == 200 << 20
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before


@pytest.mark.parametrize("place", ["vocabulary", "added_tokens"])
def test_model_folder_refuses_token_id_beyond_vocabulary(place: str, folder: Path) -> None:
    """The tokenizer's native code would reserve memory up to the id and end the process."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if place == "vocabulary":
        tokenizer["model"]["vocab"]["7"] = 1 << 31
    else:
        tokenizer["added_tokens"][0]["id"] = 1 << 31
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"models\.student: the tokenizer of .* gives a token the id 2147483648, and the model's largest weight has \d+ rows",
    ):
        assert ModelFolder.open(str(folder), "models.student").tokenizer


@pytest.mark.parametrize("kind", ["pipe", "device", "broken link", "folder"])
@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "additional_chat_templates/a.jinja"])
def test_model_folder_with_irregular_file_is_refused_before_it_is_read(name: str, kind: str, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(UserError, match=rf"models\.student: .* holds {path.name}, which is not a regular file"):
        ModelFolder.open(str(folder), "models.student")


def test_model_folder_with_huge_text_file_is_refused_by_its_size(folder: Path) -> None:
    with (folder / "chat_template.jinja").open("wb") as file:
        file.truncate(1 << 40)  # no block of it is on the disk
    with pytest.raises(UserError, match=r"holds chat_template\.jinja of 1,099,511,627,776 bytes"):
        ModelFolder.open(str(folder), "models.student")


def test_model_folder_with_large_config_is_refused_by_its_size(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_bytes(b" " * ((8 << 20) + 1))
    with pytest.raises(UserError, match=r"special_tokens_map\.json of 8,388,609 bytes, over the 8,388,608 that"):
        ModelFolder.open(str(folder), "models.student")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "extra.safetensors"])
def test_json_of_too_many_values_is_refused_unparsed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed, lists of lists take 32 times their text."""
    monkeypatch.setattr(untrusted_files, "MAX_JSON_VALUES", 1_000_000)
    text = b'{"x": [' + b"[[]]," * 334_000 + b"0]}"
    header = len(text).to_bytes(8, "little") if name.endswith(".safetensors") else b""
    (folder / name).write_bytes(header + text)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=rf"{re.escape(name)}.* has over 1,000,000 values"):
            assert ModelFolder.open(str(folder), "models.student").tokenizer
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_config_asking_for_huge_tables_is_refused_before_allocation(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "gptj", "gptj", rotary_dim=8)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"n_positions": 10**10}), encoding="utf-8")  # 8 numbers of a table for each
    with pytest.raises(UserError, match=r"its config\.json asks for 6[\d,]{14,} bytes of tables besides the weights"):
        load_policy(ModelFolder.open(str(folder), "MODEL"), LoadOptions(MODELS, CPU, frozen=True))


def test_config_with_endless_layout_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LAYOUT_SECONDS", 0.2)
    monkeypatch.setattr("headwater.models.folder.AutoConfig.from_pretrained", lambda *given, **named: time.sleep(30))
    with pytest.raises(
        UserError, match=r"the config of .* cannot be read \(laying out the model .* more than 0\.2 seconds"
    ):
        assert ModelFolder.open(str(folder), "models.student").config
