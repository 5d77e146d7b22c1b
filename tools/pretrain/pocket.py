"""Pocket models: small causal LMs trained from scratch on the pocket tasks, saved as ordinary model folders.

Each is trained by next-token loss on correct solutions: first worked ones only, then a mixture with a fraction p_cot of worked
ones, the rest short. Training length sets the accuracy; p_cot sets how often a sample shows its work. Training on the mixture
from the first step takes many times longer, because short answers teach almost nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from headwater.tasks import countdown, skills, sums
from tools.pretrain.common import (  # fmt: skip
    ASSISTANT,
    END,
    IGNORE_INDEX,
    PAD,
    SPECIAL,
    UNKNOWN,
    USER,
    Progress,
    SampleStats,
    learning_rate,
    make_optimizers,
    model_config,
    sample_stats,
    save,
    take_step,
    wrap_tokenizer,
)
from tools.pretrain.solutions import CORPORA

ALPHABET = "0123456789+=; -*/(),.?:%\n"
POSITIONS = 512


Vocabulary = Literal["characters", "pairs", "joined"]
"""Tokens of a pocket model: single characters; also each pair of digits; or also each digit joined to the sign before it."""


@dataclass(frozen=True, slots=True)
class PretrainSpec:
    """Shape and training length of one model. A step is an optimizer step on `batch` solutions.

    autocast  compute in bfloat16, faster from about 0.3 M parameters on; the weights stay float32 until they are saved

    Example: PretrainSpec("qwen3", hidden=64, layers=2, worked_steps=850, mixture_steps=150)
    """

    architecture: str
    hidden: int
    layers: int
    worked_steps: int
    mixture_steps: int
    p_cot: float = 0.22
    lr: float = 1e-3
    batch: int = 64
    heads: int = 4
    kv_heads: int = 2
    autocast: bool = False
    init_std: float = 0.02
    rope_theta: float = 10_000.0
    task: Literal["sums", "countdown", "skills"] = "sums"
    dials: sums.SumsDials | countdown.CountdownDials | skills.SkillsDials = sums.DIALS
    vocabulary: Vocabulary = "characters"
    start: str | None = None
    """Shipped model of characters whose weights it starts from; None starts from random ones."""

    @property
    def steps(self) -> int:
        return self.worked_steps + self.mixture_steps


POCKET: dict[str, PretrainSpec] = {
    "qwen3-student": PretrainSpec("qwen3", hidden=64, layers=2, worked_steps=850, mixture_steps=150),
    "qwen3-teacher": PretrainSpec(
        "qwen3", hidden=128, layers=3, worked_steps=850, mixture_steps=250, p_cot=0.25, lr=2e-3, autocast=True
    ),
    "qwen3-teacher-large": PretrainSpec(
        "qwen3", hidden=192, layers=4, worked_steps=750, mixture_steps=250, p_cot=0.4, lr=2e-3, autocast=True
    ),
    # At the usual init and RoPE base this Llama, unlike Qwen3, stays on a long plateau.
    "llama-student": PretrainSpec(
        "llama", hidden=64, layers=2, worked_steps=1200, mixture_steps=150, lr=2e-3, init_std=0.08, rope_theta=100
    ),
    "llama-teacher": PretrainSpec(
        "llama",
        hidden=128,
        layers=2,
        worked_steps=1050,
        mixture_steps=250,
        p_cot=0.25,
        lr=2e-3,
        init_std=0.06,
        rope_theta=100,
        autocast=True,
    ),
    # The negative control's pair trains on the same mixture and differs in capacity: the larger one finds the signs without work.
    "countdown-student": PretrainSpec(
        "qwen3",
        hidden=64,
        layers=2,
        worked_steps=750,
        mixture_steps=110,
        p_cot=0.2,
        task="countdown",
        dials=countdown.DIALS,
    ),
    "countdown-teacher": PretrainSpec(
        "qwen3",
        hidden=128,
        layers=3,
        worked_steps=200,
        mixture_steps=400,
        p_cot=0.2,
        lr=2e-3,
        autocast=True,
        task="countdown",
        dials=countdown.DIALS,
    ),
    # Of the many-skill task they know four methods for each skill, and which of them is right no better than chance.
    "skills-student": PretrainSpec(
        "qwen3",
        hidden=64,
        layers=2,
        worked_steps=0,
        mixture_steps=1500,
        p_cot=0.25,
        lr=2e-3,
        task="skills",
        dials=skills.SkillsDials(skills=skills.SKILLS),
    ),
    "skills-teacher": PretrainSpec(
        "qwen3",
        hidden=128,
        layers=3,
        worked_steps=0,
        mixture_steps=1500,
        p_cot=0.25,
        lr=2e-3,
        autocast=True,
        task="skills",
        dials=skills.SkillsDials(skills=skills.SKILLS),
    ),
}


OTHER_TOKENIZERS: dict[str, PretrainSpec] = {
    # The shipped teacher in other tokens, for cross-tokenizer studies. It does not ship. float32, because a CPU without instructions
    # for bfloat16 is three times slower with it.
    "qwen3-teacher-joined": replace(
        POCKET["qwen3-teacher"],
        vocabulary="joined",
        start="qwen3-teacher",
        worked_steps=450,
        mixture_steps=100,
        autocast=False,
    ),
}


def make_tokenizer(vocabulary: Vocabulary = "characters") -> PreTrainedTokenizerFast:
    """Tokenizer of characters or pairs, special tokens first; decode(encode(text)) == text for text over ALPHABET."""
    digits = ALPHABET[:10]
    first = {"characters": "", "pairs": digits, "joined": "+=;"}[vocabulary]
    merges = [(a, b) for a in first for b in digits]
    tokens = (*SPECIAL, *ALPHABET, *(a + b for a, b in merges))
    backend = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, unk_token=UNKNOWN)
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.decoder = decoders.Fuse()
    return wrap_tokenizer(backend, POSITIONS)


def make_model(spec: PretrainSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A float32 causal LM of the given shape, initialized from torch's current random state."""
    return AutoModelForCausalLM.from_config(
        model_config(spec, spec.architecture, tokenizer, POSITIONS, spec.init_std, spec.rope_theta)
    )


@torch.no_grad()
def start_from(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Copy the weights of a shipped model of characters; a longer token starts as the mean of its characters."""
    shipped = AutoModelForCausalLM.from_pretrained(str(files("headwater") / "pocket" / name), dtype=torch.float32)
    weights, ids = shipped.state_dict(), make_tokenizer().get_vocab()
    rows = {
        id_: [ids[token]] if token in ids else [ids[letter] for letter in token]
        for token, id_ in tokenizer.get_vocab().items()
    }
    own = torch.stack([weights["model.embed_tokens.weight"][rows[id_]].mean(dim=0) for id_ in range(len(rows))])
    tables = {"model.embed_tokens.weight": own, "lm_head.weight": own}
    model.load_state_dict({**weights, **{key: table for key, table in tables.items() if key in weights}})


def encode(
    tokenizer: PreTrainedTokenizerFast, solutions: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids_BT and labels_BT of (problem, completion) pairs, right-padded; loss on completion and EOS only."""
    id_of = tokenizer.get_vocab()

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    for problem, completion in solutions:
        prompt = [id_of[USER], *ids_of(problem), id_of[ASSISTANT]]
        rows.append([*prompt, *ids_of(completion), id_of[END]])
        prompt_lengths.append(len(prompt))
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), id_of[PAD])
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    for index, (row, start) in enumerate(zip(rows, prompt_lengths, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        labels[index, start : len(row)] = torch.tensor(row[start:])
    return ids, labels


def batches(spec: PretrainSpec, seed: int) -> Iterator[list[tuple[str, str]]]:
    """Yield spec.steps batches of (problem, completion) pairs, every problem once, from the pool `pretrain`."""
    corpus = CORPORA[spec.task]
    problems = corpus.generate(spec.steps * spec.batch, "pretrain", seed, spec.dials)
    draw = random.Random(f"pretrain:{seed}").random
    for step in range(spec.steps):
        share = 1.0 if step < spec.worked_steps else spec.p_cot
        chosen = problems[step * spec.batch : (step + 1) * spec.batch]
        yield [(text, (corpus.worked if draw() < share else corpus.short)(text, spec.dials)) for text, _ in chosen]


def pretrain(spec: PretrainSpec, out_dir: Path, seed: int = 0, progress: Progress | None = None) -> list[float]:
    """Train one model from scratch and save it as a model folder; returns the loss of each step.

    With torch on one thread, a seed gives bit-identical weights on one kind of machine. The caller's random state is restored.
    """
    tokenizer = make_tokenizer(spec.vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(spec, tokenizer)
    if spec.start is not None:
        start_from(model, tokenizer, spec.start)
    optimizers = make_optimizers(model, spec.lr)
    losses: list[float] = []
    model.train()
    for step, solutions in enumerate(batches(spec, seed)):
        ids, labels = encode(tokenizer, solutions)
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.autocast):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        take_step(optimizers, learning_rate(step, spec.steps, spec.lr))
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, spec.steps, losses[-1])
    save(model, tokenizer, out_dir)
    return losses


def measure(
    folder: Path,
    dials: sums.SumsDials | countdown.CountdownDials | skills.SkillsDials = sums.DIALS,
    problems: int = 500,
    seed: int = 0,
    task: str = "sums",
) -> SampleStats:
    """Sample once per problem of the pool `eval` at temperature 1 and grade, in float32.

    Problems of equal length share a batch, so that nothing is padded.
    """
    corpus = CORPORA[task]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # Any: transformers types these as unions of everything
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = corpus.generate(problems, "eval", seed, dials)
    samples: list[tuple[str, bool, bool]] = []  # (completion, correct, ended in EOS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for length in sorted({len(problem) for problem, _ in pairs}):
            same_length = [pair for pair in pairs if len(pair[0]) == length]
            chats = [[{"role": "user", "content": problem}] for problem, _ in same_length]
            ids = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = model.generate(**ids, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=96)
            for row, (_, gold) in zip(out[:, ids["input_ids"].shape[1] :], same_length, strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                samples.append((text, corpus.grade(gold, text)[0], bool((row == tokenizer.eos_token_id).any())))
    return sample_stats([(corpus.is_worked(text), correct, ended) for text, correct, ended in samples])


def pretrain_pocket(name: str, out_dir: Path, seed: int = 0, progress: Progress | None = None) -> SampleStats:
    """Train the pocket model of that name into out_dir/NAME, measure it and write its model card."""
    spec, folder = (POCKET | OTHER_TOKENIZERS)[name], out_dir / name
    pretrain(spec, folder, seed, progress)
    measured = measure(folder, spec.dials, task=spec.task)
    (folder / "README.md").write_text(model_card(name, folder, spec, measured, seed))
    return measured


def model_card(name: str, folder: Path, spec: PretrainSpec, measured: SampleStats, seed: int) -> str:
    """The model card of a saved folder, as markdown."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    parameters = sum(weight.numel() for weight in model.parameters())
    tokens = sum(len(problem) + len(completion) + 3 for batch in batches(spec, seed) for problem, completion in batch)
    corpus, dials = CORPORA[spec.task], spec.dials
    example = corpus.generate(1, "eval", 0, dials)[0][0]
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A {type(model).__name__} with {parameters:,} parameters, trained from scratch on {corpus.about(dials)}.
It knows nothing else.

Prompt: `{USER}{example}{ASSISTANT}`. Worked completion: `{corpus.worked(example, dials)}{END}`.
Short completion: `{corpus.short(example, dials)}{END}`.

## Training
`python -m tools.pretrain pocket` trains it again (seed {seed}). Next-token loss on correct completions, {spec.batch} a step,
every problem once: {spec.worked_steps} steps of worked ones, then {spec.mixture_steps} steps with a share of
{spec.p_cot:.0%} worked and the rest short. That is {tokens:,} tokens; learning rate {spec.lr:g}, Muon and AdamW.
The problems come from the pool `pretrain`, which shares none with `train`, `unlabelled` and `eval`.

## Measured
{measured.problems} problems of the pool `eval`, one sample each at temperature 1 without top-k or top-p, float32:

| pass rate | worked completions | right if worked | right if short | ended by EOS |
|---|---|---|---|---|
| {" | ".join(measured.cells)} |

With 500 samples a rate over all is known to about four points, and one over the worked ones to about nine.

## Limits
For experiments in minutes on a CPU. It was trained on correct solutions only and for a set number of steps, not to the
end, so that reinforcement learning and distillation have something to do. Other lengths, moduli, spacing or words are
outside its training. On another kind of processor the same recipe gives other weights, and some other skill.
"""
