"""A teacher behind an OpenAI-compatible vLLM server: token ids go out, the k likeliest tokens and their log-probs come back.

No weights, no head and no full distribution of it are ever here. The server is held to the same ids: its tokenizer is asked
before the run, and what it answers to is compared with what was sent.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from headwater.config import recipe as config
from headwater.errors import TrainingStoppedError, UserError

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a second try; they double from one to the next, up to the other."""
SAID = 300
LONGEST_ANSWER, LONGEST_COMPLAINT = 2 << 30, 1 << 16
"""Bytes that are read of an answer, and of a refusal."""

Answer = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """One server, by the recipe's field that names it; safe to be asked from several threads."""

    field: str
    url: str
    settings: config.Server

    @cached_property
    def headers(self) -> dict[str, str]:
        name = self.settings.key_env
        key = None if name is None else os.environ.get(name)
        if name is not None and not key:
            raise UserError(f"compute.server.key_env: the environment has no variable {name}")
        return {"Content-Type": "application/json", **({} if key is None else {"Authorization": f"Bearer {key}"})}

    @property
    def root(self) -> str:
        """Without the /v1 under which the OpenAI-compatible part stands."""
        return self.url.rstrip("/").removesuffix("/v1")

    def ask(self, path: str, body: Answer | None = None) -> Answer:
        """What the server answers, asked again with growing pauses while it does not answer as it should.

        Raises UserError when it refuses, TrainingStoppedError when it stays away: the run can be gone on with later.
        """
        why = ""
        for attempt in range(self.settings.retries + 1):
            if attempt:
                time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))
            try:
                return self._once(path, body)
            except _UnusableError as error:
                why = str(error)
        tries = self.settings.retries + 1
        raise TrainingStoppedError(
            f"{self.field}: {self.url} gave no usable answer in {tries} tries ({why}); see to the server and run again, "
            "which goes on from here"
        )

    def _once(self, path: str, body: Answer | None) -> Answer:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.root}{path}", data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=self.settings.seconds) as found:
                text = found.read(LONGEST_ANSWER)
        except urllib.error.HTTPError as error:
            said = _complaint(error)
            if error.code in (408, 429) or error.code >= 500:
                raise _UnusableError(f"status {error.code}: {said}") from None
            raise UserError(f"{self.field}: {self.url} refuses (status {error.code}: {said})") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            raise _UnusableError(f"no answer within {self.settings.seconds:g} s" if late else _short(reason)) from None
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            raise _UnusableError("its answer is not JSON") from None
        if not isinstance(answer, dict):
            raise _UnusableError(f"its answer is not a JSON object but {type(answer).__name__}")
        return answer


class _UnusableError(Exception):
    """An answer that another try may mend."""


def _short(said: object) -> str:
    return " ".join(str(said).split())[:SAID] or type(said).__name__


def _complaint(error: urllib.error.HTTPError) -> str:
    """The sentence in vLLM's error object, or whatever text came."""
    try:
        text = error.read(LONGEST_COMPLAINT).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        return _short(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return _short(text)


@dataclass(frozen=True)
class ServedModel:
    """What a server says of itself.

    name        the id under which it serves the model
    max_tokens  tokens of the longest sequence it accepts
    """

    server: Server
    name: str
    max_tokens: int | None
    fingerprint: str


def is_served(name: str) -> bool:
    """Whether a recipe's model name is a server's address."""
    return name.startswith(("http://", "https://"))


def connect(name: str, field: str, settings: config.Server) -> ServedModel:
    """Ask a server which model it has; `#MODEL` after the address chooses one of several.

    Raises UserError that names the field when it cannot be reached, or the model is not there.
    """
    url, _, wanted = name.partition("#")
    server = Server(field, url, settings)
    try:
        listed = server.ask("/v1/models").get("data")
    except TrainingStoppedError as error:
        raise UserError(str(error)) from None
    models = [one for one in listed if isinstance(one, dict) and "id" in one] if isinstance(listed, list) else []
    names = [str(one["id"]) for one in models]
    if not names or (wanted and wanted not in names) or (not wanted and len(names) > 1):
        raise UserError(
            f"{field}: {url} has {'no model' if not names else 'the models ' + ', '.join(names)}; name one as {url}#MODEL"
        )
    chosen = next(one for one in models if not wanted or one["id"] == wanted)
    longest = chosen.get("max_model_len")
    # The address may change from run to run; what is served under which name is what decides outcomes.
    known = hashlib.sha256(f"served:{chosen['id']}:{chosen.get('root')}".encode()).hexdigest()[:16]
    return ServedModel(server, str(chosen["id"]), longest if isinstance(longest, int) else None, known)


@dataclass(frozen=True)
class ServedTokenizer:
    """The server's tokenizer as far as ids are compared: text -> ids."""

    met: ServedModel

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        body = {"model": self.met.name, "prompt": text, "add_special_tokens": add_special_tokens}
        return {"input_ids": ids_in(self.met.server.ask("/tokenize", body), self.met.server)}

    def chat(self, messages: list[dict[str, str]], thinking: bool) -> list[int] | None:
        """The ids of a chat up to where the model answers; None where its model has no chat template."""
        body = {
            "model": self.met.name,
            "messages": messages,
            "add_generation_prompt": True,
            "chat_template_kwargs": {"enable_thinking": thinking},
        }
        try:
            return ids_in(self.met.server.ask("/tokenize", body), self.met.server)
        except UserError:
            return None


def ids_in(answer: Answer, server: Server) -> list[int]:
    ids = answer.get("tokens")
    if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
        raise UserError(f"{server.field}: {server.url} gives no token ids for a text (/tokenize); serve it with vLLM")
    return ids
