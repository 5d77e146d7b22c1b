"""A teacher behind a vLLM server: token ids out, the top-k tokens and their log-probs back.

Neither its weights nor full distributions are in this process. The doctor compares the server's tokenizer with the student's before a
run, and every scored sequence's ids are compared with those that were sent.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headwater.config.dense import Candidates
from headwater.config.stage import Sampling
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import TrainingStoppedError, UserError, one_line
from headwater.losses.batch import Row
from headwater.losses.distributions import Distributions
from headwater.losses.materialized import TopK
from headwater.models.shape import Shape
from headwater.sampling.base import OnFinished, Request
from headwater.teachers.server_client import Answer, ServedModel, is_token_id
from headwater.types import IdsNK, Rollout

NO_SHAPE = Shape(
    layers=0, hidden=0, vocabulary=0, heads=0, kv_heads=0, key_dim=0, value_dim=0, attention_layers=0, kv_cache_numbers=0,
    intermediate=0, parameters=0, matrix_parameters=0, token_parameters=0,
)  # fmt: skip
"""Shape of a served model: it costs no FLOPs and no memory on this machine."""
ROUNDING = 1e-3
"""Excess over 0 of a log-prob, and over 1 of the probabilities at a position, that is taken for rounding."""
LEAST_LOGP = -1e30
NO_PROBABILITY = -9999.0
"""vLLM writes this for a probability of 0, except in `prompt_token_id_logprobs`, where it is −∞."""


@dataclass(frozen=True)
class ServedTeacher:
    """A served model in the place of a frozen `Policy`.

    tokenizer   the student's; its ids are the same
    vocabulary  the student's output width; the server must not name a token beyond it
    stop_ids    end a completion, as do the server's own
    top_k       most likely tokens requested per position; 0 requests the sampled token only
    candidates  who chooses the tokens of rollouts that have candidates of the student; `student` and `both` need a server for which
                `refuses_candidates` is None
    """

    model: ServedModel
    tokenizer: Any
    vocabulary: int
    stop_ids: tuple[int, ...]
    device: torch.device
    top_k: int
    shape: Shape = NO_SHAPE
    ranks: ProcessGroup = SINGLE_PROCESS
    candidates: Candidates = "teacher"

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint

    def pass_flops(self, rows: Sequence[Row], passes: Literal[1, 3] = 1) -> float:
        return 0.0

    def distributions(self, rollouts: Sequence[Rollout], tokens: int) -> list[Distributions]:
        """The top-k tokens before every completion token, or the sampled one only, in concurrent batched calls.

        Candidates of the student are scored too, one rollout a call, where they are requested and the rollouts have some.
        """
        settings = self.model.client.settings
        with ThreadPoolExecutor(settings.concurrency) as threads:
            if self.candidates != "teacher" and all(rollout.candidates is not None for rollout in rollouts):
                return list(threads.map(self._score_candidates, rollouts))
            scored = list(threads.map(self._score, batched(rollouts, min(tokens, settings.batch_tokens))))
        return [distributions for batch in scored for distributions in batch]

    def _score_candidates(self, rollout: Rollout) -> TopK:
        assert rollout.candidates is not None
        own, sequence = self.candidates == "both", [*rollout.prompt_ids, *rollout.completion_ids]
        answer = candidate_scores(self.model, sequence, rollout.candidates, self.top_k if own else None)
        logp_NK = self._matrix(answer, rollout.candidates.shape).to(self.device)
        ids_NK = torch.from_numpy(rollout.candidates).long().to(self.device)
        return union(self._top_k(answer, rollout), ids_NK, logp_NK) if own else TopK(ids_NK, logp_NK)

    def _matrix(self, answer: Answer, shape: tuple[int, ...]) -> Tensor:
        """The log-probs (N, K) of candidates: vLLM sends a float32 array as .npy in base64."""
        try:
            data = io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"], validate=True))
            np.lib.format.read_magic(data)
            # The header first, so that none makes it allocate more than was sent.
            header = np.lib.format.read_array_header_1_0(data)
            logp_NK = np.frombuffer(data.read(), np.float32).reshape(shape)
        except (KeyError, TypeError, ValueError):
            raise self._error("gives no prompt_token_id_logprobs for the student's candidates") from None
        if header != (shape, False, np.dtype(np.float32)) or not (logp_NK <= ROUNDING).all():
            raise self._error(f"gives prompt_token_id_logprobs that are not {shape[0]} × {shape[1]} log-probs")
        if (mass := float(np.exp(logp_NK).sum(axis=1).max(initial=0.0))) > 1.0 + ROUNDING:
            raise self._error(f"gives candidates at one position probabilities that sum to {mass:.4g}, over 1")
        return torch.from_numpy(logp_NK.clip(NO_PROBABILITY, 0.0))

    def _score(self, rollouts: Sequence[Rollout]) -> list[Distributions]:
        sequences = [[*rollout.prompt_ids, *rollout.completion_ids] for rollout in rollouts]
        body = {
            "model": self.model.name,
            "prompt": sequences,
            "max_tokens": 1,  # the least that a server generates; the token is ignored
            "temperature": 0.0,
            "prompt_logprobs": self.top_k,
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        choices = self._choices(body, len(rollouts), sum(map(len, sequences)) * (self.top_k + 1))
        for choice, sequence in zip(choices, sequences, strict=True):
            if choice.get("prompt_token_ids", sequence) != sequence:
                raise self._error("answers for other token ids than it was sent")
        return [self._top_k(choice, rollout) for choice, rollout in zip(choices, rollouts, strict=True)]

    def _choices(self, body: Answer, count: int, entries: int) -> list[Answer]:
        choices: Any = self.model.client.request("/v1/completions", body, entries).get("choices")
        are_objects = isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)
        if not are_objects or len(choices) != count:
            raise self._error(f"does not give {count} choices for {count} prompts")
        places = [choice.get("index", place) for place, choice in enumerate(choices)]
        if not all(map(is_token_id, places)) or sorted(places) != list(range(count)):
            raise self._error(f"does not number its {count} choices from 0 to {count - 1}")
        return [choices[places.index(place)] for place in range(count)]

    def _top_k(self, choice: Answer, rollout: Rollout) -> TopK:
        positions = choice.get("prompt_logprobs")
        start, stop = len(rollout.prompt_ids), rollout.length
        if not isinstance(positions, list) or len(positions) != stop:
            raise self._error("gives no prompt_logprobs, which scoring needs; serve the model with vLLM")
        width = min(self.top_k, self.vocabulary) or 1
        kept = [
            self._top_k_at(position, token, width)
            for position, token in zip(positions[start:stop], rollout.completion_ids, strict=True)
        ]
        ids = torch.tensor([[token for token, _ in row] for row in kept], dtype=torch.long, device=self.device)
        logp = torch.tensor([[value for _, value in row] for row in kept], dtype=torch.float32, device=self.device)
        return TopK(ids, logp)

    def _top_k_at(self, position: Any, token: int, width: int) -> list[tuple[int, float]]:
        """The `width` most likely (id, log-prob); the server adds the sampled token if it is none of them."""
        try:
            logp = {int(name): self._logp(entry["logprob"]) for name, entry in position.items()}
            if list(map(str, logp)) != list(position):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._error("gives prompt_logprobs in another form than vLLM's") from None
        self._refuse_ids(logp)
        if token not in logp:
            raise self._error(f"gives no log-prob for token {token}, which was sampled there")
        mass = sum(map(math.exp, logp.values()))
        if mass > 1.0 + ROUNDING:
            raise self._error(f"gives tokens at one position probabilities that sum to {mass:.4g}, over 1")
        if not self.top_k:
            return [(token, logp[token])]
        if len(logp) > width:
            logp.pop(token)
        if len(logp) != width:
            raise self._error(f"gives {len(logp)} log-probs at a position where {width} were requested")
        return sorted(logp.items(), key=lambda item: (-item[1], item[0]))

    def _logp(self, value: Any) -> float:
        """A log-prob of an answer, 0 where rounding has put it above."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not LEAST_LOGP <= value <= ROUNDING:
            raise self._error(f"gives {value!r:.40} as a log-prob, which must be a number of at most 0")
        return min(float(value), 0.0)

    def _refuse_ids(self, ids: Collection[int]) -> None:
        beyond = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if beyond is not None:
            raise self._error(
                f"names token {beyond!s:.20}, beyond the student's vocabulary of {self.vocabulary}: the vocabularies differ"
            )

    def _error(self, message: str) -> TrainingStoppedError:
        """An answer that cannot be used; the run can be resumed with a server that works."""
        return TrainingStoppedError(f"{self.model.client.field}: {self.model.client.url} {one_line(message)}")

    # Sampling -------------------------------------------------------------------------------------------------------

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        """`Sampler.sample`, with one call per completion, so that each has its own seed."""
        rollouts: dict[int, Rollout] = {}
        with ThreadPoolExecutor(self.model.client.settings.concurrency) as threads:
            futures = {threads.submit(self._complete, request, sampling): i for i, request in enumerate(requests)}
            try:
                for future in as_completed(futures):
                    rollouts[futures[future]] = future.result()
                    if on_finished is not None:
                        on_finished([future.result()])
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return [rollouts[index] for index in range(len(requests))]

    def _complete(self, request: Request, sampling: Sampling) -> Rollout:
        body = {
            "model": self.model.name,
            "prompt": list(request.prompt_ids),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,  # override the server's defaults
            "seed": request.vllm_seed,
            "logprobs": 0,
            "stop_token_ids": list(self.stop_ids),
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        # The text of a sampled token is in three fields.
        choice = self._choices(body, 1, len(request.prompt_ids) + 4 * sampling.max_tokens)[0]
        ids, logprobs, finish = choice.get("token_ids"), choice.get("logprobs"), choice.get("finish_reason")
        sampler_logp = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(ids, list) or not isinstance(sampler_logp, list) or len(ids) != len(sampler_logp) or not ids:
            raise self._error("gives no token ids or log-probs for its samples; serve the model with vLLM")
        if not all(map(is_token_id, ids)):
            raise self._error("gives samples whose token ids are not all whole numbers from 0 on")
        self._refuse_ids(ids)
        if len(ids) > sampling.max_tokens:
            raise self._error(f"samples {len(ids)} tokens where at most {sampling.max_tokens} were requested")
        if finish not in ("stop", "length"):
            raise self._error(f"ends a sample with finish_reason {finish!r:.40}, which is neither stop nor length")
        return request.rollout(tuple(ids), tuple(map(self._logp, sampler_logp)), finish == "stop", self, sampling)


def batched(rollouts: Sequence[Rollout], tokens: int) -> list[list[Rollout]]:
    """Split into consecutive batches of at most this many tokens; a longer rollout gets its own.

    Example: rollouts of 3, 4 and 9 tokens with a limit of 8 become (3, 4), (9).
    """
    batches: list[list[Rollout]] = []
    room = 0
    for rollout in rollouts:
        if not batches or rollout.length > room:
            batches.append([])
            room = tokens
        batches[-1].append(rollout)
        room -= rollout.length
    return batches


def candidate_scores(model: ServedModel, sequence: Sequence[int], ids_NK: IdsNK, top_k: int | None) -> Answer:
    """Ask vLLM for the log-probs of k ids at each of the last N tokens of a sequence (`prompt_logprob_token_ids`).

    top_k  also ask for the server's own most likely tokens (`prompt_logprobs`); None for the candidates alone

    The answer has `prompt_token_id_logprobs` and, if requested, `prompt_logprobs`.
    """
    sampling = {
        "max_tokens": 1,  # the least that a server generates; the token is ignored
        "temperature": 0.0,
        "detokenize": False,
        "prompt_logprob_token_ids": ids_NK.tolist(),
        "prompt_logprob_start": len(sequence) - len(ids_NK) - 1,  # row i scores token start + i + 1
    }
    body = {
        "model": model.name,
        "token_ids": list(sequence),
        "sampling_params": sampling | ({} if top_k is None else {"prompt_logprobs": top_k}),
    }
    return model.client.request("/inference/v1/generate", body, ids_NK.size + len(sequence) * ((top_k or 0) + 1))


NO_CANDIDATES = (
    "the server does not score the student's candidate tokens, so its own top k are compared (vLLM 0.32 and later does, with "
    "--enable-scale-out and VLLM_USE_V2_MODEL_RUNNER=1)"
)


def refuses_candidates(model: ServedModel) -> str | None:
    """Why a server does not score the student's candidates, in its own words; None if it does.

    vLLM has `prompt_logprob_token_ids` from 0.32 on, with --enable-scale-out and its second model runner.
    """
    try:
        answer = candidate_scores(model, [0, 0], np.zeros((1, 1), dtype=np.int32), None)
    except UserError as refusal:
        return str(refusal)
    return None if answer.get("prompt_token_id_logprobs") else f"{model.client.url} gives no prompt_token_id_logprobs"


def union(chosen: TopK, ids_NC: Tensor, logp_NC: Tensor) -> TopK:
    """Kept tokens (N, K) and C further ones, each token once; all others stay one event.

    Rows with fewer than K + C tokens are padded (`TopK.count_N`).

    Example: kept 5, 7 and further 7, 9 give 5, 7, 9 and one place of padding.
    """
    repeated_NC = (ids_NC[:, :, None] == chosen.ids_NK[:, None, :]).any(dim=-1)
    order_NC = repeated_NC.int().argsort(dim=1, stable=True)
    ids_NE = torch.cat([chosen.ids_NK, ids_NC.gather(1, order_NC)], dim=1)
    logp_NE = torch.cat([chosen.logp_NK, logp_NC.gather(1, order_NC)], dim=1)
    return TopK(ids_NE, logp_NE, chosen.ids_NK.shape[1] + (~repeated_NC).sum(dim=1))


def check_scoring(teacher: ServedTeacher, ids: Sequence[int]) -> None:
    """Score a short sequence as a stage would. Raises HeadwaterError that says what the server cannot do."""
    probe = Rollout("probe", 0, tuple(ids[:1]), tuple(ids[1:]), (0.0,) * (len(ids) - 1), "length", "probe")
    teacher.distributions([probe], len(ids))
