"""Nothing is lost at the end of a stage: a failed save trains nothing again, and what is saved is what was trained."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from headwater.config.prompt import Prompt
from headwater.config.stage import Sampling
from headwater.data.labels import Labels
from headwater.models.prompts import Prompter
from headwater.runs import cache_node, train_node
from headwater.runs.display import NodeProgress
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.training import evaluate
from headwater.training.evaluate import sample_and_grade
from headwater.training.loop import StepResult
from headwater.types import Rollout, Verdict
from runs import assert_same, node, rows, temporary, tiny
from tiny import tiny_policy

ROOT = Path(__file__).parents[3]
ARM = ("--arm", "direct_grpo")


def student(path: Path, **generation: Any) -> Path:
    """A copy of the pocket student with further entries in its generation config."""
    folder = Path(shutil.copytree(ROOT / "src" / "headwater" / "pocket" / "qwen3-student", path))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | generation))
    return folder


def steps_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The training steps that are taken from here on."""
    taken: list[int] = []
    plain = train_node.train_steps

    def counted(*args: Any) -> Iterator[StepResult]:
        for result in plain(*args):
            taken.append(result.step)
            yield result

    monkeypatch.setattr(train_node, "train_steps", counted)
    return taken


@cache
def uninterrupted() -> Path:
    out = temporary() / "whole"
    assert tiny("run", out, *ARM).code == 0
    return out


def fails(error: Exception) -> Callable[..., None]:
    def save(*args: Any) -> None:
        raise error

    return save


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ValueError("GenerationConfig is invalid"), 1),
        (RuntimeError("shared tensors are not properly defined"), 1),
        (OSError(28, "No space left on device"), 4),
    ],
)
def test_rerun_after_failed_save_saves_without_training(
    failure: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(train_node, "save_policy", fails(failure))
        assert tiny("run", out, *ARM).code == code
    trained = node(out, "direct_grpo", "student_rl")
    assert len(rows(trained / "metrics.jsonl")) == 2 and not (trained / "model").exists()
    taken = steps_of(monkeypatch)
    assert tiny("run", out, *ARM).code == 0
    assert taken == []
    assert_same(out, uninterrupted())


def test_contradictory_generation_config_keeps_training(tmp_path: Path) -> None:
    folder, out = student(tmp_path / "student", do_sample=False, temperature=0.6, top_p=0.9), tmp_path / "out"
    result = tiny("run", out, *ARM, "--set", f"models.student={folder}")
    assert result.code == 0, result.err
    saved = json.loads((node(out, "direct_grpo", "student_rl") / "model" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.6, 0.9)


def test_separate_head_under_tied_config_is_trained_and_saved(tmp_path: Path) -> None:
    folder, out = student(tmp_path / "student"), tmp_path / "out"
    weights = load_file(folder / "model.safetensors")
    start = weights["model.embed_tokens.weight"] * 0.9
    save_file({**weights, "lm_head.weight": start.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert tiny("run", out, *ARM, "--set", f"models.student={folder}").code == 0
    model = node(out, "direct_grpo", "student_rl") / "model"
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"] is False
    again = AutoModelForCausalLM.from_pretrained(model)
    head, embedding = again.lm_head.weight, again.model.embed_tokens.weight
    checkpoint = load_file(max((model.parent / "checkpoint").iterdir()) / "model.safetensors")
    assert torch.equal(head, checkpoint["lm_head.weight"]) and torch.equal(
        embedding, checkpoint["model.embed_tokens.weight"]
    )
    assert not torch.equal(head, embedding)


# An interrupt while nothing trains ------------------------------------------------------------------------------------

LONG = ("evaluate.samples=8", "evaluate.sampling.max_tokens=64", "compute.sample_batch=8")


def interrupted_before(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: signal.Signals) -> list[int]:
    """Send a signal right before the first call of a function; returns the sizes of the batches that finish afterwards."""
    finished: list[int] = []
    sent: list[signal.Signals] = []
    plain, advance = getattr(module, name), NodeProgress.advance_or_stop

    def call(*args: Any, **more: Any) -> Any:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return plain(*args, **more)

    def counted(self: NodeProgress, count: int) -> None:
        finished.extend([count] * len(sent))
        advance(self, count)

    monkeypatch.setattr(module, name, call)
    monkeypatch.setattr(NodeProgress, "advance_or_stop", counted)
    return finished


def test_interrupt_of_evaluation_stops_within_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        finished = interrupted_before(patch, evaluate, "requests_for", signal.SIGTERM)
        ended = tiny("run", out, *ARM, changes=LONG)
    assert ended.code == 130 and "resumes" in ended.err and "Traceback" not in ended.err
    assert len(finished) == 1 and finished[0] <= 8  # of the 40 completions of the first evaluation
    [evaluated] = (out / "nodes").iterdir()
    assert not (evaluated / "DONE").exists() and not (evaluated / "evals").exists()
    whole = tmp_path / "whole"
    assert tiny("run", out, *ARM, changes=LONG).code == tiny("run", whole, *ARM, changes=LONG).code == 0
    assert_same(out, whole)


def test_interrupt_of_cache_sampling_stops_without_partial_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole, arm = tmp_path / "out", tmp_path / "whole", ("--arm", "raw_teacher")
    with monkeypatch.context() as patch:
        finished = interrupted_before(patch, cache_node, "requests_for", signal.SIGINT)
        assert tiny("run", out, *arm).code == 130
    assert len(finished) == 1 and finished[0] < 64  # of the 64 rollouts of the cache
    [cached] = (out / "nodes").glob("teacher_rollouts.*")
    assert not (cached / "DONE").exists() and not (cached / "cache").exists() and not (cached / "ledger.jsonl").exists()
    assert tiny("run", out, *arm).code == tiny("run", whole, *arm).code == 0
    assert_same(out, whole)


def test_interrupt_of_long_sequences_does_not_wait_for_slow_graders() -> None:
    policy = tiny_policy()
    policy.model.generation_config = policy.model.config.eos_token_id = None  # nothing ends a completion
    policy.tokenizer.eos_token = None
    requests = requests_for([("a", (1, 6, 2)), ("b", (1, 7, 2))], 2, 0, "test")
    calls: list[int] = []

    def stop(finished: Sequence[Rollout]) -> None:
        calls.append(len(finished))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TorchSampler(policy).sample(requests, Sampling(max_tokens=100_000), stop)
    assert calls == [0]

    graded: list[str] = []

    def grade(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        time.sleep(0.3)
        graded.extend(gold for gold, _ in pairs)
        return [Verdict(False, "slow") for _ in pairs]

    def stop_at_third(finished: Sequence[Rollout]) -> None:
        calls.append(len(finished))
        if len(calls) == 4:
            raise KeyboardInterrupt

    many = requests_for([(str(number), (1, number, 2)) for number in range(3, 9)], 1, 0, "test")
    labels = Labels({request.problem_id: "0" for request in many}, grade, len(many))
    with pytest.raises(KeyboardInterrupt):
        sample_and_grade(
            TorchSampler(policy, batch=1),
            many,
            Sampling(max_tokens=4),
            labels,
            Prompter(policy.tokenizer, Prompt()),
            stop_at_third,
        )
    assert len(graded) <= 1  # what had begun; the queue behind it is dropped
