"""HTTP client of a served teacher: retries, refusals, redirects, limits, proxies, keys, and the choice of a model."""

from __future__ import annotations

import contextlib
import socket
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from headwater.config.compute import Server
from headwater.errors import TrainingStoppedError, UserError
from headwater.teachers import server_client
from headwater.teachers.server_client import ServedTokenizer, ServerClient, connect
from serving import Answers, serving

QUICK = Server(seconds=2.0, retries=2)


def client(url: str, **settings: Any) -> ServerClient:
    return ServerClient("models.teacher", url, QUICK.model_copy(update=settings))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(server_client.time, "sleep", slept.append)
    return slept


def failing(times: int, bad: Callable[[], Any]) -> Answers:
    """The first `times` requests fail, later ones succeed."""
    left = [times]

    def answer(path: str, body: dict[str, Any] | None) -> Any:
        left[0] -= 1
        return bad() if left[0] >= 0 else {"good": body}

    return answer


RETRYABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "error 500": (lambda: (500, {"error": {"message": "engine died"}}), "status 500: engine died"),
    "error 429": (lambda: (429, b"slow down"), "status 429: slow down"),
    "error 408": (lambda: (408, b""), "status 408: Request Timeout"),
    "HTML": (lambda: b"<html>oops", "its answer is not JSON"),
    "a JSON list": (lambda: [1], "its answer is not a JSON object but list"),
    "half a JSON object": (lambda: b'{"choices": [', "its answer is not JSON"),
    "deep JSON": (lambda: b"[" * 20_000, "its answer is not JSON"),
    "connection closed early": (lambda: (200, b"{", {"Content-Length": "9"}), "peer closed connection"),
}


@pytest.mark.parametrize("kind", RETRYABLE)
def test_retryable_failure_is_retried_with_growing_pauses_then_stops_run(kind: str, pauses: list[float]) -> None:
    bad, message = RETRYABLE[kind]
    with serving(failing(2, bad)) as there:
        assert client(there.url).request("/v1/completions", {"a": 1}) == {"good": {"a": 1}}
        assert pauses == [0.5, 1.0]
        there.answer = failing(99, bad)
        with pytest.raises(TrainingStoppedError) as stopped:
            client(there.url, retries=8).request("/v1/completions", {})
    assert pauses[2:] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert all(part in str(stopped.value) for part in ("models.teacher", there.url, "9 tries", message))


def test_timeout_is_retried() -> None:
    def late(path: str, body: dict[str, Any] | None) -> Any:
        time.sleep(0.4)
        return {}

    with (
        serving(late) as there,
        pytest.raises(TrainingStoppedError, match=r"1 try \(no complete response within 0\.1 s\)"),
    ):
        client(there.url, seconds=0.1, retries=0).request("/v1/models")


@pytest.mark.parametrize("part", ["headers", "body"])
def test_answer_of_single_bytes_ends_with_time_limit(part: str) -> None:
    header = b"HTTP/1.1 200 OK\r\n" + (b"X-A: " if part == "headers" else b"Content-Length: 9999\r\n\r\n")
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def drip() -> int:
            sent_bytes = 0
            connection = server.accept()[0]
            with connection, contextlib.suppress(OSError):
                connection.sendall(header)
                while sent_bytes < 100:
                    sent_bytes += connection.send(b"1")
                    time.sleep(0.05)
            return sent_bytes

        sent = pool.submit(drip)
        began = time.monotonic()
        with pytest.raises(TrainingStoppedError, match=r"no complete response within 0\.4 s"):
            client(f"http://127.0.0.1:{server.getsockname()[1]}", seconds=0.4, retries=0).request("/v1/models")
        assert time.monotonic() - began < 3.0 and sent.result() < 60


def test_message_of_server_reaches_terminal_without_control_characters() -> None:
    with serving(lambda path, body: (400, {"error": {"message": "\x1b]0;title\x07\x9b2J\u202etxt"}})) as there:
        with pytest.raises(UserError) as refused:
            client(there.url).request("/v1/completions", {})
    assert str(refused.value).isprintable() and "title" in str(refused.value)


def test_refused_connection_names_reason(pauses: list[float]) -> None:
    with pytest.raises(TrainingStoppedError, match=r"3 tries \(.*Connection refused\)"):
        client("http://127.0.0.1:9/v1").request("/v1/models")


@pytest.mark.parametrize("url", ["http://", "http://host:99999/v1", "http://[::1/v1"])
def test_invalid_address_is_refused_by_field(url: str, pauses: list[float]) -> None:
    with pytest.raises(UserError, match=r"^models\.teacher: http://"):
        connect(url, "models.teacher", QUICK)


def test_other_client_errors_are_not_retried_and_quote_server_message() -> None:
    with serving(lambda path, body: (400, {"error": {"message": "max allowed:\n20"}})) as there:
        with pytest.raises(UserError, match=r"refuses \(status 400: max allowed: 20\)"):
            client(there.url).request("/v1/completions", {})
        assert len(there.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_refused_without_sending_prompts_or_key(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", "secret")
    with serving(lambda path, body: {}) as other:
        with serving(lambda path, body: (status, b"", {"Location": f"{other.url}/elsewhere"})) as there:
            for body in (None, {"prompt": [1, 2]}):
                with pytest.raises(
                    UserError, match=rf"refuses \(status {status}: it redirects to {other.url}/elsewhere;"
                ):
                    client(there.url, key_env="SERVER_KEY").request("/v1/completions", body)
            assert there.authorization == ["Bearer secret"] * 2
        assert other.requests == []


def test_error_messages_are_read_up_to_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "MAX_ERROR_BYTES", 20)
    with serving(lambda path, body: (400, b"y" * 200_000)) as there:
        with pytest.raises(UserError, match=r"status 400: y{20}\)"):
            client(there.url).request("/v1/models")


ENTRIES = 2000
MOST_BYTES = (ENTRIES + server_client.BASE_ENTRIES) * server_client.ENTRY_BYTES
LARGE_ANSWERS = {
    "a long text": (b"x" * (10 << 20), r"over 1,560,576 bytes, more than the request asked for"),
    "lists of lists": (
        b'{"a": [' + b"[[]]," * (MOST_BYTES // 5 - 9) + b"0]}",
        r"over 48,768 values, more than the request",
    ),
    "objects": (b'{"a": [' + b"{}," * (MOST_BYTES // 3 - 9) + b"0]}", r"over 48,768 values, more than the request"),
    "a text that never ends": (b'{"a": "' + b'\\",' * (MOST_BYTES // 3 - 9), "its answer is not JSON"),
}


@pytest.mark.parametrize("kind", LARGE_ANSWERS)
def test_answer_larger_than_request_asks_for_is_refused_within_memory(kind: str) -> None:
    """A list of lists takes 32 times its text when it is parsed."""
    text, message = LARGE_ANSWERS[kind]
    with serving(lambda path, body: text) as there:
        tracemalloc.start()
        try:
            with pytest.raises(TrainingStoppedError, match=message):
                client(there.url, retries=0).request("/v1/completions", {}, ENTRIES)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 2560 * (ENTRIES + server_client.BASE_ENTRIES)


def test_answer_with_texts_of_brackets_and_commas_is_read() -> None:
    """Tokens may consist of the characters that separate JSON values."""
    entry = {"logprob": -13.462918281555176, "rank": 151_643, "decoded_token": '[{,"\\' * 10}
    whole = {"choices": [{str(token): entry} for token in range(ENTRIES + server_client.BASE_ENTRIES - 10)]}
    with serving(lambda path, body: whole) as there:
        assert client(there.url).request("/v1/completions", {}, ENTRIES) == whole


def test_root_is_address_without_v1() -> None:
    assert {client(f"http://a:1{path}").root for path in ("", "/", "/v1", "/v1/")} == {"http://a:1"}


# The key and the environment ------------------------------------------------------------------------------------------


def test_api_key_comes_from_environment_and_is_sent_with_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = QUICK.model_copy(update={"key_env": "SERVER_KEY"})
    with serving(lambda path, body: {"data": [{"id": "a"}]}) as there:
        with pytest.raises(UserError, match=r"compute\.server\.key_env: the environment has no variable SERVER_KEY"):
            connect(there.url, "models.teacher", settings)
        assert there.requests == []
        monkeypatch.setenv("SERVER_KEY", "secret")
        model = connect(there.url, "models.teacher", settings)
        model.client.request("/v1/completions", {})
    assert there.authorization == ["Bearer secret"] * 2 and "secret" not in repr(model)


@pytest.mark.parametrize("key", ["secret\n", "secr\u00e9t", "a\r\nX-Other: b"])
def test_invalid_api_key_is_refused_without_being_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", key)
    with pytest.raises(UserError, match=r"compute\.server\.key_env: SERVER_KEY holds characters") as refused:
        client("http://127.0.0.1:9", key_env="SERVER_KEY").request("/v1/models")
    assert "secr" not in str(refused.value)


@pytest.mark.parametrize("tokens", [None, [1, "2"], [True], [-1], [1.0]])
def test_malformed_token_ids_of_text_stop_run(tokens: Any) -> None:
    with serving(lambda path, body: {"data": [{"id": "a"}], "tokens": tokens}) as there:
        tokenizer = ServedTokenizer(connect(there.url, "models.teacher", QUICK))
        with pytest.raises(TrainingStoppedError, match="gives no token ids for a text"):
            tokenizer.chat([], False)


def test_missing_key_sends_no_authorization_header() -> None:
    with serving(lambda path, body: {}) as there:
        client(there.url).request("/v1/models")
    assert there.authorization == [None]


def test_invalid_proxy_is_refused_by_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(UserError, match=r"^models\.teacher: the environment's proxy cannot be used \(.*gopher"):
        client("http://127.0.0.1:9").request("/v1/models")


# The served model -----------------------------------------------------------------------------------------------------


def test_unreachable_server_is_named_with_its_field(pauses: list[float]) -> None:
    with pytest.raises(
        UserError, match=r"models\.teacher: http://127\.0\.0\.1:9/v1 returned no valid response in 3 tries"
    ):
        connect("http://127.0.0.1:9/v1", "models.teacher", QUICK)


def test_model_name_after_address_selects_among_several() -> None:
    listed = {"data": [{"id": "a"}, {"id": "b", "max_model_len": 9}]}
    with serving(lambda path, body: listed) as there:
        assert connect(f"{there.url}#b", "models.teacher", QUICK).max_tokens == 9
        for name in (there.url, f"{there.url}#c"):
            with pytest.raises(UserError, match="has the models a, b; name one"):
                connect(name, "models.teacher", QUICK)


def test_long_list_of_served_models_is_cut_in_message() -> None:
    with serving(lambda path, body: {"data": [{"id": f"model-{number}"} for number in range(10_000)]}) as there:
        with pytest.raises(UserError, match="has the models model-0, model-1, ") as refusal:
            connect(there.url, "models.teacher", QUICK)
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("key", ["id", "root"])
def test_lone_surrogate_in_served_model_is_no_error(key: str) -> None:
    with serving(lambda path, body: {"data": [{"id": "a", key: "\ud800"}]}) as there:
        served = connect(there.url, "models.teacher", QUICK)
    assert served.name == ("\ud800" if key == "id" else "a") and len(served.fingerprint) == 16


def test_served_model_fingerprint_is_its_name_and_root_not_address() -> None:
    fingerprints = []
    for root in ("x", "x", "y"):
        with serving(lambda path, body, root=root: {"data": [{"id": "a", "root": root}]}) as there:  # type: ignore[misc]
            fingerprints.append(connect(there.url, "models.teacher", QUICK).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert fingerprints[0] == "3b70405c9b75078a"  # run directories of earlier versions hold it
