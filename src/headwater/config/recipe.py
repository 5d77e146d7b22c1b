"""Recipe schema: frozen pydantic models that reject unknown keys, and reading a recipe with overrides.

The optimizer, the sampler and the losses are built from these objects, so the recipe that is recorded is the one that ran.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from headwater.config import yaml
from headwater.config.compute import Compute
from headwater.config.guards import Guards
from headwater.config.prompt import Prompt
from headwater.config.recipe_paths import with_paths
from headwater.config.schema import Fraction, Name, Natural, Positive, Seed, Steps, Strict, Tokens, Unit
from headwater.config.stage import Sampling, Stages
from headwater.config.validation import Keys, complaints
from headwater.errors import RecipeError, UserError


class Lora(Strict):
    """Low-rank adapters (peft) that a stage trains instead of all weights (docs/models.md)."""

    r: Annotated[int, Field(ge=1, le=65536)] = 16
    """Rank of the adapters."""
    alpha: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    """The adapter's output is scaled by alpha / r."""
    dropout: float = 0.0
    """Must be 0: otherwise the trainer's log-probs differ from the sampler's."""
    targets: Literal["all-linear"] | tuple[Name, ...] = "all-linear"
    """Matrices that get an adapter, by the last part of their names, such as `[q_proj, v_proj]`; never the head."""
    roles: Annotated[tuple[Literal["teacher", "student"], ...], Field(min_length=1)] = ("teacher", "student")
    """Roles whose stages train adapters; stages of the other role train all weights."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen weights in four bits while an adapter trains (QLoRA); needs bitsandbytes."""
    output: Literal["merged", "adapter"] = "merged"
    """Output of a stage: a plain model folder with the adapter merged, or the adapter alone, which the next stage continues."""

    @model_validator(mode="after")
    def _trains_what_is_sampled(self) -> Lora:
        if self.dropout != 0.0:
            raise ValueError(
                "dropout must be 0: otherwise the trainer's log-probs differ from those that the sampler drew with"
            )
        if not self.targets:
            raise ValueError("targets is empty; name matrices, or all-linear")
        for name in self.targets if isinstance(self.targets, tuple) else ():
            if name in ("lm_head", "embed_tokens"):
                raise ValueError(f"targets: {name} gets no adapter here; name matrices of the layers")
        return self


class Models(Strict):
    """Student and teacher: each a local folder, a hub id, `pocket:NAME` for a model shipped with the package, or `desk:NAME`
    for one that `python -m tools.pretrain desk` trains."""

    student: str
    """Model that is distilled into, and trained by `student_rl`."""
    teacher: str | Annotated[dict[Name, str], Field(min_length=1)] | None = None
    """Model that supervises the student; not needed by GRPO on the student alone. Also `http://HOST:PORT/v1`, a model behind a
    vLLM server, or a mapping from a problem's tag (`data.columns.tag`) to its teacher. Neither kind is trained
    (docs/engines.md)."""
    teacher_tokenizer: str | None = None
    """Model folder or hub id of a served teacher's tokenizer and config, where they are not the student's (docs/teachers.md)."""
    expert: str | None = None
    """Stronger model; its sampled answers fine-tune the teacher in the arm `sft_teacher`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of forward and backward passes; trained weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run the Python code that a model folder brings along; only for folders whose code you have read."""
    lora: Lora | None = None
    """Train low-rank adapters; None trains all weights."""

    @model_serializer(mode="wrap")
    def _omit_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit a teacher's tokenizer where none is named: recipes written before the field existed stay equal."""
        return {name: value for name, value in serialize(self).items() if (name, value) != ("teacher_tokenizer", None)}

    def named(self, role: str) -> dict[str, str]:
        """Field -> model name of a role; empty if the recipe names none.

        Example: `{"models.teacher": "/models/t"}`, or `{"models.teacher.code": …, "models.teacher.maths": …}`.
        """
        names = getattr(self, role)
        if isinstance(names, dict):
            return {f"models.{role}.{tag}": name for tag, name in sorted(names.items())}
        return {} if names is None else {f"models.{role}": names}


class Columns(Strict):
    """Column names of problem and answer; None tries the usual ones."""

    problem: str | None = None
    """A column, a path into one, or a template of several: `"{context}\\n\\n{question}"`."""
    answer: str | None = None
    """Column of the answer, or of a solution that states it."""
    context: str | None = None
    """Text that only a supervising teacher reads (`prompt.teacher.privileged`): a column, a path, or a template of several."""
    tag: str | None = None
    """Selects a problem's teacher if `models.teacher` is a mapping; generated problems are tagged with their task."""

    @model_serializer(mode="wrap")
    def _omit_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit a context where none is named: recipes written before the field existed stay equal."""
        return {name: value for name, value in serialize(self).items() if (name, value) != ("context", None)}


class Generate(Strict):
    """Problems generated by a task that has a generator (`sums`, `countdown`, `words`)."""

    task: str = "sums"
    """Task that generates them; independent of the recipe's `task`, so that your own grader can be tried on them."""
    pool: Literal["train", "unlabelled", "eval"]
    """Which of three disjoint sets of problems to draw from."""
    count: Annotated[int, Field(ge=1, le=1_000_000), Unit("problems")]
    """Number of problems."""
    seed: Seed = 0
    """Selects the problems."""
    dials: dict[str, Annotated[int, Field(ge=-1_000_000_000, le=1_000_000_000)]] = Field(default_factory=dict)
    """Difficulty parameters of the task (docs/tasks.md); the defaults are those that the shipped models were trained on."""


class Source(Strict):
    """Source of problems: a file, a folder saved by `datasets`, a hub id, or a generator."""

    path: str | None = None
    """JSONL, CSV or Parquet file, folder saved by `datasets`, or hub id. A relative path is looked up beside the recipe's file,
    then in the working directory."""
    split: str = "train"
    """Split of a hub dataset or of a folder with several."""
    columns: Columns = Columns()
    """Names of the columns, if they are not the usual ones."""
    limit: Annotated[Positive, Unit("problems")] | None = None
    """Use only the first so many problems; a dry run assumes as many for a file that is not here."""
    hash_range: tuple[Fraction, Fraction] | None = None
    """Keep problems whose content hash, a number from 0 to 1, is at least the first bound and below the second: `[0, 0.1]` and
    `[0.1, 1]` divide one file into evaluation and training, whatever the order of its rows. Applied before `limit`."""
    generate: Generate | None = None
    """Generate the problems instead of reading `path`."""

    @model_validator(mode="before")
    @classmethod
    def _a_plain_string_is_a_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.generate is None):
            raise ValueError("give either path or generate")
        if self.hash_range is not None and self.hash_range[0] >= self.hash_range[1]:
            raise ValueError("hash_range: the first bound must be less than the second")
        return self


class Data(Strict):
    """Problems to train on and to evaluate on. A plain file name stands for `{path: FILE}`."""

    labeled: Source | None = None
    """Problems with answers: the labels that `labels.budget` counts. Distillation needs none, but then `unlabeled`."""
    unlabeled: Source | None = None
    """Further prompts for warm-up and OPD, in addition to the texts of the labelled problems; no answers needed."""
    evals: dict[Name, Source] = Field(default_factory=dict)
    """Held-out problems with answers, by a name of your own; never trained on. Without any, no accuracy is measured."""
    validation: Source | None = None
    """Labelled problems for stages with `until: {metric: validation}`; their labels are counted separately."""

    @property
    def answers(self) -> list[str]:
        """The fields whose answers a grader reads."""
        fields = {"labeled": self.labeled, "evals": self.evals, "validation": self.validation}
        return [f"data.{name}" for name, value in fields.items() if value]

    @model_validator(mode="after")
    def _holds_problems(self) -> Data:
        if self.labeled is None and self.unlabeled is None:
            raise ValueError("give labeled (problems with answers) or unlabeled (prompts alone)")
        return self


class LabelBudget(Strict):
    """Label budget: the number of distinct labelled problems whose answers training may use."""

    budget: Annotated[Positive, Unit("labels")] | None = None
    """Labels that training may use; None: every labelled problem's."""
    split: Literal["full", "half"] = "full"
    """For arms without stage 3: `full` spends every label on the teacher, `half` only the first half (1H)."""
    seed: Seed = 0
    """Selects the labels within the budget; the same for every training seed unless changed."""


class Evaluate(Strict):
    """avg@k, pass@k and maj@k on every `data.evals`, before, between and after stages."""

    samples: Positive = 4
    """Completions per problem: the k of avg@k and pass@k."""
    sampling: Sampling = Sampling()
    """How completions are drawn; any top_p and top_k are allowed here."""


class Conditions(Strict):
    """The paper's condition C2, measured during every student stage that has a teacher; uses no label."""

    problems: Annotated[Natural, Unit("problems")] = 64
    """Held-out prompts (from the first evaluation) to measure on; 0 disables the measurement."""
    every: Steps = 25
    """Steps between measurements; the initial and the final state are always measured."""
    top_k: Tokens = 16
    """Number of top tokens compared for the overlap."""
    max_share: Annotated[Fraction, Unit("share of a stage's FLOPs")] | None = 0.1
    """Largest share of a stage's estimated FLOPs: beyond it, C2 is measured less often, then on fewer problems, then not at all. None,
    the default where the recipe gives `problems` or `every`: measured as they say."""

    @model_validator(mode="before")
    @classmethod
    def _measures_what_is_asked_for(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.keys() & {"problems", "every"}:
            return {"max_share": None, **value}
        return value


class Recipe(Strict):
    """Everything that determines a run's outcome. The canonical recipe has four stages; arms are edits of it."""

    name: Name = "recipe"
    """Name of the run, by default the file's; its folder is `runs/NAME` unless --out names one."""
    seed: Seed = 0
    """Training seed: of sampling, of the order of problems and of adapters' weights."""
    task: str | None = None
    """Grader of completions: `sums`, `maths`, `exact`, `numeric`, `choice`, `regex`, `json`, `python` (docs/tasks.md), or a grader
    of your own as `package.module:function(gold, completion) -> bool`. Not needed without answers."""
    models: Models
    """Student and teacher, their dtype, and adapters."""
    prompt: Prompt = Prompt()
    """How a problem becomes a chat prompt."""
    data: Data
    """Problems to train on and to evaluate on."""
    labels: LabelBudget = LabelBudget()
    """How many labels training may use, and which."""
    stages: Stages
    """Settings of the training stages."""
    evaluate: Evaluate = Evaluate()
    """How models are evaluated on `data.evals`, before, between and after stages."""
    conditions: Conditions = Conditions()
    """Measurement of how far student and teacher are apart (condition C2)."""
    guards: Guards = Field(default_factory=lambda: Guards.model_validate({}))
    """Actions when a metric of training goes wrong."""
    compute: Compute = Compute()
    """Device, sampler, memory and processes."""

    @model_validator(mode="after")
    def _validation_is_there(self) -> Recipe:
        if self.task is None and self.data.answers:
            raise ValueError(
                f"task is missing: name the grader of the answers of {self.data.answers[0]}, such as maths"
            )
        adapted = self.models.lora is not None and "student" in self.models.lora.roles
        for name, stage in self.stages.named.items():
            if adapted and stage.dense.start_update is not None:
                raise ValueError(
                    f"stages.{name}.dense.start_update: the start under an adapter cannot move; train all weights"
                )
        contexts = [source for source in (self.data.labeled, self.data.unlabeled) if source and source.columns.context]
        if (self.prompt.teacher is not None and self.prompt.teacher.privileged is not None) != bool(contexts):
            raise ValueError(
                "prompt.teacher.privileged and data.labeled.columns.context (or data.unlabeled's) need each other"
            )
        for name, stage in self.stages.named.items():
            if self.compute.overlap and stage.sparse.dynamic_sampling:
                raise ValueError(
                    f"compute.overlap: stages.{name}.sparse.dynamic_sampling samples again after grading; set one of them to 0"
                )
            wanted = stage.until is not None and stage.until.metric == "validation"
            if wanted and self.data.validation is None:
                raise ValueError(f"stages.{name}.until.metric validation: data.validation is missing")
        return self


def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `path=value` overrides. Raises UserError that names the file, the lines and the fields.

    Relative paths in the file are those beside it, if they exist there; those of overrides are the working directory's.
    """
    try:
        with path.open("rb") as file:
            text = file.read(4 * yaml.LONGEST).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read ({error})") from None
    raw, lines = yaml.read_with_lines(text, f"recipe {path}")
    if isinstance(raw, dict):
        raw = {"name": re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-._")[:64] or "recipe", **raw}
        raw = with_paths(raw, path.parent)
    return parse_recipe(raw, f"recipe {path}", overrides, lines)


def parse_recipe(
    raw: Any, where: str, overrides: Sequence[str] | None = None, lines: Mapping[Keys, int] | None = None
) -> Recipe:
    """Validate a recipe given as plain values. Raises UserError with every fault that was found.

    where  names the recipe in errors
    lines  field -> its line in the file
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: must be a mapping of fields, not {type(raw).__name__}")
    faults: list[tuple[str | None, str]] = []
    options: dict[Keys, Place] = {}
    for override in overrides or []:
        try:
            keys, value = _parsed_override(override)
            raw = _put(raw, keys, value)
        except UserError as error:
            faults.append((f"--set {' '.join(override.split())}", str(error)))
        else:
            options[tuple(keys)] = (1, 0, f"--set {' '.join(override.split())}")
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        known = {**{keys: (0, line, f"line {line}") for keys, line in (lines or {}).items()}, **options}
        located = sorted((_place(keys, known), sentence) for keys, sentence in complaints(error, Recipe))
        faults = [*((place, sentence) for (_, _, place), sentence in located), *faults]
    if faults:
        raise RecipeError(where, faults)
    return recipe


Place = tuple[int, int, str | None]
"""Where a field was given: (0 for the file and 1 for --set, line, in words); sorts as faults are listed."""


def _place(keys: Keys, known: Mapping[Keys, Place]) -> Place:
    """The place of the longest of a field's paths that has one; else of a field below it."""
    above = [known[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in known]
    below = [place for other, place in known.items() if keys and other[: len(keys)] == keys]
    return next(iter([*above, *below]), (0, 0, None))


def _parsed_override(override: str) -> tuple[list[str], Any]:
    path, sign, text = override.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise UserError("write it as path=value, such as stages.opd.steps=5")
    try:
        value = yaml.read(text, "")
    except UserError:
        raise UserError("the value is not YAML") from None
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-4 as text
    return keys, value


def _put(raw: dict[str, Any], keys: list[str], value: Any) -> dict[str, Any]:
    if len(keys) == 1:
        # `steps` take precedence over `epochs`, so epochs given on the command line remove the recipe's steps.
        return {**raw, **({"steps": None} if keys[0] == "epochs" and "steps" in raw else {}), keys[0]: value}
    child = {} if raw.get(keys[0]) is None else raw[keys[0]]
    if isinstance(child, str) and keys[1] in Source.model_fields:
        child = {"path": child}
    if not isinstance(child, dict):
        raise UserError(f"{keys[0]} holds a value, not fields")
    return {**raw, keys[0]: _put(child, keys[1:], value)}


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, for fingerprints: equal values give equal text."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
