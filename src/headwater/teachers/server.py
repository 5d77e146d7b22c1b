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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from headwater import seeds
from headwater.config import recipe as config
from headwater.config.stage import Sampling
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import TrainingStoppedError, UserError
from headwater.losses.batch import Row
from headwater.losses.distributions import Distributions, TopK
from headwater.models.policy import Shape
from headwater.sampling.base import Arrived, Request
from headwater.types import Rollout

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a second try; they double from one to the next, up to the other."""
NO_SHAPE = Shape(0, 0, 0, 0, 0, 0, 0, tied=True)
"""A server's work is not ours to count: it adds no FLOPs and no memory here."""
SEEDS = 1 << 63
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
class Met:
    """What a server says of itself.

    name      what it calls its model
    longest   tokens of a sequence that it takes
    """

    server: Server
    name: str
    longest: int | None
    fingerprint: str


def is_served(name: str) -> bool:
    """Whether a recipe's model name is a server's address."""
    return name.startswith(("http://", "https://"))


def meet(name: str, field: str, settings: config.Server) -> Met:
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
    return Met(server, str(chosen["id"]), longest if isinstance(longest, int) else None, known)


@dataclass(frozen=True)
class ServedTokenizer:
    """The server's tokenizer as far as ids are compared: text -> ids."""

    met: Met

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


@dataclass(frozen=True)
class ServedTeacher:
    """A served teacher in the place of a frozen `Policy`.

    tokenizer   the student's: the ids are the same
    vocabulary  the student's columns; the server must not name a token beyond them
    stop_ids    end a completion, as do the server's own
    top_k       how many of the likeliest tokens it is asked for; 0 asks for the sampled token alone
    """

    met: Met
    tokenizer: Any
    vocabulary: int
    stop_ids: tuple[int, ...]
    device: torch.device
    top_k: int
    shape: Shape = NO_SHAPE
    ranks: ProcessGroup = SINGLE_PROCESS

    @property
    def fingerprint(self) -> str:
        return self.met.fingerprint

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        return 0.0

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
        """The k likeliest tokens before every completion token, or the sampled one alone; asked part by part, side by side."""
        parts = cut(rollouts, min(tokens, self.met.server.settings.batch_tokens))
        with ThreadPoolExecutor(self.met.server.settings.concurrency) as threads:
            found = list(threads.map(self._scored, parts))
        return [one for part in found for one in part]

    def _scored(self, rollouts: Sequence[Rollout]) -> list[Distributions]:
        sequences = [[*one.prompt_ids, *one.completion_ids] for one in rollouts]
        body = {
            "model": self.met.name,
            "prompt": sequences,
            "max_tokens": 1,  # a server makes at least one token; it is not looked at
            "temperature": 0.0,
            "prompt_logprobs": self.top_k,
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        choices = self._choices(body, len(rollouts))
        for choice, sequence in zip(choices, sequences, strict=True):
            if choice.get("prompt_token_ids", sequence) != sequence:
                raise self._unfit("answers for other token ids than it was sent")
        return [self._read(choice, one) for choice, one in zip(choices, rollouts, strict=True)]

    def _choices(self, body: Answer, count: int) -> list[Answer]:
        found = self.met.server.ask("/v1/completions", body).get("choices")
        if not isinstance(found, list) or len(found) != count or not all(isinstance(one, dict) for one in found):
            raise self._unfit(f"gives no {count} choices for {count} prompts")
        return sorted(found, key=lambda one: one.get("index", 0))

    def _read(self, choice: Answer, rollout: Rollout) -> TopK:
        listed = choice.get("prompt_logprobs")
        start, stop = len(rollout.prompt_ids), len(rollout.prompt_ids) + len(rollout.completion_ids)
        if not isinstance(listed, list) or len(listed) != stop:
            raise self._unfit("gives no prompt_logprobs, which scoring is made of; serve the model with vLLM")
        width = min(self.top_k, self.vocabulary) or 1
        kept = [
            self._likeliest(known, token, width)
            for known, token in zip(listed[start:stop], rollout.completion_ids, strict=True)
        ]
        ids = torch.tensor([[one[0] for one in row] for row in kept], dtype=torch.long, device=self.device)
        logp = torch.tensor([[one[1] for one in row] for row in kept], dtype=torch.float32, device=self.device)
        return TopK(ids, logp)

    def _likeliest(self, known: Any, token: int, width: int) -> list[tuple[int, float]]:
        """The `width` likeliest (id, log-prob) at a position; the server adds the sampled token where it is none of them."""
        try:
            found = {int(name): float(one["logprob"]) for name, one in known.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._unfit("gives prompt_logprobs in another form than vLLM's") from None
        if max(found, default=0) >= self.vocabulary:
            raise self._unfit(
                f"names token {max(found)}, beyond the student's vocabulary of {self.vocabulary}: it is another's"
            )
        if token not in found:
            raise self._unfit(f"gives no log-prob for token {token}, which stands there")
        if not self.top_k:
            return [(token, found[token])]
        if len(found) > width:
            found.pop(token)
        if len(found) != width:
            raise self._unfit(f"gives {len(found)} log-probs at a position where {width} were asked for")
        return sorted(found.items(), key=lambda one: (-one[1], one[0]))

    def _unfit(self, what: str) -> UserError:
        return UserError(f"{self.met.server.field}: {self.met.server.url} {what}")

    # Sampling -------------------------------------------------------------------------------------------------------

    def sample(self, requests: Sequence[Request], sampling: Sampling, arrived: Arrived | None = None) -> list[Rollout]:
        """Completions, one call each, so that each has a seed of its own; as `Sampler.sample`."""
        found: dict[int, Rollout] = {}
        with ThreadPoolExecutor(self.met.server.settings.concurrency) as threads:
            waiting = {threads.submit(self._one, one, sampling): index for index, one in enumerate(requests)}
            try:
                for done in as_completed(waiting):
                    found[waiting[done]] = done.result()
                    if arrived is not None:
                        arrived([done.result()])
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return [found[index] for index in range(len(requests))]

    def _one(self, request: Request, sampling: Sampling) -> Rollout:
        body = {
            "model": self.met.name,
            "prompt": list(request.prompt_ids),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,  # a server may have defaults of its own
            "seed": seeds.seed_of(*request.draw) % SEEDS,
            "logprobs": 0,
            "stop_token_ids": list(self.stop_ids),
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        choice = self._choices(body, 1)[0]
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
        drawn = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(ids, list) or not isinstance(drawn, list) or len(ids) != len(drawn) or not ids:
            raise self._unfit("gives no token ids or log-probs for what it samples; serve the model with vLLM")
        if max(ids) >= self.vocabulary:
            raise self._unfit(f"samples token {max(ids)}, beyond the student's vocabulary of {self.vocabulary}")
        return Rollout(
            problem_id=request.problem_id,
            sample=request.sample,
            prompt_ids=request.prompt_ids,
            completion_ids=tuple(ids),
            sampler_logp=tuple(float(one) for one in drawn),
            finish="stop" if choice.get("finish_reason") == "stop" else "length",
            sampler=self.fingerprint,
            temperature=sampling.temperature,
        )


def cut(rollouts: Sequence[Rollout], tokens: int) -> list[list[Rollout]]:
    """Consecutive parts of at most so many tokens; a longer rollout stands alone.

    Example: rollouts of 3, 4 and 9 tokens with 8 are cut (3, 4), (9).
    """
    parts: list[list[Rollout]] = []
    room = 0
    for one in rollouts:
        size = len(one.prompt_ids) + len(one.completion_ids)
        if not parts or size > room:
            parts.append([])
            room = tokens
        parts[-1].append(one)
        room -= size
    return parts


def try_out(teacher: ServedTeacher, ids: Sequence[int]) -> None:
    """Score a short sequence as a stage would. Raises HeadwaterError that says what the server cannot do."""
    probe = Rollout("probe", 0, tuple(ids[:1]), tuple(ids[1:]), (0.0,) * (len(ids) - 1), "length", "probe")
    teacher.distributions([probe], len(ids))
