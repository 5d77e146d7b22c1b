"""HTTP client for an OpenAI-compatible vLLM server: retries, the served model, and its tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx2

from headwater.config.compute import Server
from headwater.errors import TrainingStoppedError, UserError, error_text

FIRST_PAUSE, MAX_PAUSE = 0.5, 30.0
"""Seconds before the first retry, and the largest pause; pauses double from one retry to the next."""
MAX_MESSAGE_CHARS = 300
MAX_ERROR_BYTES = 1 << 16
BASE_ENTRIES, ENTRY_BYTES, ENTRY_VALUES = 4096, 256, 8
"""Bounds of an answer: bytes and JSON values for each entry (token with log-prob) that a request asks for, and for so many more.
vLLM writes about 90 bytes and 4 values. Parsed, an answer within both takes at most 2.5 KiB an entry, within the first alone 8."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""A JSON string, or one that does not end: it takes time proportional to the text."""

Answer = dict[str, Any]


@dataclass(frozen=True)
class ServerClient:
    """Client of one server; thread-safe.

    field  the recipe's field that names the server, for error messages
    """

    field: str
    url: str
    settings: Server

    @cached_property
    def headers(self) -> dict[str, str]:
        """Raises UserError if the key's environment variable is missing or is no header value."""
        name = self.settings.key_env
        key = None if name is None else os.environ.get(name)
        if name is not None and not key:
            raise UserError(f"compute.server.key_env: the environment has no variable {name}")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise UserError(
                f"compute.server.key_env: {name} holds characters that an HTTP header cannot (a line break?)"
            )
        # Uncompressed answers, so that the limits on their size hold for what is read into memory.
        plain = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        return {**plain, **({} if key is None else {"Authorization": f"Bearer {key}"})}

    @cached_property
    def http(self) -> httpx2.Client:
        # A connection per request: one kept alive can be closed by the server just as it is used again. Redirects are not
        # followed, so neither prompts nor the key go to another host than the recipe's.
        try:
            return httpx2.Client(
                headers=self.headers,
                timeout=self.settings.seconds,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
                follow_redirects=False,
            )
        except (ValueError, ImportError) as error:
            raise UserError(
                f"{self.field}: the environment's proxy cannot be used ({error_text(error, MAX_MESSAGE_CHARS)})"
            ) from None

    @property
    def root(self) -> str:
        """The address without the /v1 of the OpenAI-compatible part."""
        return self.url.rstrip("/").removesuffix("/v1")

    def request(self, path: str, body: Answer | None = None, entries: int = 0) -> Answer:
        """GET, or POST a JSON body; retried with growing pauses on timeouts, 408, 429, 5xx and unusable answers.

        entries  tokens that the request asks for, with alternatives, which bounds the size of the answer

        Raises UserError if the server refuses, TrainingStoppedError when the retries are used up: the run can be resumed.
        """
        reason = ""
        for attempt in range(self.settings.retries + 1):
            if attempt:
                time.sleep(min(MAX_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)))
            try:
                return self._request_once(path, body, entries + BASE_ENTRIES)
            except _RetryableError as error:
                reason = str(error)
        tries = "1 try" if self.settings.retries == 0 else f"{self.settings.retries + 1} tries"
        raise TrainingStoppedError(
            f"{self.field}: {self.url} returned no valid response in {tries} ({reason}); check the server and run the same command "
            "again, which resumes"
        )

    def _request_once(self, path: str, body: Answer | None, entries: int) -> Answer:
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        deadline, too_late = _Deadline(), f"no complete response within {self.settings.seconds:g} s"
        try:
            with (
                deadline.limit(self.settings.seconds),
                self.http.stream(
                    method, f"{self.root}{path}", content=content, extensions={"trace": deadline.trace}
                ) as response,
            ):
                if not response.is_success:
                    self._raise_for_status(response)
                text = _read(response, entries * ENTRY_BYTES + 1)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            late = deadline.over or isinstance(error, httpx2.TimeoutException)
            raise _RetryableError(too_late if late else error_text(error, MAX_MESSAGE_CHARS)) from None
        if deadline.over:  # an answer without a length ends where its connection does
            raise _RetryableError(too_late)
        _refuse_large(text, entries)
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            raise _RetryableError("its answer is not JSON") from None
        if not isinstance(answer, dict):
            raise _RetryableError(f"its answer is not a JSON object but {type(answer).__name__}")
        return answer

    def _raise_for_status(self, response: httpx2.Response) -> None:
        status = response.status_code
        if response.has_redirect_location:
            message = f"it redirects to {error_text(response.headers['location'], MAX_MESSAGE_CHARS)}; name that address in the recipe"
        else:
            message = _error_message(response)
        if status in (408, 429) or status >= 500:
            raise _RetryableError(f"status {status}: {message}")
        raise UserError(f"{self.field}: {self.url} refuses (status {status}: {message})")


class _RetryableError(Exception):
    """A failure that another try may not have."""


class _Deadline:
    """Bound on the time of a whole request: httpx limits the silence between two bytes only."""

    def __init__(self) -> None:
        self.over = False
        self._sockets: list[socket.socket] = []

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Shut the connection down after this time, which ends a read or write that another thread waits in."""
        timer = threading.Timer(seconds, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Remember the request's connection (httpcore's extension `trace`)."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._sockets.append(info["return_value"].get_extra_info("socket"))
            if self.over:
                self._end()

    def _end(self) -> None:
        self.over = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _read(response: httpx2.Response, limit: int) -> bytes:
    """The body up to a number of bytes."""
    data = bytearray()
    for chunk in response.iter_bytes():
        data += chunk
        if len(data) >= limit:
            break
    return bytes(data[:limit])


def _refuse_large(text: bytes, entries: int) -> None:
    """Raises _RetryableError for an answer that has more bytes or JSON values than this number of entries takes."""
    most_bytes, most_values = entries * ENTRY_BYTES, entries * ENTRY_VALUES
    if len(text) > most_bytes:
        raise _RetryableError(f"its answer has over {most_bytes:,} bytes, more than the request asked for")
    if _separators(text) > most_values and _separators(_STRING.sub(b"", text)) > most_values:
        raise _RetryableError(f"its answer has over {most_values:,} values, more than the request asked for")


def _separators(text: bytes) -> int:
    """A bound on the number of JSON values."""
    return sum(map(text.count, b",[{"))


def _error_message(response: httpx2.Response) -> str:
    """The message in vLLM's error object, or else the text of the answer."""
    try:
        text = _read(response, MAX_ERROR_BYTES).decode("utf-8", "replace")
    except httpx2.HTTPError:
        return response.reason_phrase
    try:
        return error_text(str(json.loads(text)["error"]["message"]), MAX_MESSAGE_CHARS)
    except (ValueError, KeyError, TypeError, RecursionError):
        return error_text(text or response.reason_phrase, MAX_MESSAGE_CHARS)


@dataclass(frozen=True)
class ServedModel:
    """A model on a server, as the server describes it.

    name        the id under which it is served
    max_tokens  tokens of the longest sequence that it takes; None if the server does not say
    """

    client: ServerClient
    name: str
    max_tokens: int | None
    fingerprint: str


def is_served(name: str) -> bool:
    """Whether a recipe's model name is a server's address."""
    return name.startswith(("http://", "https://"))


def connect(name: str, field: str, settings: Server) -> ServedModel:
    """Ask a server which models it has and choose one; `#MODEL` after the address chooses one of several.

    Raises UserError that names the field if the server cannot be reached or does not have the model.
    """
    url, _, wanted = name.partition("#")
    client = ServerClient(field, url, settings)
    try:
        listed = client.request("/v1/models").get("data")
    except TrainingStoppedError as error:
        raise UserError(str(error)) from None
    entries = listed if isinstance(listed, list) else []
    models = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    names = [model["id"] for model in models]
    if not names or (wanted and wanted not in names) or (not wanted and len(names) > 1):
        raise UserError(
            f"{field}: {url} has {error_text('the models ' + ', '.join(names), MAX_MESSAGE_CHARS) if names else 'no model'}; "
            f"name one as {url}#MODEL"
        )
    chosen = next(model for model in models if not wanted or model["id"] == wanted)
    max_tokens = chosen.get("max_model_len")
    # Without the address, which may change from run to run while the served model stays the same.
    identity = f"served:{chosen['id']}:{chosen.get('root')}"
    fingerprint = hashlib.sha256(identity.encode(errors="backslashreplace")).hexdigest()[:16]
    known = isinstance(max_tokens, int) and max_tokens > 0
    return ServedModel(client, chosen["id"], max_tokens if known else None, fingerprint)


def is_token_id(value: object) -> bool:
    """Whether a JSON value is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class ServedTokenizer:
    """The server's tokenizer, callable like a local one: text -> {"input_ids": ids}."""

    model: ServedModel

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        body = {"model": self.model.name, "prompt": text, "add_special_tokens": add_special_tokens}
        return {"input_ids": self._tokenize(body)}

    def chat(self, messages: list[dict[str, str]], thinking: bool) -> list[int] | None:
        """Token ids of a chat including the generation prompt; None if the model has no chat template."""
        body = {
            "model": self.model.name,
            "messages": messages,
            "add_generation_prompt": True,
            "chat_template_kwargs": {"enable_thinking": thinking},
        }
        try:
            return self._tokenize(body)
        except UserError:
            return None

    def _tokenize(self, body: Answer) -> list[int]:
        client = self.model.client
        ids = client.request("/tokenize", body, len(json.dumps(body))).get("tokens")
        if not isinstance(ids, list) or not all(map(is_token_id, ids)):
            raise TrainingStoppedError(
                f"{client.field}: {client.url} gives no token ids for a text (/tokenize); serve it with vLLM"
            )
        return ids
