"""What a recipe may say. Frozen pydantic models that refuse unknown keys; the resolved recipe is what runs.

The optimizer, the sampler and the losses are built from these very objects, so what is written down is what was used.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from headwater.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Models(Strict):
    """Who learns and who teaches: a local folder, a hub id, or `pocket:NAME` for a model shipped with the package."""

    student: str
    teacher: str
    expert: str | None = None
    """The stronger model whose sampled answers fine-tune the teacher of the arm `sft_teacher`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


class Prompt(Strict):
    """How a problem becomes the user's turn."""

    system: str | None = None
    template: str = "{problem}"
    thinking: bool = False
    """Handed to chat templates that know `enable_thinking` (Qwen3)."""
    max_tokens: Positive = 2048

    @model_validator(mode="after")
    def _names_the_problem(self) -> Prompt:
        if "{problem}" not in self.template:
            raise ValueError("template must contain {problem}")
        return self


class Columns(Strict):
    """Which columns hold the problem and the answer; None means the usual names are looked for."""

    problem: str | None = None
    answer: str | None = None


class Generate(Strict):
    """Problems made on the spot by a task that has a generator (`sums`)."""

    pool: Literal["train", "unlabelled", "eval"]
    count: Positive
    seed: int = 0
    min_terms: Annotated[int, Field(ge=2, le=64)] = 4
    max_terms: Annotated[int, Field(ge=2, le=64)] = 6


class Source(Strict):
    """Where problems come from: a file, a folder saved by `datasets`, a hub id, or a generator."""

    path: str | None = None
    split: str = "train"
    columns: Columns = Columns()
    limit: Positive | None = None
    generate: Generate | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_plain_string_is_a_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.generate is None):
            raise ValueError("give either path or generate")
        return self


class Data(Strict):
    labeled: Source
    unlabeled: Source | None = None
    """Further bridge prompts, used with the labelled problems' texts in warm-up and OPD; no answers needed."""
    evals: dict[Name, Source] = Field(min_length=1)


class LabelBudget(Strict):
    """The scarce resource. `budget` is the number of distinct labelled problems that training may look at."""

    budget: Positive | None = None
    split: Literal["full", "half"] = "full"
    """For arms without stage 3: `full` spends every label on the teacher, `half` only the first half (1H)."""
    seed: int = 0
    """Which labels the budget buys; the same for every training seed unless changed."""


class Sampling(Strict):
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 keeps every token."""
    max_tokens: Positive = 512


class Optim(Strict):
    """AdamW. `warmup` is the share of the stage's steps over which the rate rises linearly from 0."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-6
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Fraction = 0.0


class Sparse(Strict):
    """Group-relative policy gradient (GRPO) and its usual variants."""

    advantage: Literal["group", "dr_grpo"] = "group"
    """`group` divides by the group's standard deviation; `dr_grpo` only subtracts the mean (2503.20783)."""
    clip_low: Annotated[float, Field(ge=0.0)] = 0.2
    clip_high: Annotated[float, Field(ge=0.0)] = 0.2
    kl_coef: Annotated[float, Field(ge=0.0)] = 5e-4
    """Weight of KL(policy ‖ the stage's starting weights), k3 estimate a token."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """How many further rounds of prompts may be sampled to replace groups whose rewards are all equal."""


class Dense(Strict):
    """Token-level teacher supervision."""

    divergence: Literal["reverse", "forward", "jsd", "sampled"] = "reverse"
    """`reverse` KL(student‖teacher), `forward` KL(teacher‖student), `jsd` with `beta`, exact over the vocabulary;
    `sampled` is the one-token estimate (k1) as an advantage."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    top_k: Positive | None = None
    """Cached teacher distributions keep the k likeliest tokens and the tail's mass; None keeps all of them."""


class Stage(Strict):
    """One stage of training: who samples × what scores × how densely, and for how long."""

    objective: Literal["grpo", "opd", "mixed", "forward_kl", "sft"]
    steps: Annotated[int, Field(ge=0)] | None = None
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Times that the stage's pool is gone through; `steps`, where given, counts instead."""
    batch_size: Positive = 64
    """Rollouts a step. On-policy stages sample batch_size / group_size prompts."""
    group_size: Positive = 8
    """Rollouts a prompt: sampled by the policy in a step, or cached from the teacher."""
    optim: Optim = Optim()
    sampling: Sampling = Sampling()
    sparse: Sparse = Sparse()
    dense: Dense = Dense()
    sparse_share: Fraction | None = None
    """λ of J_λ = (1−λ) dense + λ sparse; only for `mixed` (1 is GRPO, 0 is OPD)."""
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """The denominator: all tokens; each sequence first; or a constant batch_size × max_tokens (Dr.GRPO)."""
    minibatches: Positive = 1
    """Optimizer steps that one sampled batch is divided into."""
    passes: Positive = 1
    """Times that each sampled batch is gone through; past the first the importance ratio is not 1."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Annotated[int, Field(ge=0)] = 25

    @property
    def prompts_per_step(self) -> int:
        """Distinct prompts of an on-policy step."""
        return self.batch_size // self.group_size

    def steps_over(self, prompts: int) -> int:
        """Steps of the stage on a pool of `prompts` prompts.

        Example: 2 epochs over 100 prompts, 16 a step, are 13 steps; `steps` given is taken as it is.
        """
        if self.steps is not None:
            return self.steps
        rollouts = prompts * self.group_size
        return math.ceil((self.epochs or 0.0) * rollouts / self.batch_size)

    @property
    def on_policy(self) -> bool:
        return self.objective in ("grpo", "opd", "mixed")

    @property
    def needs_labels(self) -> bool:
        return self.objective == "grpo" or (self.objective == "mixed" and self.sparse_share != 0.0)

    @property
    def needs_teacher(self) -> bool:
        return self.objective != "grpo" and not (self.objective == "mixed" and self.sparse_share == 1.0)

    @model_validator(mode="after")
    def _legal(self) -> Stage:
        if self.steps is None and self.epochs is None:
            raise ValueError("give steps or epochs")
        if self.on_policy and self.batch_size % self.group_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of group_size {self.group_size}")
        if self.needs_labels and self.group_size < 2:
            raise ValueError("group_size must be at least 2 where the reward is compared within a group")
        if (self.objective == "mixed") != (self.sparse_share is not None):
            raise ValueError("sparse_share belongs to objective mixed, and mixed needs it")
        if self.sampling.top_p != 1.0 or self.sampling.top_k != 0:
            raise ValueError("training samples with top_p 1 and no top_k: no loss here accounts for a cut distribution")
        if self.minibatches > self.batch_size:
            raise ValueError(f"minibatches {self.minibatches} is more than batch_size {self.batch_size}")
        return self


class Stages(Strict):
    teacher_rl: Stage
    warmup: Stage
    opd: Stage
    student_rl: Stage
    sft: Stage | None = None
    """Hard-label fine-tuning in the arms `teacher_sft` and `sft_teacher`; None takes the warm-up's settings."""

    @model_validator(mode="after")
    def _each_in_its_place(self) -> Stages:
        allowed = {
            "teacher_rl": ("grpo",),
            "warmup": ("forward_kl", "sft"),
            "opd": ("opd", "mixed"),
            "student_rl": ("grpo", "mixed"),
            "sft": ("sft",),
        }
        for name, objectives in allowed.items():
            stage: Stage | None = getattr(self, name)
            if stage is not None and stage.objective not in objectives:
                raise ValueError(f"{name}.objective is {stage.objective}; this stage takes {' or '.join(objectives)}")
        return self


class Evaluate(Strict):
    """avg@k, pass@k and maj@k on every `data.evals`, before, between and after the stages."""

    samples: Positive = 4
    sampling: Sampling = Sampling()


class Guards(Strict):
    no_signal: Literal["stop", "continue"] = "stop"
    """What to do when no group of the first `patience` steps of a stage has rewards that differ."""
    patience: Positive = 3


class Compute(Strict):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    microbatch_tokens: Positive = 16384
    """Tokens (padding included) in one forward and backward pass; gradients are accumulated over the passes."""
    threads: Positive | None = None
    """CPU threads of the tensor library; None leaves its own choice."""
    sample_batch: Positive = 256
    """Sequences that the embedded sampler decodes at once."""
    grader_workers: Positive = 2
    grader_seconds: Annotated[float, Field(gt=0.0)] = 2.0
    deterministic: bool = True


class Recipe(Strict):
    """Everything that decides a run's outcome. The canonical recipe has four stages; arms are edits of it."""

    name: Name
    seed: int = 0
    task: str
    """`sums`, `maths`, `exact`, `numeric`, `choice`, `regex`, `json`, `python` (docs/tasks.md), or a grader of your
    own as `package.module:function(gold, completion) -> bool`."""
    models: Models
    prompt: Prompt = Prompt()
    data: Data
    labels: LabelBudget = LabelBudget()
    stages: Stages
    evaluate: Evaluate = Evaluate()
    guards: Guards = Guards()
    compute: Compute = Compute()


def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `path=value` overrides.

    Raises UserError with one sentence that names the file and the field.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: is not YAML ({' '.join(str(error).split())})") from None
    return parse_recipe(raw, f"recipe {path}", overrides)


def parse_recipe(raw: Any, where: str, overrides: list[str] | None = None) -> Recipe:
    """Validate a recipe given as plain values; `where` names it in the error sentence."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: must be a mapping of fields, not {type(raw).__name__}")
    for override in overrides or []:
        raw = _with_override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {first_complaint(error)}") from None


def first_complaint(error: ValidationError) -> str:
    """The first thing that pydantic found, as a sentence that names the field."""
    found = error.errors(include_url=False)[0]
    field = " ".join(".".join(str(part) for part in found["loc"]).split()) or "the recipe"
    if found["type"] == "extra_forbidden":
        return f"unknown field {field}"
    message = found["msg"].removeprefix("Value error, ")
    given = found.get("input")
    shown = "" if isinstance(given, (dict, list)) or found["type"] == "missing" else f" (given: {given!r:.80})"
    return f"{field}: {message[:1].lower() + message[1:]}{shown}"


def _with_override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    path, sign, text = override.partition("=")
    keys, shown = path.strip().split("."), " ".join(override.split())  # a sentence is one line, whatever was typed
    if not sign or not all(keys):
        raise UserError(f"--set {shown}: write it as path=value, such as stages.opd.steps=5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {shown}: the value is not YAML") from None
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-4 as text; a number was meant
    return _put(raw, keys, value, shown)


def _put(raw: dict[str, Any], keys: list[str], value: Any, override: str) -> dict[str, Any]:
    if len(keys) == 1:
        # Where a recipe gives steps they count, and epochs asked for on the command line would change nothing.
        return {**raw, **({"steps": None} if keys[0] == "epochs" and "steps" in raw else {}), keys[0]: value}
    child = {} if raw.get(keys[0]) is None else raw[keys[0]]
    if isinstance(child, str) and keys[1] in Source.model_fields:
        child = {"path": child}
    if not isinstance(child, dict):
        raise UserError(f"--set {override}: {keys[0]} holds a value, not fields")
    return {**raw, keys[0]: _put(child, keys[1:], value, override)}


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, for fingerprints."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
