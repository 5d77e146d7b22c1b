"""HTTP server for tests that answers like a vLLM server from a local policy, or with injected failures."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from headwater.config.stage import Sampling
from headwater.models.policy import Policy
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.scoring import distributions_of
from headwater.types import Rollout

Answers = Callable[[str, dict[str, Any] | None], Any]


@dataclass
class Endpoint:
    """A server on the loopback. `answer` returns a JSON value or bytes, (status, value), or (status, value, headers)."""

    answer: Answers
    requests: list[tuple[str, Any]] = field(default_factory=list)
    authorization: list[str | None] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(answer: Answers) -> Iterator[Endpoint]:
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        def _speak(self, body: Any) -> None:
            endpoint.requests.append((self.path, body))
            endpoint.authorization.append(self.headers["Authorization"])
            answer = endpoint.answer(self.path, body)
            status, value, *more = answer if isinstance(answer, tuple) else (200, answer)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Length": str(len(data)), **(more[0] if more else {})}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._speak(None)

        def do_POST(self) -> None:
            self._speak(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # with the default of 5, connections of several ranks at once would be refused

    server = Server(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # clients that disconnect
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Answering:
    """Answers of a vLLM server, computed from a local policy: prompt_logprobs, samples, ids of texts and chats."""

    policy: Policy
    most: int = 20
    longest: int = 256
    shifted: bool = False
    """Whether its tokenizer gives different ids from the policy's."""
    gone: bool = False
    scale_out: bool = True
    """Whether it scores candidates (vLLM's --enable-scale-out)."""

    def __call__(self, path: str, body: dict[str, Any] | None) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "teacher", "root": "somewhere", "max_model_len": self.longest}]}
        assert body is not None
        if path == "/tokenize":
            text = body.get("prompt")
            if text is None:
                text = self.policy.tokenizer.apply_chat_template(
                    body["messages"], tokenize=False, add_generation_prompt=True, **body["chat_template_kwargs"]
                )
            ids = self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"tokens": [token + 1 for token in ids] if self.shifted else ids}
        if path == "/inference/v1/generate":
            return self._candidates(body) if self.scale_out else (404, {"detail": "Not Found"})
        top_k = body.get("prompt_logprobs")
        if top_k is not None and top_k > self.most:
            message = f"Requested prompt logprobs of {top_k}, which is greater than max allowed: {self.most}"
            return 400, {"error": {"message": message, "type": "BadRequestError"}}
        many = isinstance(body["prompt"][0], list)
        prompts = body["prompt"] if many else [body["prompt"]]
        made = [self._scored(ids, top_k) if top_k is not None else self._sampled(ids, body) for ids in prompts]
        return {"choices": [{"index": index, **choice} for index, choice in enumerate(made)][::-1]}  # out of order

    def _candidates(self, body: dict[str, Any]) -> Any:
        """Log-probs of the ids of each row: row i scores token start + i + 1, and −1 scores −∞."""
        ids, sampling = body["token_ids"], body["sampling_params"]
        rows, start = sampling["prompt_logprob_token_ids"], sampling["prompt_logprob_start"]
        if len(rows) != len(ids) - 1 - start or max(map(len, rows)) > self.most:
            return 400, {"error": {"message": f"prompt_logprob_token_ids has {len(rows)} rows"}}
        chosen_NK = torch.tensor([row + [-1] * (max(map(len, rows)) - len(row)) for row in rows])
        scores_NK = self._logp(ids)[start:].gather(1, chosen_NK.clamp_min(0)).masked_fill(chosen_NK < 0, -torch.inf)
        data = io.BytesIO()
        np.save(data, scores_NK.numpy())
        k = sampling.get("prompt_logprobs")
        return {
            "choices": [{"index": 0, "token_ids": [ids[0]]}],
            "prompt_logprobs": None if k is None else self._scored(ids, k)["prompt_logprobs"],
            "prompt_token_id_logprobs": base64.b64encode(data.getvalue()).decode("ascii"),
        }

    def _logp(self, ids: list[int]) -> torch.Tensor:
        whole = Rollout("x", 0, tuple(ids[:1]), tuple(ids[1:]), (0.0,) * (len(ids) - 1), "length", "x")
        logp_NV: torch.Tensor = distributions_of(self.policy, [whole], 4096)[0].materialize().logp_NV
        return logp_NV

    def _scored(self, ids: list[int], k: int) -> dict[str, Any]:
        logp_NV = self._logp(ids)
        positions: list[Any] = [None]
        for row_V, token in zip(logp_NV, ids[1:], strict=True):
            kept = {*row_V.topk(min(k, len(row_V))).indices.tolist(), token}
            positions.append(
                {str(token): {"logprob": row_V[token].item(), "rank": 1, "decoded_token": "?"} for token in kept}
            )
        return {"prompt_token_ids": ids, "prompt_logprobs": positions, "finish_reason": "length"}

    def _sampled(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        sampling = Sampling(max_tokens=body["max_tokens"], temperature=body["temperature"])
        rollout = TorchSampler(self.policy).sample(requests_for([("x", tuple(ids))], 1, body["seed"]), sampling)[0]
        return {
            "token_ids": list(rollout.completion_ids),
            "logprobs": {"token_logprobs": list(rollout.sampler_logp)},
            "finish_reason": rollout.finish,
        }
