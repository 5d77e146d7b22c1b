"""A real `vllm serve` on the loopback as the teacher: scores, samples, ids, refusals, and a whole run with its preflight."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headwater.config.compute import Server
from headwater.config.stage import Sampling
from headwater.errors import UserError
from headwater.losses.materialized import TopK
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.tokenizer import refuse_different_tokens
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.teachers.cache import read_cache
from headwater.teachers.scoring import distributions_of, logp_of
from headwater.teachers.served_teacher import ServedTeacher
from headwater.teachers.server_client import ServedTokenizer, connect
from runs import free_port, node, rows, temporary, tiny
from tiny import CPU, MODELS, PROMPTS

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: `make test-engines` runs these"
    ),
]
START_SECONDS, MOST = 240, 20
FOLDER = ModelFolder.open("pocket:qwen3-teacher", "models.teacher").path


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port, log_path = free_port(), temporary() / "serve.log"
    command = (
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", FOLDER, "--served-model-name", "teacher",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256",
        "--max-logprobs", str(MOST), "--max-num-seqs", "64",
    )  # fmt: skip
    quiet = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log_path.read_text(errors="replace")[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1.0)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def here() -> Policy:
    return load_policy(ModelFolder.open(FOLDER, "models.teacher"), LoadOptions(MODELS, CPU, frozen=True))


def served(url: str, here: Policy, top_k: int) -> ServedTeacher:
    served_model = connect(url, "models.teacher", Server(batch_tokens=512))
    return ServedTeacher(served_model, here.tokenizer, here.vocabulary, here.stop_ids, CPU, top_k)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("k", [1, 8, MOST])
def test_served_vllm_scores_equal_teacher(url: str, here: Policy, k: int) -> None:
    requests = requests_for([(str(index), prompt) for index, prompt in enumerate(PROMPTS)], 8, "scores")
    rollouts = TorchSampler(here).sample(requests, Sampling(max_tokens=32))
    exact = [distribution.materialize() for distribution in distributions_of(here, rollouts, 4096)]
    for ours, served_scores in zip(exact, served(url, here, k).distributions(rollouts, 4096), strict=True):
        assert isinstance(served_scores, TopK) and served_scores.ids_NK.shape[1] == k
        # Log-probs of the ids that the server returned; ids of equal log-prob may come in either order.
        torch.testing.assert_close(
            ours.logp_NV.gather(1, served_scores.ids_NK), served_scores.logp_NK, atol=1e-3, rtol=0.0
        )
        torch.testing.assert_close(ours.top_k(k).logp_NK, served_scores.logp_NK, atol=1e-3, rtol=0.0)


@pytest.mark.timeout(400)
def test_served_vllm_top_k_zero_scores_sampled_tokens(url: str, here: Policy) -> None:
    rollouts = TorchSampler(here).sample(requests_for([("a", PROMPTS[0])], 8, "alone"), Sampling(max_tokens=32))
    for distribution, rollout, logp in zip(
        served(url, here, 0).distributions(rollouts, 4096), rollouts, logp_of(here, rollouts, 4096), strict=True
    ):
        known = distribution.materialize().token_logp(torch.tensor(rollout.completion_ids))
        torch.testing.assert_close(known, logp, atol=1e-3, rtol=0.0)


@pytest.mark.timeout(400)
def test_served_vllm_tokenizer_and_chat_template_give_our_ids(url: str, here: Policy) -> None:
    served_tokenizer = ServedTokenizer(connect(url, "models.teacher", Server()))
    refuse_different_tokens(here.tokenizer, served_tokenizer, ("models.student", "models.teacher"))
    turns = [{"role": "user", "content": "17+45"}]
    text = here.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert served_tokenizer.chat(turns, thinking=False) == here.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.timeout(400)
def test_served_vllm_samples_have_teacher_log_probs_and_follow_seeds(url: str, here: Policy) -> None:
    requests = requests_for([(str(index), prompt) for index, prompt in enumerate(PROMPTS)], 4, "samples")
    teacher = served(url, here, 4)
    rollouts, again = (teacher.sample(requests, Sampling(max_tokens=32)) for _ in range(2))
    assert [rollout.completion_ids for rollout in rollouts] == [rollout.completion_ids for rollout in again]
    drawn = torch.tensor([logp for rollout in rollouts for logp in rollout.sampler_logp])
    torch.testing.assert_close(drawn, torch.cat(logp_of(here, rollouts, 4096)), atol=1e-3, rtol=0.0)
    assert all((rollout.completion_ids[-1] in here.stop_ids) == (rollout.finish == "stop") for rollout in rollouts)


@pytest.mark.timeout(400)
def test_served_vllm_refuses_top_k_above_its_limit_with_its_message(url: str, here: Policy) -> None:
    rollouts = TorchSampler(here).sample(requests_for([("a", PROMPTS[0])], 1, "many"), Sampling(max_tokens=4))
    with pytest.raises(UserError, match=r"models\.teacher: http.* refuses .*max allowed: 20"):
        served(url, here, MOST + 1).distributions(rollouts, 4096)


@pytest.mark.timeout(400)
def test_recipe_with_served_vllm_teacher_runs_with_preflight(url: str, here: Policy, tmp_path: Path) -> None:
    changes = (
        "stages.warmup.dense.top_k=16",
        "stages.opd.dense.top_k=16",
        "stages.opd.steps=4",
        "conditions.problems=4",
    )
    result = tiny(
        "run", tmp_path / "out", "--arm", "raw_teacher", changes=(*changes, f"models.teacher={url}"), whole=True
    )
    assert result.code == 0, result.err
    # The cache has the server's samples and, for each token, the teacher's log-probs in float16.
    cached = read_cache(node(tmp_path / "out", "raw_teacher", "teacher_rollouts") / "cache")
    exact = distributions_of(here, [row.rollout for row in cached], 4096)
    for row, whole in zip(cached, exact, strict=True):
        assert isinstance(row.teacher, TopK) and row.teacher.ids_NK.shape[1] == 16
        expected = whole.materialize().logp_NV.gather(1, row.teacher.ids_NK.long())
        torch.testing.assert_close(row.teacher.logp_NK, expected, atol=0.02, rtol=0.0)
    assert len(rows(node(tmp_path / "out", "raw_teacher", "opd") / "metrics.jsonl")) == 4
