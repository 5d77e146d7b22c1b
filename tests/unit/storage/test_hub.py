"""A hub that cannot be reached: one sentence in seconds for models and data sets; cached files still load."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import constants

from headwater.api import read_recipe
from headwater.config.recipe import Source
from headwater.data.sources import load
from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.runs.inputs import RunInputs
from headwater.runs.read_once import InputError
from headwater.storage import hub

QWEN = "Qwen/Qwen3-1.7B"
LOADERS = [
    pytest.param(lambda: ModelFolder.open(QWEN, "models.student").config, "is no folder here", id="config"),
    pytest.param(lambda: ModelFolder.open(QWEN, "models.student").tokenizer, "is no folder here", id="tokenizer"),
    pytest.param(lambda: load(Source(path=QWEN), "data.labeled", True), "is no file here", id="data"),
]
"""(what loads from the hub, how its sentence begins)"""


@pytest.fixture(autouse=True)
def online_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library as in a new process: not offline, no probe yet, an empty cache, and an empty working folder."""
    pytest.importorskip("datasets")  # takes seconds to import, which are not the hub's
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_probes", {})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a server that accepts connections and never answers, as HF_ENDPOINT."""
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.3")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{address}")
        yield address


class Answer(BaseHTTPRequestHandler):
    """Answers every request with one status and the error code of the hub."""

    status, error_code = 404, "RepoNotFound"
    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        if self.path != "/":
            self.requests.append(self.path)
        self.send_response(200 if self.path == "/" else self.status)
        self.send_header("X-Error-Code", self.error_code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def answering(status: int, error_code: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answer]]:
    """A hub that refuses every name so, as HF_ENDPOINT; counts the requests."""
    handler = type("Handler", (Answer,), {"status": status, "error_code": error_code, "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield handler
        server.shutdown()


def refusal(load_from_hub: Callable[[], object]) -> str:
    """The sentence of a refusal, which must come within five seconds of the probe."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_from_hub()
    assert time.monotonic() - start < 5.3
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("load_from_hub", "beginning"), LOADERS)
def test_silent_hub_is_refused_soon_in_one_sentence(
    load_from_hub: Callable[[], object], beginning: str, silent_server: str
) -> None:
    sentence = refusal(load_from_hub)
    reason = f"and the hub cannot be reached ({silent_server} does not answer within 0.3 s)"
    assert QWEN in sentence and beginning in sentence and reason in sentence
    assert sentence.endswith("download it to a folder on a machine with network, or set HF_ENDPOINT")


@pytest.mark.parametrize(("load_from_hub", "beginning"), LOADERS)
def test_refused_connection_is_named(
    load_from_hub: Callable[[], object], beginning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert f"{beginning}, and the hub cannot be reached (127.0.0.1:1: Connection refused)" in refusal(load_from_hub)


@pytest.mark.parametrize(("load_from_hub", "beginning"), LOADERS)
def test_offline_mode_of_user_is_named_without_probe(
    load_from_hub: Callable[[], object], beginning: str, silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sentence = refusal(load_from_hub)
    assert f"{beginning}, and the hub cannot be reached (HF_HUB_OFFLINE is set)" in sentence
    assert sentence.endswith("or unset HF_HUB_OFFLINE")
    assert hub._probes == {}


def test_absent_name_is_named_with_similar_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen3-1.7B").mkdir()
    with answering(404, "RepoNotFound", monkeypatch) as server:
        sentence = refusal(lambda: ModelFolder.open(QWEN, "models.student").config)
    host = constants.ENDPOINT.removeprefix("http://")
    assert sentence == (
        f"models.student: {QWEN} exists neither on {host} nor as a file or folder here; did you mean Qwen3-1.7B? Check its "
        "spelling, or set HF_TOKEN if it is private"
    )
    assert len(server.requests) <= 2  # no retries


@pytest.mark.parametrize(
    ("status", "code", "part"),
    [
        (403, "GatedRepo", "needs its owner's permission"),
        (404, "EntryNotFound", "holds no config.json"),
        (500, "", "cannot be loaded"),
    ],
)
def test_other_refusals_of_hub_have_own_sentences(
    status: int, code: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, code, monkeypatch) as server:
        assert part in refusal(lambda: ModelFolder.open(QWEN, "models.student").config)
    assert len(server.requests) <= 2


def test_absent_data_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(404, "RepoNotFound", monkeypatch):
        sentence = refusal(lambda: load(Source(path="openai/gsm9k"), "data.labeled", True))
    assert sentence.startswith("data.labeled: openai/gsm9k exists neither on 127.0.0.1:")


def test_unreachable_hub_is_said_once_for_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    recipe = read_recipe("pocket", {"models.student": "Qwen/Qwen3-0.6B", "models.teacher": QWEN})
    inputs = RunInputs(recipe)
    start = time.monotonic()
    sentences = set()
    for read in (inputs.weights_path, inputs.config, inputs.tokenizer):
        for role in ("student", "teacher"):
            with pytest.raises(InputError) as caught:
                read(role)
            sentences.add(str(caught.value))
    assert sentences == {
        "models.student and models.teacher: Qwen/Qwen3-0.6B and Qwen/Qwen3-1.7B are no folders here, and the hub cannot be reached "
        "(127.0.0.1:1: Connection refused): download them to folders on a machine with network, or set HF_ENDPOINT"
    }
    assert time.monotonic() - start < 5.0


def test_failed_probe_is_cached_then_repeated(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str | None] = ["down", None]
    monkeypatch.setattr(hub, "_probe", lambda endpoint, seconds: reasons.pop(0))
    assert hub.unreachable() == hub.unreachable() == "down"
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub, "REMEMBERED_SECONDS", 0.0)
    assert hub.unreachable() is hub.unreachable() is None  # a third probe would find no reason left
    assert not constants.HF_HUB_OFFLINE


def test_cached_model_loads_while_hub_is_silent(silent_server: str, pocket_folder: Path) -> None:
    model = Path(constants.HF_HUB_CACHE) / "models--Qwen--Qwen3-1.7B"
    shutil.copytree(pocket_folder / "qwen3-student", model / "snapshots" / "abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    cached, local = (ModelFolder.open(name, "f") for name in (QWEN, str(pocket_folder / "qwen3-student")))
    start = time.monotonic()
    assert cached.config.hidden_size == local.config.hidden_size
    assert cached.tokenizer("17+45")["input_ids"] == local.tokenizer("17+45")["input_ids"]
    assert time.monotonic() - start < 3.0


@pytest.mark.parametrize("name", ["./modls/Qwen3", "modls/Qwen3/4B", "/modls", "~/modls/Qwen3"])
def test_mistyped_model_path_is_called_no_folder(name: str, silent_server: str) -> None:
    with pytest.raises(UserError, match=f"^models.student: {name} is no folder here$"):
        ModelFolder.open(name, "models.student")
    assert hub._probes == {}


def test_mistyped_name_in_local_folder_is_called_no_folder(tmp_path: Path, silent_server: str) -> None:
    (tmp_path / "models").mkdir()
    assert refusal(lambda: ModelFolder.open("models/Qwen3", "f").config) == "f: models/Qwen3 is no folder here"
    load_data = lambda: load(Source(path="models/train"), "data.labeled", True)  # noqa: E731
    assert refusal(load_data) == "data.labeled: models/train: no such file or folder"


def test_mistyped_data_path_is_refused_without_probe(silent_server: str) -> None:
    for name in ("./dat/train", "/dat/train", "a/b/train"):
        with pytest.raises(UserError, match=f"^data.labeled: {name}: no such file or folder$"):
            load(Source(path=name), "data.labeled", True)
    assert hub._probes == {}


def test_file_or_bare_name_as_model_is_explained(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"^models.student: model\.gguf is a file; name the model folder that holds it"):
        ModelFolder.open("model.gguf", "models.student")
    with pytest.raises(UserError, match=r"^models.student: gpt2 is no folder here, and no hub id \(owner/name\)$"):
        ModelFolder.open("gpt2", "models.student")
