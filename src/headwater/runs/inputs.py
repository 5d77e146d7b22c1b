"""Everything that the nodes of a run share: problems, label pools, graders, prompts; read and checked once, up front."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import torch

from headwater.config.arms import Pool
from headwater.config.recipe import Recipe, Source, canonical_json
from headwater.config.stage import Stage
from headwater.data.contamination import Leak
from headwater.data.labels import Grade, Labels, Pools, buy
from headwater.data.sources import Loaded, load, without_leaks
from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.sampling.build import SamplerFactory, sampler_factory
from headwater.tasks.registry import Task, find_task, grader_code
from headwater.teachers import server_client
from headwater.teachers.server_client import ServedTokenizer
from headwater.types import Problem, letters_of

VALIDATION = "data.validation"
POOLS: tuple[Pool, ...] = ("all", "first_half", "second_half")


@dataclass(frozen=True)
class RunInputs:
    """What the recipe's data section stands for.

    problems   every labelled and unlabelled problem by id, without answers
    labels     the gold answers that the budget bought, and no others
    unlabeled  ids of further bridge prompts
    evals      evaluation -> (problems, labels of their own, counted apart)
    validation problems that decide when a stage ends, with labels of their own; None where the recipe has none
    notes      what was left out on reading, for the user to see
    left_out   each problem that also stands in an evaluation: which, in which rows, why
    """

    recipe: Recipe
    task: Task
    problems: Mapping[str, Problem]
    pools: Pools
    labels: Labels
    unlabeled: tuple[str, ...]
    evals: Mapping[str, tuple[Sequence[Problem], Labels]]
    validation: tuple[Sequence[Problem], Labels] | None
    notes: tuple[str, ...]
    left_out: tuple[dict[str, Any], ...]
    device: torch.device
    absent: tuple[str, ...] = ()
    """For an estimate alone: what was not here and is stood in for (`absent`), in words."""

    @cached_property
    def sampler(self) -> SamplerFactory:
        """Who samples a policy; engines started for one node serve the next."""
        return sampler_factory(self.recipe)

    @property
    def everything(self) -> list[Problem]:
        """Every problem that a model may be asked."""
        validated = [] if self.validation is None else self.validation[0]
        return [*self.problems.values(), *validated, *(one for held, _ in self.evals.values() for one in held)]

    def pool(self, pool: Pool) -> tuple[str, ...]:
        ids: tuple[str, ...] = getattr(self.pools, pool)
        return ids

    def prompts(self, pool: Pool, settings: Stage) -> tuple[str, ...]:
        """Problem ids that a stage samples from: its labelled pool and, where no label is needed, the unlabelled ones."""
        return self.pool(pool) + (() if settings.needs_labels else self.unlabeled)

    def steps(self, pool: Pool, settings: Stage) -> int:
        """Steps of a stage; those on a half count its epochs over the smaller half, so that stage 3 and its matched replay
        take equally many whatever the halves' sizes."""
        prompts = len(self.prompts(pool, settings))
        if pool != "all":
            prompts -= len(self.pool(pool)) - min(len(self.pools.first_half), len(self.pools.second_half))
        return settings.steps_over(prompts)

    def _fingerprint(self, name: str, field: str) -> str:
        if server_client.is_served(name):
            return server_client.connect(name, field, self.recipe.compute.server).fingerprint
        return ModelFolder.open(name, field).fingerprint

    def content(self) -> dict[str, Any]:
        """What decides outcomes beside the recipe's own text: which weights, problems and answers.

        Raises UserError, when a role's weights are asked for, if the recipe has none or they are not to be found.
        """

        @cache
        def weights(role: str) -> str:
            named = self.recipe.models.named(role)
            if not named:
                raise UserError(f"models.{role}: an arm needs this model, and the recipe names none")
            prints = {field: self._fingerprint(name, field) for field, name in named.items()}
            return next(iter(prints.values())) if len(prints) == 1 else combined(prints, self.everything)

        return {
            "models": weights,
            "grader": grader_code(self.recipe.task),
            "pools": {name: self.pool(name) for name in POOLS},
            "labels": {name: self.labels.only(self.pool(name)).fingerprint() for name in POOLS},
            "unlabeled": self.unlabeled,
            "validation": None
            if self.validation is None
            else [self.validation[1].fingerprint(), *(problem.id for problem in self.validation[0])],
            "evals": {
                name: [labels.fingerprint(), *(problem.id for problem in problems)]
                for name, (problems, labels) in self.evals.items()
            },
        }


def combined(prints: Mapping[str, str], problems: Sequence[Problem]) -> str:
    """Names several teachers and who of them is asked what."""
    asked = sorted((problem.id, problem.tag) for problem in problems)
    return hashlib.sha256(canonical_json([dict(prints), asked]).encode()).hexdigest()[:16]


class Read(Protocol):
    def __call__(
        self, source: Source, what: str, need_answers: bool, gold: Callable[[Any], str | None] | None = None
    ) -> Loaded: ...


def load_inputs(recipe: Recipe, grade: Grade, load: Read = load) -> RunInputs:
    """Read all data of a recipe with `load`. Raises UserError naming the field, file or row."""
    task = find_task(recipe.task)
    evals = {
        name: load(source, f"data.evals.{name}", need_answers=True, gold=task.gold)
        for name, source in recipe.data.evals.items()
    }
    held_out = evals
    validation: Loaded | None = None
    if recipe.data.validation is not None:
        validation, _ = without_leaks(
            load(recipe.data.validation, "data.validation", need_answers=True, gold=task.gold), evals
        )
        held_out = {**evals, VALIDATION: validation}
    labeled, _ = without_leaks(load(recipe.data.labeled, "data.labeled", need_answers=True, gold=task.gold), held_out)
    notes = [f"data.labeled: {said}" for said in leaks_in_words(labeled.leaks)]
    left_out = [leak_row("data.labeled", leak, labeled) for leak in labeled.leaks]
    if labeled.duplicates:
        notes.append(f"data.labeled: {labeled.duplicates} repeated problems; each counts once")
    if labeled.contradictions:
        notes.append(f"data.labeled: {len(labeled.contradictions)} problems with contradicting answers; left out")
    unlabeled: tuple[Problem, ...] = ()
    if recipe.data.unlabeled is not None:
        read = load(recipe.data.unlabeled, "data.unlabeled", need_answers=False, gold=task.gold)
        more, _ = without_leaks(read, held_out)
        # By letters, as from the evaluations: a held-out problem in another spelling is no fresh prompt.
        known = {letters_of(problem.text) for problem in labeled.problems}
        unlabeled = tuple(problem for problem in more.problems if letters_of(problem.text) not in known)
        notes += [f"data.unlabeled: {said}" for said in leaks_in_words(more.leaks)]
        left_out += [leak_row("data.unlabeled", leak, more) for leak in more.leaks]
    pools = buy([problem.id for problem in labeled.problems], recipe.labels.budget, recipe.labels.seed)
    bought = {name: labeled.gold[name] for name in pools.all}
    return RunInputs(
        recipe=recipe,
        task=task,
        problems={problem.id: problem for problem in (*labeled.problems, *unlabeled)},
        pools=pools,
        labels=Labels(bought, grade, len(bought)),
        unlabeled=tuple(problem.id for problem in unlabeled),
        evals={name: with_labels(loaded, grade) for name, loaded in evals.items()},
        validation=None if validation is None else with_labels(validation, grade),
        notes=tuple(notes),
        left_out=tuple(left_out),
        device=device_of(recipe.compute.device),
    )


def with_labels(loaded: Loaded, grade: Grade) -> tuple[Sequence[Problem], Labels]:
    """Problems with all of their own answers."""
    return loaded.problems, Labels(loaded.gold, grade, len(loaded.gold))


def leaks_in_words(leaks: Sequence[Leak]) -> list[str]:
    """Example: `["34 problems also stand in data.evals.math500 (8 exact, 26 ngram); left out"]`."""
    counts: dict[str, Counter[str]] = {}
    for leak in leaks:
        counts.setdefault(leak.eval, Counter())[leak.why] += 1
    return [
        f"{count.total()} problems also stand in {name if name == VALIDATION else f'data.evals.{name}'} "
        f"({', '.join(f'{number} {why}' for why, number in sorted(count.items()))}); left out"
        for name, count in counts.items()
    ]


def leak_row(what: str, leak: Leak, loaded: Loaded) -> dict[str, Any]:
    return {"data": what, **asdict(leak), "rows": list(loaded.rows.get(leak.problem_id, ()))}


def device_of(name: str) -> torch.device:
    """Raises UserError when a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("compute.device: cuda was asked for, but no CUDA device is available")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def read_tokenizer(recipe: Recipe, role: str) -> Any:
    """A role's tokenizer, without its weights. Raises UserError."""
    (field, name), *_ = recipe.models.named(role).items()
    return tokenizer_of(recipe, field, name)


def tokenizer_of(recipe: Recipe, field: str, name: str) -> Any:
    """The tokenizer of the model that a field names; a server's as far as ids are compared. Raises UserError."""
    if server_client.is_served(name):
        return ServedTokenizer(server_client.connect(name, field, recipe.compute.server))
    return ModelFolder.open(name, field, recipe.models.trust_remote_code).tokenizer
