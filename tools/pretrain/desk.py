"""Pretraining of the desk models: next-token loss on solutions of word problems, packed into rows, on one device.

Like the pocket models each is an honest base model: correct solutions only, first worked ones, then a mixture in which a
share p_cot is worked. The length of training sets the skill, p_cot how often a sample shows its work. What is interrupted
goes on from its last checkpoint.
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
from headwater.storage.run_dir import NodeDir, read_json, write_json
from headwater.tasks.word_problems import WordsDials, generate, grade, is_worked, problems, solutions
from headwater.training.checkpoint import load_checkpoint, save_checkpoint
from headwater.types import Problem
from tools.pretrain.common import (
    ASSISTANT,
    END,
    IGNORED,
    USER,
    Measured,
    Progress,
    optimizers_of,
    rate,
    save,
    summed_up,
)
from tools.pretrain.desk_models import DeskSpec, config_of, shipped_tokenizer

CHECKPOINT_EVERY = 500
ROWS_AT_ONCE = 16  # in one forward and backward pass: it bounds the memory of activations
MEASURED_PROBLEMS, MEASURED_TOKENS = 500, 256
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Joined:
    """Optimizers of one parameter group each as one, for a checkpoint: their states under consecutive numbers."""

    parts: tuple[torch.optim.Optimizer, ...]

    def state_dict(self) -> dict[str, Any]:
        state: dict[int, Any] = {}
        groups: list[Any] = []
        for part in self.parts:
            held, first = part.state_dict(), sum(len(group["params"]) for group in groups)
            state |= {first + index: one for index, one in held["state"].items()}
            groups += held["param_groups"]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, held: dict[str, Any]) -> None:
        first = 0
        for part, group in zip(self.parts, held["param_groups"], strict=True):
            own = {index: held["state"].get(first + index, {}) for index in group["params"]}
            part.load_state_dict({"state": own, "param_groups": [group]})
            first += len(group["params"])


def batches(spec: DeskSpec, seed: int, first: int = 0, workers: int = 0) -> Iterator[Pairs]:
    """The (problem, completion) pairs of each step from `first` on, from the pool `pretrain`; made ahead by worker processes,
    or here where there are none. A GPU is through with a batch before one core has made the next.

    A step's pairs depend on seed and step alone, so neither a resume nor the workers change them.
    """

    def asked(step: int) -> tuple[int, str, str, float, WordsDials]:
        share = 1.0 if step < spec.worked_steps else spec.p_cot
        return spec.batch, "pretrain", f"{seed}:{step}", share, spec.dials

    if not workers:
        yield from (solutions(*asked(step)) for step in range(first, spec.steps))
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[Pairs]] = deque()
        for step in range(first, spec.steps):
            waiting.append(pool.submit(solutions, *asked(step)))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def pack(tokenizer: Any, pairs: Sequence[tuple[str, str]], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Solutions one after another in rows of `width` tokens: ids, labels and positions, each (B, T).

    Positions begin at 0 with every solution; from that transformers sees where one ends, and none attends to another. Loss
    is on completion and EOS only. Raises ValueError for a solution that is longer than a row.
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
        labels[-1] += [*[IGNORED] * len(prompt), *completion]
        positions[-1] += range(length)
    for row, target, places in zip(ids, labels, positions, strict=True):
        rest = width - len(row)
        row += [tokenizer.pad_token_id] * rest
        target += [IGNORED] * rest
        places += range(rest)
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
    """Train one model from scratch, or on from the node's last checkpoint: the model and the loss of each step taken here.

    Weights stay float32; the passes run in bfloat16. Raises TrainingStoppedError when a loss is not finite.
    """
    tokenizer = shipped_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learner: Any = AutoModelForCausalLM.from_config(config_of(spec, tokenizer), dtype=torch.float32)
    learner.to(device).train()
    optimizers = optimizers_of(learner, spec.lr)
    joined: Any = Joined(optimizers)
    done = load_checkpoint(node, learner, joined)
    losses: list[float] = []
    for step, pairs in enumerate(batches(spec, seed, done, workers), done):
        packed = [part.to(device) for part in pack(tokenizer, pairs, spec.width)]
        trained_on, total = (packed[1] != IGNORED).sum(), torch.zeros((), device=device)
        for ids, labels, positions in zip(*(part.split(ROWS_AT_ONCE) for part in packed), strict=True):
            with torch.autocast(device.type, torch.bfloat16):
                loss = learner(
                    input_ids=ids,
                    labels=labels,
                    position_ids=positions,
                    use_cache=False,
                    num_items_in_batch=trained_on,  # one denominator for all rows of the step
                ).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        losses.append(total.item())
        if not math.isfinite(losses[-1]):
            raise TrainingStoppedError(f"{node.name}: the loss of step {step + 1} is {losses[-1]}; try a lower rate")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step, spec.steps, spec.lr)
            optimizer.step()
            optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, spec.steps, losses[-1])
        if (step + 1) % checkpoint_every == 0 and step + 1 < spec.steps:
            save_checkpoint(node, step + 1, learner, joined)
    return learner, losses


def pretrain_desk(
    name: str,
    out_dir: Path,
    spec: DeskSpec,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
    workers: int = 0,
) -> dict[str, Measured]:
    """Make one desk model as the model folder out_dir/name, with its card, and measure it in and beyond its own difficulty.

    A folder that holds the very same model is left as it is; one that was interrupted is gone on with.
    """
    node = NodeDir(Path(out_dir) / name)
    fingerprint = hashlib.sha256(canonical_json({"spec": asdict(spec), "seed": seed}).encode()).hexdigest()[:16]
    if node.is_done(fingerprint):
        return {where: Measured(**found) for where, found in read_json(node.done)["measured"].items()}
    begun = node.info.exists() and read_json(node.info)["fingerprint"] == fingerprint
    if not begun:
        shutil.rmtree(node.checkpoint(0).parent, ignore_errors=True)  # another model's
        write_json(node.info, {"fingerprint": fingerprint, "spec": asdict(spec), "seed": seed})
    learner, _ = train(spec, node, device, seed, progress, workers)
    save(learner, shipped_tokenizer(), node.path)
    evals = {"its own difficulty": spec.dials, "7 to 10 operations": replace(spec.dials, min_ops=7, max_ops=10)}
    measured = {where: measure(node.path, dials, device, MEASURED_PROBLEMS) for where, dials in evals.items()}
    parameters = sum(weight.numel() for weight in learner.parameters())
    (node.path / "README.md").write_text(card(name, parameters, spec, measured, seed), encoding="utf-8")
    shutil.rmtree(node.checkpoint(0).parent, ignore_errors=True)
    write_json(node.done, {"fingerprint": fingerprint, "measured": {one: asdict(m) for one, m in measured.items()}})
    return measured


def measure(folder: Path, dials: WordsDials, device: torch.device, count: int, seed: int = 0) -> Measured:
    """Sample once per problem of the pool `eval` at temperature 1 and grade."""
    name = str(folder)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    held = config.Models.model_validate({"student": name, "teacher": name, "dtype": dtype})
    policy = load_policy(ModelFolder.open(name, "pretrain desk"), LoadOptions(held, device, frozen=True))
    prompter = Prompter(policy.tokenizer, config.Prompt())
    asked = [(Problem.of(text, "words:eval"), gold) for text, gold in generate(count, "eval", seed, dials)]
    requests = requests_for([(one.id, prompter.ids(one)) for one, _ in asked], 1, 0, "pretrain desk", seed)
    rollouts = TorchSampler(policy).sample(requests, config.Sampling(max_tokens=MEASURED_TOKENS))
    texts = [prompter.completion(one.completion_ids) for one in rollouts]
    right = [grade(gold, text)[0] for (_, gold), text in zip(asked, texts, strict=True)]
    return summed_up(
        [
            (is_worked(text), correct, one.finish == "stop")
            for text, correct, one in zip(texts, right, rollouts, strict=True)
        ]
    )


def card(name: str, parameters: int, spec: DeskSpec, measured: dict[str, Measured], seed: int) -> str:
    """The model card of a desk model, as markdown."""
    example = next(problems("eval", 0, spec.dials))
    rows = []
    for where, found in measured.items():
        shares = [value for field, value in asdict(found).items() if field != "problems"]
        rows.append(" | ".join([where, *("none" if value is None else f"{value:.1%}" for value in shares)]))
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
- Worked: {example.worked}
- Short: {example.short}

## Training
`headwater pretrain desk` makes it (seed {seed}). Next-token loss on correct completions, {spec.batch} a step, each problem
once: {spec.worked_steps} steps of worked ones, then {spec.mixture_steps} steps with a share of {spec.p_cot:.0%} worked and the rest
short; learning rate {spec.lr:g}, Muon and AdamW, bfloat16 passes on float32 weights. The problems come from the pool
`pretrain`, which shares none with `train`, `unlabelled` and `eval`.

## Measured
{count} problems of the pool `eval`, one sample each at temperature 1 without top-k or top-p:

| problems | pass rate | worked completions | right if worked | right if short | ended by EOS |
|---|---|---|---|---|---|
{chr(10).join(f"| {row} |" for row in rows)}

## Limits
For experiments. It was trained on correct solutions only and for a set number of steps, not to the end, so that
reinforcement learning and distillation have something to do. English beyond its problems' sentences means nothing to it.
"""
