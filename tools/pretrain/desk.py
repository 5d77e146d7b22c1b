"""Pretraining of the desk models: next-token loss on packed solutions of word problems, on one device.

As for the pocket models, the data are correct solutions only: first worked ones, then a mixture with a fraction p_cot of worked
ones. Training length sets the accuracy, p_cot how often a sample shows its work. Interrupted training resumes from its last
checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from headwater.config import recipe as config
from headwater.config.recipe import canonical_json
from headwater.errors import TrainingStoppedError
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.prompts import Prompter
from headwater.sampling.base import requests_for
from headwater.sampling.torch_sampler import TorchSampler
from headwater.storage.files import read_json, write_json
from headwater.storage.node_dir import NodeDir
from headwater.tasks.word_problems import WordsDials, generate, grade, problems
from headwater.training.checkpoint import load_checkpoint, save_checkpoint
from headwater.types import Problem
from tools.pretrain.common import (
    ASSISTANT,
    END,
    IGNORE_INDEX,
    USER,
    Progress,
    SampleStats,
    learning_rate,
    make_optimizers,
    sample_stats,
    save,
    take_step,
)
from tools.pretrain.desk_models import DeskSpec, model_config, shipped_tokenizer
from tools.pretrain.solutions import words_is_worked, words_short, words_solutions, words_worked

CHECKPOINT_EVERY = 500
MICROBATCH_ROWS = 16  # rows per forward and backward pass, which bounds activation memory
MEASURED_PROBLEMS, MEASURED_TOKENS = 500, 256
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class CombinedOptimizer:
    """Several optimizers with one parameter group each, saved and loaded as one: parameters are numbered consecutively."""

    parts: tuple[torch.optim.Optimizer, ...]

    @property
    def param_groups(self) -> list[Any]:
        return [group for part in self.parts for group in part.param_groups]

    def state_dict(self) -> dict[str, Any]:
        state: dict[int, Any] = {}
        groups: list[Any] = []
        for part in self.parts:
            saved, first = part.state_dict(), sum(len(group["params"]) for group in groups)
            state |= {first + index: value for index, value in saved["state"].items()}
            groups += saved["param_groups"]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        first = 0
        for part, group in zip(self.parts, saved["param_groups"], strict=True):
            state = {index: saved["state"].get(first + index, {}) for index in group["params"]}
            part.load_state_dict({"state": state, "param_groups": [group]})
            first += len(group["params"])


def batches(spec: DeskSpec, seed: int, first: int = 0, workers: int = 0) -> Iterator[Pairs]:
    """Yield the (problem, completion) pairs of each step from `first` on, from the pool `pretrain`.

    Worker processes prefetch them, since a GPU consumes a batch faster than one core generates it; 0 generates them here. The
    pairs depend on seed and step only, so resuming and the number of workers do not change them.
    """

    def arguments(step: int) -> tuple[int, str, str, float, WordsDials]:
        share = 1.0 if step < spec.worked_steps else spec.p_cot
        return spec.batch, "pretrain", f"{seed}:{step}", share, spec.dials

    if not workers:
        yield from (words_solutions(*arguments(step)) for step in range(first, spec.steps))
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending: deque[Future[Pairs]] = deque()
        for step in range(first, spec.steps):
            pending.append(pool.submit(words_solutions, *arguments(step)))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def pack(tokenizer: Any, pairs: Sequence[tuple[str, str]], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack solutions into rows of `width` tokens: ids, labels and positions, each (B, T).

    Positions restart at 0 with every solution, by which transformers keeps attention within a solution. Loss is on completion
    and EOS only. Raises ValueError for a solution longer than a row.
    """
    prompts = tokenizer([f"{USER}{text}{ASSISTANT}" for text, _ in pairs], add_special_tokens=False)["input_ids"]
    completions = tokenizer([f"{completion}{END}" for _, completion in pairs], add_special_tokens=False)["input_ids"]
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    positions: list[list[int]] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        length = len(prompt) + len(completion)
        if length > width:
            raise ValueError(f"desk: a solution of {length} tokens does not fit into rows of {width}")
        if not ids or len(ids[-1]) + length > width:
            for rows in (ids, labels, positions):
                rows.append([])
        ids[-1] += [*prompt, *completion]
        labels[-1] += [*[IGNORE_INDEX] * len(prompt), *completion]
        positions[-1] += range(length)
    for row_ids, row_labels, row_positions in zip(ids, labels, positions, strict=True):
        padding = width - len(row_ids)
        row_ids += [tokenizer.pad_token_id] * padding
        row_labels += [IGNORE_INDEX] * padding
        row_positions += range(padding)
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(positions)


def train(
    spec: DeskSpec,
    node: NodeDir,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
    workers: int = 0,
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> tuple[Any, list[float]]:
    """Train one model from scratch or from the node's last checkpoint; returns it and the loss of each step taken here.

    Weights stay float32, forward and backward run in bfloat16. Raises TrainingStoppedError for a non-finite loss.
    """
    tokenizer = shipped_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learner: Any = AutoModelForCausalLM.from_config(model_config(spec, tokenizer), dtype=torch.float32)
    learner.to(device).train()
    optimizers = make_optimizers(learner, spec.lr)
    combined: Any = CombinedOptimizer(optimizers)
    done = load_checkpoint(node, learner, combined)
    losses: list[float] = []
    for step, pairs in enumerate(batches(spec, seed, done, workers), done):
        packed = [part.to(device) for part in pack(tokenizer, pairs, spec.width)]
        num_tokens, total = (packed[1] != IGNORE_INDEX).sum(), torch.zeros((), device=device)
        for ids, labels, positions in zip(*(part.split(MICROBATCH_ROWS) for part in packed), strict=True):
            with torch.autocast(device.type, torch.bfloat16):
                loss = learner(
                    input_ids=ids,
                    labels=labels,
                    position_ids=positions,
                    use_cache=False,
                    num_items_in_batch=num_tokens,  # one denominator for all rows of the step
                ).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        losses.append(total.item())
        if not math.isfinite(losses[-1]):
            raise TrainingStoppedError(f"{node.name}: the loss of step {step + 1} is {losses[-1]}; try a lower rate")
        take_step(optimizers, learning_rate(step, spec.steps, spec.lr))
        if progress is not None:
            progress(step + 1, spec.steps, losses[-1])
        if (step + 1) % checkpoint_every == 0 and step + 1 < spec.steps:
            save_checkpoint(node, step + 1, learner, combined)
    return learner, losses


def pretrain_desk(
    name: str,
    out_dir: Path,
    spec: DeskSpec,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
    workers: int = 0,
) -> dict[str, SampleStats]:
    """Train one desk model into out_dir/name, with a model card, and measure it on problems as hard as its own and harder.

    A finished model of the same spec and seed is left alone; interrupted training resumes.
    """
    node = NodeDir(Path(out_dir) / name)
    fingerprint = hashlib.sha256(canonical_json({"spec": asdict(spec), "seed": seed}).encode()).hexdigest()[:16]
    if node.is_done(fingerprint):
        return {where: SampleStats(**stats) for where, stats in read_json(node.done)["measured"].items()}
    if not (node.info.exists() and read_json(node.info)["fingerprint"] == fingerprint):
        shutil.rmtree(node.checkpoint(0).parent, ignore_errors=True)  # checkpoints of another spec
        write_json(node.info, {"fingerprint": fingerprint, "spec": asdict(spec), "seed": seed})
    learner, _ = train(spec, node, device, seed, progress, workers)
    save(learner, shipped_tokenizer(), node.path)
    evals = {"its own difficulty": spec.dials, "7 to 10 operations": replace(spec.dials, min_ops=7, max_ops=10)}
    measured = {where: measure(node.path, dials, device, MEASURED_PROBLEMS) for where, dials in evals.items()}
    parameters = sum(weight.numel() for weight in learner.parameters())
    (node.path / "README.md").write_text(model_card(name, parameters, spec, measured, seed), encoding="utf-8")
    shutil.rmtree(node.checkpoint(0).parent, ignore_errors=True)
    write_json(
        node.done,
        {"fingerprint": fingerprint, "measured": {difficulty: asdict(m) for difficulty, m in measured.items()}},
    )
    return measured


def measure(folder: Path, dials: WordsDials, device: torch.device, count: int, seed: int = 0) -> SampleStats:
    """Sample once per problem of the pool `eval` at temperature 1 and grade."""
    name = str(folder)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    models = config.Models.model_validate({"student": name, "teacher": name, "dtype": dtype})
    policy = load_policy(ModelFolder.open(name, "pretrain desk"), LoadOptions(models, device, frozen=True))
    prompter = Prompter(policy.tokenizer, config.Prompt())
    labeled = [(Problem.of(text, "words:eval"), gold) for text, gold in generate(count, "eval", seed, dials)]
    requests = requests_for([(problem.id, prompter.ids(problem)) for problem, _ in labeled], 1, "pretrain desk", seed)
    rollouts = TorchSampler(policy).sample(requests, config.Sampling(max_tokens=MEASURED_TOKENS))
    texts = [prompter.completion(rollout.completion_ids) for rollout in rollouts]
    return sample_stats(
        [
            (words_is_worked(text), grade(gold, text)[0], rollout.finish == "stop")
            for text, (_, gold), rollout in zip(texts, labeled, rollouts, strict=True)
        ]
    )


def model_card(name: str, parameters: int, spec: DeskSpec, measured: dict[str, SampleStats], seed: int) -> str:
    """The model card of a desk model, as markdown."""
    example = next(problems("eval", 0, spec.dials))
    rows = [f"| {' | '.join([where, *stats.cells])} |" for where, stats in measured.items()]
    count = next(iter(measured.values())).problems
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A Qwen3ForCausalLM with {parameters:,} parameters, trained from scratch on word problems of {spec.dials.min_ops} to
{spec.dials.max_ops} operations in templated English. It knows nothing else, though its tokenizer takes any text.

- Problem: {example.text}
- Worked: {words_worked(example)}
- Short: {words_short(example)}

## Training
`python -m tools.pretrain desk` trains it (seed {seed}). Next-token loss on correct completions, {spec.batch} a step, each problem
once: {spec.worked_steps} steps of worked ones, then {spec.mixture_steps} steps with a share of {spec.p_cot:.0%} worked and the rest
short; learning rate {spec.lr:g}, Muon and AdamW, bfloat16 passes on float32 weights. The problems come from the pool
`pretrain`, which shares none with `train`, `unlabelled` and `eval`.

## Measured
{count} problems of the pool `eval`, one sample each at temperature 1 without top-k or top-p:

| problems | pass rate | worked completions | right if worked | right if short | ended by EOS |
|---|---|---|---|---|---|
{chr(10).join(rows)}

## Limits
For experiments. It was trained on correct solutions only and for a set number of steps, not to the end, so that
reinforcement learning and distillation have something to do. English beyond its problems' sentences means nothing to it.
"""
