"""What a recipe may say. Frozen pydantic models that refuse unknown keys; the resolved recipe is what runs.

The optimizer, the sampler and the losses are built from these very objects, so what is written down is what was used.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from headwater.config import yaml
from headwater.config.samplers import check_sampler_name
from headwater.config.stage import Name, Natural, Positive, Sampling, Seed, Stage, Stages, Strict
from headwater.errors import UserError


class Lora(Strict):
    """Low-rank adapters on frozen weights, through peft; what a stage trains instead of all weights (docs/lora.md)."""

    r: Annotated[int, Field(ge=1, le=65536)] = 16
    alpha: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    """The adapter's product is scaled by alpha / r."""
    dropout: float = 0.0
    """Must be 0: the trainer's log-probs would not be the sampler's."""
    targets: Literal["all-linear"] | tuple[Name, ...] = "all-linear"
    """The matrices that get an adapter, by the last part of their names, such as `[q_proj, v_proj]`; the head gets none."""
    roles: Annotated[tuple[Literal["teacher", "student"], ...], Field(min_length=1)] = ("teacher", "student")
    """Whose stages train adapters; the other's train all weights."""
    quantize: Literal["nf4"] | None = None
    """Hold the frozen weights in four bits while an adapter trains on them (QLoRA); needs bitsandbytes."""
    output: Literal["merged", "adapter"] = "merged"
    """What a stage leaves behind: a plain model folder with the adapter added in, or the adapter alone, which the next stage goes
    on with."""

    @model_validator(mode="after")
    def _trains_what_is_sampled(self) -> Lora:
        if self.dropout != 0.0:
            raise ValueError(
                "dropout must be 0: with it the trainer's log-probs would not be those that the sampler drew with"
            )
        if not self.targets:
            raise ValueError("targets names no matrix; name some, or all-linear")
        for name in self.targets if isinstance(self.targets, tuple) else ():
            if name in ("lm_head", "embed_tokens"):
                raise ValueError(f"targets: {name} gets no adapter here; name matrices of the layers")
        return self


class Models(Strict):
    """Who learns and who teaches: a local folder, a hub id, `pocket:NAME` for a model shipped with the package, or `desk:NAME`
    for one that `python -m tools.pretrain desk` makes."""

    student: str
    teacher: str | Annotated[dict[Name, str], Field(min_length=1)]
    """Also `http://HOST:PORT/v1`, for one that a vLLM server scores with, and a mapping from a problem's tag (`data.columns.tag`)
    to its teacher. Neither kind is trained (docs/engines.md)."""
    expert: str | None = None
    """The stronger model whose sampled answers fine-tune the teacher of the arm `sft_teacher`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    lora: Lora | None = None
    """Train low-rank adapters and not all weights; None trains all."""

    def named(self, role: str) -> dict[str, str]:
        """Field -> model of a role; none where the recipe names none.

        Example: `{"models.teacher": "/models/t"}`, or `{"models.teacher.code": …, "models.teacher.maths": …}`.
        """
        held = getattr(self, role)
        if isinstance(held, dict):
            return {f"models.{role}.{tag}": name for tag, name in sorted(held.items())}
        return {} if held is None else {f"models.{role}": held}


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
    tag: str | None = None
    """Names the teacher of a problem where `models.teacher` is a mapping; generated problems have their task as tag."""


class Generate(Strict):
    """Problems made on the spot by a task that has a generator (`sums`, `countdown`, `words`)."""

    task: str = "sums"
    """Whose problems; a source says it by itself, so that a grader of your own may be tried on them."""
    pool: Literal["train", "unlabelled", "eval"]
    count: Annotated[int, Field(ge=1, le=1_000_000)]
    seed: Seed = 0
    dials: dict[str, Annotated[int, Field(ge=-1_000_000_000, le=1_000_000_000)]] = Field(default_factory=dict)
    """Difficulty, in the task's own terms (docs/tasks.md); what is not said here is as the shipped models know it."""


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
    validation: Source | None = None
    """Labelled problems that decide when a stage with `until: {metric: validation}` ends; labels of their own account."""


class LabelBudget(Strict):
    """The scarce resource. `budget` is the number of distinct labelled problems that training may look at."""

    budget: Positive | None = None
    split: Literal["full", "half"] = "full"
    """For arms without stage 3: `full` spends every label on the teacher, `half` only the first half (1H)."""
    seed: Seed = 0
    """Which labels the budget buys; the same for every training seed unless changed."""


class Evaluate(Strict):
    """avg@k, pass@k and maj@k on every `data.evals`, before, between and after the stages."""

    samples: Positive = 4
    sampling: Sampling = Sampling()


class Conditions(Strict):
    """The paper's condition C2, measured beside every student stage that has a teacher; costs no label."""

    problems: Natural = 64
    """Held-out prompts (texts of the first evaluation) on which it is measured; 0 measures nothing."""
    every: Positive = 25
    """Steps between two measurements; the first and the last state are always measured."""
    top_k: Positive = 16
    """For the overlap: how many of the likeliest tokens are compared."""


class Guard(Strict):
    """One guard of training: what to do when its figure, over the last `window` steps, is beyond `bound`."""

    action: Literal["warn", "stop", "off"]
    bound: Annotated[float, Field(ge=0.0)]
    window: Positive


GUARDS: dict[str, dict[str, Any]] = {
    "kl_explosion": {"action": "warn", "bound": 1.0, "window": 10},
    "entropy_collapse": {"action": "warn", "bound": 0.03, "window": 10},
    "truncation": {"action": "warn", "bound": 0.5, "window": 10},
    "no_variance": {"action": "warn", "bound": 0.01, "window": 10},
    "sampler_gap": {"action": "warn", "bound": 0.05, "window": 10},
}
"""What a recipe leaves out of a guard. Each is explained in docs/guards.md; `guards` says how it is measured."""


class Guards(Strict):
    """`truncation: stop` changes the action alone, `truncation: {action: stop, bound: 0.3}` what it names."""

    no_signal: Literal["stop", "continue"] = "stop"
    """What to do when no group of the first `patience` steps of a stage has rewards that differ."""
    patience: Positive = 3
    kl_explosion: Guard
    entropy_collapse: Guard
    truncation: Guard
    no_variance: Guard
    sampler_gap: Guard

    @model_validator(mode="before")
    @classmethod
    def _what_is_left_out_is_as_usual(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {**value, **{name: _guard(value.get(name, {}), usual) for name, usual in GUARDS.items()}}


def _guard(said: Any, usual: dict[str, Any]) -> Any:
    """A guard as said, completed. YAML reads a bare `off` as false."""
    said = {"action": "off" if said is False else said} if isinstance(said, (str, bool)) else said
    return {**usual, **said} if isinstance(said, dict) else said


class Resources(Strict):
    """What one node takes of a cluster."""

    cpus: Annotated[float, Field(ge=0.0, le=4096.0)] = 1.0
    gpus: Annotated[float, Field(ge=0.0, le=64.0)] | None = None
    """None: one where `compute.device` is cuda, else none."""
    memory_gib: Annotated[float, Field(gt=0.0, le=65536.0)] | None = None
    """None asks for no share of the memory."""


class Ray(Strict):
    """How `--executor ray` runs a study's nodes."""

    node: Resources = Resources()
    stages: dict[Name, Resources] = Field(default_factory=dict)
    """For nodes of one stage (`teacher_rl`, `warmup`, `teacher_rollouts`, …) in place of `node`."""
    retries: Annotated[int, Field(ge=0, le=100)] = 2
    """How often a node whose process died is begun again, from its last checkpoint."""


class Vllm(Strict):
    """How vLLM samples where `compute.sampler` names it (docs/engines.md)."""

    memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4
    """Share of the device's memory that the engine takes while it samples, weights and cache together."""
    cache_gb: Annotated[float, Field(gt=0.0, le=65536.0)] | None = None
    """GiB of its key-value cache; None takes what `memory` leaves on a GPU, and 1 on a CPU."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=1024)] = 1
    """Devices over which it divides every matrix; past 1 it starts a process for each, which is sent the weights."""
    compiled: bool = True
    """Whether it compiles the model and captures graphs: a minute or so at its start, faster steps ever after."""
    sleep: bool = True
    """Whether it gives its memory back while the policy trains; on a CPU, where it cannot, this says nothing."""
    importance_cap: Annotated[float, Field(gt=0.0)] | None = 2.0
    """A policy-gradient token counts min(p_trainer / p_sampler, cap) times, as vLLM's own arithmetic drew it; None leaves that out."""


class Server(Strict):
    """How a teacher behind a server is asked (`models.teacher: http://…`)."""

    seconds: Annotated[float, Field(gt=0.0, le=86_400.0)] = 120.0
    """For one answer; then it is asked again."""
    retries: Annotated[int, Field(ge=0, le=100)] = 5
    """Further tries of a call that brings no usable answer, after pauses of 0.5, 1, 2 … 30 seconds."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Calls under way at once."""
    batch_tokens: Positive = 16384
    """Tokens that one call has scored."""
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """The environment variable that holds the server's key; the key itself is never written down."""


class Compute(Strict):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sampler: Annotated[str, AfterValidator(check_sampler_name)] = "torch"
    """A sampler of `config.samplers.SAMPLERS`: `torch`, the embedded one, or `vllm`, in this process (extra `vllm`)."""
    vllm: Vllm = Vllm()
    server: Server = Server()
    offload_teacher: bool = False
    """Whether an in-process teacher waits in the machine's memory, but for its head, while it does not score."""
    microbatch_tokens: Positive = 16384
    """Tokens in one forward and backward pass (a prompt that rows share counts once; padding counts where a model must be
    padded); gradients are accumulated over the passes."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of the tensor library; None leaves its own choice."""
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes that run independent nodes side by side. None: as many as the cores allow at `threads` each; one on a GPU."""
    sample_batch: Positive = 256
    """Sequences that the embedded sampler decodes at once."""
    score_ahead: Annotated[int, Field(ge=1, le=64)] = 1
    """Parts in which a live teacher scores a step's rollouts, each while later ones are still sampled; pays where a core is idle."""
    grader_workers: Annotated[int, Field(ge=1, le=1024)] = 2
    grader_seconds: Annotated[float, Field(gt=0.0, le=86_400.0)] = 2.0
    deterministic: bool = True
    ray: Ray = Ray()


class Recipe(Strict):
    """Everything that decides a run's outcome. The canonical recipe has four stages; arms are edits of it."""

    name: Name
    seed: Seed = 0
    task: str
    """`sums`, `maths`, `exact`, `numeric`, `choice`, `regex`, `json`, `python` (docs/tasks.md), or a grader of your
    own as `package.module:function(gold, completion) -> bool`."""
    models: Models
    prompt: Prompt = Prompt()
    data: Data
    labels: LabelBudget = LabelBudget()
    stages: Stages
    evaluate: Evaluate = Evaluate()
    conditions: Conditions = Conditions()
    guards: Guards = Field(default_factory=lambda: Guards.model_validate({}))
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _validation_is_there(self) -> Recipe:
        for name in type(self.stages).model_fields:
            stage: Stage | None = getattr(self.stages, name)
            wanted = stage is not None and stage.until is not None and stage.until.metric == "validation"
            if wanted and self.data.validation is None:
                raise ValueError(f"stages.{name}.until.metric validation: data.validation is missing")
        return self


def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `path=value` overrides.

    Raises UserError with one sentence that names the file and the field.
    """
    try:
        with path.open("rb") as file:
            text = file.read(4 * yaml.LONGEST).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read ({error})") from None
    raw = yaml.read(text, f"recipe {path}")
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
        value = yaml.read(text, "")
    except UserError:
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
