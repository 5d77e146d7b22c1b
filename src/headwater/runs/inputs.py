"""Inputs of a run: data, label pools, graders, tokenizers and device, each read once on first use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from transformers import GenerationConfig

from headwater.config.arm import Pool
from headwater.config.recipe import Recipe, Source, canonical_json
from headwater.config.stage import Stage
from headwater.data import contexts
from headwater.data.columns import FURTHER_ANSWER_COLUMNS
from headwater.data.labels import Grade, Labels, Pools, select_labels, with_labels
from headwater.data.rows import no_such_file
from headwater.data.sources import LoadedProblems, leak_row, load, without_leaks
from headwater.errors import UserError
from headwater.models.device import device_of
from headwater.models.folder import ModelFolder
from headwater.models.prompts import Prompter, reads_clock
from headwater.models.shape import Shape
from headwater.models.tokenizer import stop_ids_of
from headwater.runs.hub_models import named_models, refuse_unreachable_hub
from headwater.runs.read_once import InputError, read_once
from headwater.sampling.build import SamplerFactory, sampler_factory
from headwater.tasks.registry import Task, find_task, grader_code
from headwater.tasks.verifier import Verifier
from headwater.teachers.server_client import ServedModel, ServedTokenizer, connect, is_served
from headwater.types import Problem, Verdict, letters_and_digits

VALIDATION = "data.validation"
POOLS: tuple[Pool, ...] = ("all", "first_half", "second_half")


@dataclass(frozen=True)
class RunInputs:
    """Everything that a recipe's run reads: use as a context manager, which ends the grader's worker processes.

    need_answers  refuse a labelled problem without an answer; the doctor reads on and reports all of them
    missing       None refuses a missing data file; a list, for estimates, gets a sentence for each one that was replaced by
                  placeholder problems
    day           the day that chat templates read as today; None tells them the time of the call

    Models are named by role: `student`, `teacher`, `expert`, or `teacher.TAG` where `models.teacher` is a mapping.
    Reading anything raises InputError with the field, file or row.
    """

    recipe: Recipe
    need_answers: bool = True
    missing: list[str] | None = None
    day: date | None = None
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def for_estimate(cls, recipe: Recipe) -> RunInputs:
        """Inputs with placeholders for missing data files; models that are not in a local folder are noted, not fetched."""
        missing = [
            f"{field_}: {name} is not in a local folder; its tokenizer was not read"
            for field_, name in named_models(recipe.models).items()
            if is_served(name) or not ModelFolder.open(name, field_).is_local
        ]
        return cls(recipe, missing=missing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        grader = self.memo.get(("grader",))
        if isinstance(grader, Verifier):
            grader.close()

    # Data -------------------------------------------------------------------------------------------------------------

    @property
    def task_name(self) -> str:
        """Raises UserError where the recipe names none, because it has no answers."""
        if self.recipe.task is None:
            raise UserError("task is missing: name the grader of the answers, such as maths")
        return self.recipe.task

    @property
    @read_once("task")
    def task(self) -> Task:
        return find_task(self.task_name)

    @property
    @read_once("task")
    def grader(self) -> Verifier:
        compute = self.recipe.compute
        workers, seconds = compute.grader_workers, compute.grader_seconds
        return Verifier(self.task_name, workers=workers, seconds=seconds, sandbox=compute.sandbox)

    @property
    def data_fields(self) -> dict[str, Source]:
        """The data sources that the recipe has, by field: `data.labeled`, `data.unlabeled`, `data.validation`, `data.evals.NAME`."""
        data = self.recipe.data
        sources = {
            **{f"data.evals.{name}": source for name, source in data.evals.items()},
            VALIDATION: data.validation,
            "data.labeled": data.labeled,
            "data.unlabeled": data.unlabeled,
        }
        return {name: source for name, source in sources.items() if source is not None}

    @read_once("data")
    def source(self, name: str) -> LoadedProblems:
        """All that the file of a data field holds; placeholders for a missing file where `missing` notes it."""
        source = self.data_fields[name]
        if self.missing is not None and source.path is not None and not Path(source.path).expanduser().exists():
            if source.limit is None:
                raise UserError(
                    f"{name}: {source.path}: {no_such_file(Path(source.path))} (an estimate needs the file, or {name}.limit)"
                )
            self.missing.append(
                f"{name}: {source.path} is not here; assumed to hold {source.limit:,} problems, its limit"
            )
            problems = [Problem.of(f"{name} {number}", name) for number in range(source.limit)]
            return LoadedProblems(problems, {problem.id: "" for problem in problems})
        answers_used = name != "data.unlabeled"
        if self.recipe.task is None:
            return load(source, name, False, further_answers=())
        need_answers, further = self.need_answers and answers_used, FURTHER_ANSWER_COLUMNS if answers_used else ()
        try:
            gold, grader = self.task.gold, self.grader
        except InputError:  # has its own error where a task is needed; the file can still be read
            return load(source, name, need_answers, further_answers=further)
        return load(source, name, need_answers, gold, grader, further)

    @read_once("data")
    def decontaminated(self, name: str) -> LoadedProblems:
        """A data source without the problems that an evaluation, or the validation set, holds too; empty if the recipe lacks it."""
        if name not in self.data_fields:
            return LoadedProblems([], {})
        held_out = self.eval_sources
        if name != VALIDATION and VALIDATION in self.data_fields:
            held_out = {**held_out, VALIDATION: self.decontaminated(VALIDATION)}
        return without_leaks(self.source(name), held_out)

    @property
    def eval_sources(self) -> dict[str, LoadedProblems]:
        return {name: self.source(f"data.evals.{name}") for name in self.recipe.data.evals}

    @property
    def labeled(self) -> LoadedProblems:
        """The labelled problems; none in a recipe for distillation alone."""
        return self.decontaminated("data.labeled")

    @property
    @read_once("data")
    def unlabeled_problems(self) -> tuple[Problem, ...]:
        """Problems of `data.unlabeled` without other spellings of labelled problems."""
        problems = self.decontaminated("data.unlabeled").problems
        if not problems:
            return ()
        known = {letters_and_digits(problem.text) for problem in self.labeled.problems}
        return tuple(problem for problem in problems if letters_and_digits(problem.text) not in known)

    @property
    @read_once("data")
    def unlabeled(self) -> tuple[str, ...]:
        """Ids of further bridge prompts."""
        return tuple(problem.id for problem in self.unlabeled_problems)

    @property
    def contexts(self) -> Mapping[str, str]:
        """Texts for the teacher alone, by problem id."""
        return {**self.decontaminated("data.unlabeled").contexts, **self.labeled.contexts}

    @property
    @read_once("data")
    def problems(self) -> Mapping[str, Problem]:
        """Every labelled and unlabelled problem by id, without answers."""
        return {problem.id: problem for problem in (*self.labeled.problems, *self.unlabeled_problems)}

    @property
    @read_once("labels")
    def pools(self) -> Pools:
        """The problems whose labels the budget buys."""
        labels = self.recipe.labels
        return select_labels([problem.id for problem in self.labeled.problems], labels.budget, labels.seed)

    @property
    @read_once("plan")
    def labels(self) -> Labels:
        """The gold answers that the budget bought, and no others."""
        gold, ids = self.labeled.gold, self.pools.all
        if without := sum(id_ not in gold for id_ in ids):
            raise UserError(f"data.labeled: {without} of the {len(ids)} problems that the budget buys have no answer")
        return Labels({id_: gold[id_] for id_ in ids}, self.grader if ids else _no_labels, len(ids))

    @property
    @read_once("data")
    def evals(self) -> Mapping[str, tuple[Sequence[Problem], Labels]]:
        """Evaluation -> its problems and their labels, which are counted apart from the budget."""
        return {name: with_labels(loaded, self.grader) for name, loaded in self.eval_sources.items()}

    @property
    def condition_problems(self) -> Sequence[Problem]:
        """The problems of the first evaluation on which condition C2 is measured; none without an evaluation."""
        first, _ = next(iter(self.evals.values()), ([], None))
        return first[: self.recipe.conditions.problems]

    @property
    @read_once("data")
    def validation(self) -> tuple[Sequence[Problem], Labels] | None:
        """Problems that decide when a stage ends, and their labels; None where the recipe has none."""
        return with_labels(self.decontaminated(VALIDATION), self.grader) if VALIDATION in self.data_fields else None

    @property
    @read_once("data")
    def all_problems(self) -> list[Problem]:
        """Every problem that a model may be asked."""
        validation = [] if self.validation is None else self.validation[0]
        evals = [problem for problems, _ in self.evals.values() for problem in problems]
        return [*self.problems.values(), *validation, *evals]

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """Each training problem that an evaluation holds too: which one, in which rows, why."""
        sources = {name: self.decontaminated(name) for name in ("data.labeled", "data.unlabeled")}
        return [leak_row(name, leak, loaded) for name, loaded in sources.items() for leak in loaded.leaks]

    def pool(self, pool: Pool) -> tuple[str, ...]:
        ids: tuple[str, ...] = getattr(self.pools, pool)
        return ids

    def prompts(self, pool: Pool, settings: Stage) -> tuple[str, ...]:
        """Ids of a stage's prompts: its labelled pool and, where it needs no label, `data.unlabeled` and what `prompts: every` adds."""
        own = self.pool(pool) + (() if settings.needs_labels else self.unlabeled)
        every = self.labeled.problems if settings.prompts == "every" else []
        return tuple(dict.fromkeys((*own, *(problem.id for problem in every))))

    def steps(self, pool: Pool, settings: Stage) -> int:
        """Steps of a stage. Epochs on a half count over the smaller half, so that stage 3 and its matched replay are equally long."""
        prompts = len(self.prompts(pool, settings))
        if pool != "all":
            prompts -= len(self.pool(pool)) - min(len(self.pools.first_half), len(self.pools.second_half))
        return settings.steps_over(prompts)

    def cached_rollouts(self, pool: Pool, settings: Stage, unknown_steps: bool = False) -> int:
        """Teacher rollouts that a stage reads from a cache: those of its steps, at most one per prompt of its pool and sample."""
        whole = len(self.prompts(pool, settings)) * settings.group_size
        return whole if unknown_steps else min(whole, max(1, self.steps(pool, settings)) * settings.batch_size)

    def with_grader(self, wrap: Callable[[Grade], Grade]) -> RunInputs:
        """The same inputs, whose completions are graded by `wrap(grader)`: for ranks that share the grading."""
        evals = {name: (problems, labels.graded_by(wrap)) for name, (problems, labels) in self.evals.items()}
        if (validation := self.validation) is not None:
            validation = validation[0], validation[1].graded_by(wrap)
        wrapped = {"labels": self.labels.graded_by(wrap), "evals": evals, "validation": validation}
        return replace(self, memo={**self.memo, **{(name,): value for name, value in wrapped.items()}})

    # Models, without their weights ------------------------------------------------------------------------------------

    def field_and_name(self, role: str) -> tuple[str, str]:
        """The recipe's field for a role, and the model that it names."""
        models, field_ = self.recipe.models.by_role(role.partition(".")[0]), f"models.{role}"
        if role not in models:
            raise InputError("model", f"{field_}: an arm needs this model, and the recipe names none")
        return field_, models[role]

    @read_once("model")
    def model_folder(self, role: str) -> ModelFolder:
        """The files of a role's model."""
        field_, name = self.field_and_name(role)
        return ModelFolder.open(name, field_, self.recipe.models.trust_remote_code)

    @read_once("model")
    def weights_path(self, role: str) -> str:
        """Folder of a role's model. Raises UserError if it holds no weights."""
        folder = self.model_folder(role)
        if not folder.is_local:
            refuse_unreachable_hub(self.recipe.models)
        folder.require_weights()
        return folder.path

    @read_once("server")
    def server(self, role: str) -> ServedModel:
        """What the server of a served teacher says about itself."""
        field_, name = self.field_and_name(role)
        return connect(name, field_, self.recipe.compute.server)

    @read_once("tokenizer")
    def tokenizer(self, role: str) -> Any:
        """The model's tokenizer; of a served teacher, its server's."""
        _, name = self.field_and_name(role)
        if is_served(name):
            local = self.served_tokenizer
            return ServedTokenizer(self.server(role)) if local is None else local.tokenizer
        return self._loadable(role).tokenizer

    @property
    def served_tokenizer(self) -> ModelFolder | None:
        """Folder of a served teacher's tokenizer, where it is not the student's."""
        return None if self.recipe.models.teacher_tokenizer is None else self.model_folder("teacher_tokenizer")

    def _loadable(self, role: str) -> ModelFolder:
        """The files of a role's model; an unreachable hub is reported once, and not as damage to each file."""
        folder = self.model_folder(role)
        if not folder.is_local:
            self.weights_path(role)
        return folder

    def prompter(self, tokenizer: Any, role: str = "student") -> Prompter:
        """A prompter for this run's problems, with a model's tokenizer and the prompt settings of its role."""
        prompt = self.recipe.prompt
        return Prompter(tokenizer, prompt if role == "student" else prompt.of_teacher, self.day)

    @read_once("tokenizer")
    def template_day(self, role: str) -> str | None:
        """The day, if a template that renders prompts for this role reads the clock; a served teacher's are the student's."""
        models = self.recipe.models.by_role(role)
        roles = ["student" if is_served(model) else name for name, model in models.items()]
        reads_day = self.day is not None and any(reads_clock(self.tokenizer(name)) for name in roles)
        return str(self.day) if reads_day else None

    @read_once("config")
    def config(self, role: str) -> Any:
        return self._loadable(role).config

    @read_once("config")
    def shape(self, role: str) -> Shape:
        return self._loadable(role).shape

    @read_once("generation config")
    def generation_config(self, role: str) -> GenerationConfig:
        """The model's generation config or, where it has none, the one that transformers derives from its config."""
        self.config(role)
        return self._loadable(role).generation_config

    def stop_ids(self, role: str) -> tuple[int, ...]:
        return stop_ids_of(self.generation_config(role), self.config(role), self.tokenizer(role))

    # Where and how it runs --------------------------------------------------------------------------------------------

    @property
    @read_once("device")
    def device(self) -> torch.device:
        return device_of(self.recipe.compute.device)

    @cached_property
    def sampler(self) -> SamplerFactory:
        """Builds the sampler of a policy; engines started for one node serve the next."""
        return sampler_factory(self.recipe)

    # Fingerprints -----------------------------------------------------------------------------------------------------

    @read_once("plan")
    def weights_fingerprint(self, role: str) -> str:
        """Names a role's weights by content and, where several teachers are named, which of them each problem is for.

        Raises InputError if the recipe has no such model or it is not to be found.
        """
        models = self.recipe.models.by_role(role)
        if not models:
            self.field_and_name(role)
        prints = {}
        for name, model in models.items():
            source = self.server if is_served(model) else self.model_folder
            prints[f"models.{name}"] = source(name).fingerprint
        if len(prints) == 1:
            return next(iter(prints.values()))
        tags = sorted((problem.id, problem.tag) for problem in self.all_problems)
        return hashlib.sha256(canonical_json([prints, tags]).encode()).hexdigest()[:16]

    def content(self) -> dict[str, Any]:
        """What decides outcomes besides the recipe's own text: weights, problems and answers."""
        validation = self.validation
        return {
            "models": self.weights_fingerprint,
            "reads": self.cached_rollouts,
            "day": self.template_day,
            "grader": None if self.recipe.task is None else grader_code(self.recipe.task),
            "pools": {name: self.pool(name) for name in POOLS},
            "labels": {name: self.labels.only(self.pool(name)).fingerprint() for name in POOLS},
            "unlabeled": self.unlabeled,
            "every_prompt": [problem.id for problem in self.labeled.problems],
            "contexts": contexts.fingerprint(self.contexts),
            "validation": None if validation is None else _graded(*validation),
            "evals": {name: _graded(*held_out) for name, held_out in self.evals.items()},
        }


def _no_labels(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    raise AssertionError("a recipe without labelled problems graded a completion")


def _graded(problems: Sequence[Problem], labels: Labels) -> list[str]:
    return [labels.fingerprint(), *(problem.id for problem in problems)]
