"""What the doctor says (Finding) and what its checks look at (Case): everything is read when first asked for, and read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import GenerationConfig

from headwater.config.arms import arm_of
from headwater.config.recipe import Recipe
from headwater.data.contamination import Leak
from headwater.data.labels import Pools, buy
from headwater.data.sources import Loaded, load, without_leaks
from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.lora import AdapterSpec
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.models.tokenizer import stop_ids_of
from headwater.runs.estimate import base_of
from headwater.runs.inputs import RunInputs, device_of, load_inputs
from headwater.runs.plan import Node, Plan, Role, make_plan, nodes_of
from headwater.sampling.base import requests_for
from headwater.storage.run_dir import RunDir
from headwater.tasks.verifier import Verifier
from headwater.teachers.server_client import is_served
from headwater.types import Problem, Rollout

T = TypeVar("T")

PROBE_PROBLEMS, PROBE_SAMPLES, PROBE_TOKENS = 8, 2, 64
"""What is sampled to look at the weights' own behaviour. Longer completions are cut there."""
FEW_TOKENS = 8
"""For a large model without a GPU, where a token takes a second."""
LARGE_PARAMETERS = 64_000_000


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing, before any time is spent on it.

    name      kebab-case and stable; docs/doctor.md lists every one
    severity  `error` refuses the run; `warning` is said; `note` stands in the doctor's own list only
    evidence  what was seen, with its numbers
    remedy    what to do about it

    Example: `Finding("pad-is-eos", "note", "models.student: id 3 both pads and ends", "nothing: …")`.
    """

    name: str
    severity: Literal["error", "warning", "note"]
    evidence: str
    remedy: str

    def text(self) -> str:
        return f"{self.severity} {self.name}: {self.evidence}\n    -> {self.remedy}"


class UnavailableError(UserError):
    """What a check looks at cannot be had; the finding says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.evidence)
        self.finding = finding


@dataclass(frozen=True)
class Sample:
    """A few completions of one model, drawn as its stage draws them.

    cut  whether they were cut before the stage's own limit, so that nothing follows from their length
    """

    policy: Policy
    rollouts: list[Rollout]
    limit: int
    cut: bool


@dataclass(frozen=True)
class Case:
    """A recipe with the arms to be run, and everything that follows from it, each thing read on first use.

    given  plan and materials, where a run has already made them
    every  hold every gold answer against its grader, also where that may take long

    Example: `Case(find_recipe("pocket", []), ("bridge_rl",), (0,), Path("runs/pocket")).stop_ids("student")` is `(3,)`.
    """

    recipe: Recipe
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path
    given: tuple[Plan, RunInputs] | None = None
    every: bool = True
    _held: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def _once(self, key: Any, make: Callable[[], T], name: str, remedy: str) -> T:
        """`make()`, or the same complaint again: a UserError becomes the finding of that name."""
        if key not in self._held:
            try:
                self._held[key] = make()
            except UnavailableError as error:  # what it stands on cannot be had, and says so itself
                self._held[key] = error
            except UserError as error:
                self._held[key] = UnavailableError(Finding(name, "error", str(error), remedy))
        held = self._held[key]
        if isinstance(held, UnavailableError):
            raise held
        return held

    def close(self) -> None:
        """Let go of models and graders."""
        grade = self._held.get("grade")
        if isinstance(grade, Verifier):
            grade.close()
        self._held.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # What will run --------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Node]:
        """Every node of the arms, from the recipe alone."""
        found: dict[Node, None] = {}
        for arm in self.arms:
            for seed in self.seeds[:1]:  # seeds differ in nothing that is checked
                found.update(dict.fromkeys(nodes_of(arm_of(arm, self.recipe), self.recipe, seed).ancestry()))
        return list(found)

    @property
    def roles(self) -> list[Role]:
        """The base models that are here; `run` reads the student's and the teacher's tokenizer whatever the arm.

        Teachers by tag are named `teacher.TAG`; one behind a server is looked at elsewhere (`doctor_engines`).
        """
        used = {base_of(node.start) for node in self.nodes}
        return ["student", *self.here("teacher"), *(self.here("expert") if "expert" in used else [])]

    def here(self, role: Role) -> list[Role]:
        named = self.recipe.models.named(role) or {f"models.{role}": ""}  # one that is missing has its own finding
        return [field.removeprefix("models.") for field, name in named.items() if not is_served(name)]  # type: ignore[misc]

    def name(self, role: Role) -> str | None:
        return self.recipe.models.named(role.partition(".")[0]).get(f"models.{role}")

    @property
    def pairs(self) -> Mapping[tuple[Role, Role], bool]:
        """(who learns, from whom) -> whether whole distributions are compared, not sampled tokens alone."""
        found: dict[tuple[Role, Role], bool] = {}
        for node in self.nodes:
            if node.kind != "train" or node.settings is None or not node.settings.needs_teacher:
                continue
            supervisor = node.teacher if node.cache is None else node.cache.start
            for one in [] if supervisor is None else self.here(base_of(supervisor)):
                pair = base_of(node.start), one
                found[pair] = found.get(pair, False) or node.settings.objective != "sft"
        return found

    # Models, without their weights ----------------------------------------------------------------------------------

    def folder(self, role: Role) -> ModelFolder:
        """The files of a role's model, opened once."""
        name = self.name(role)
        remedy = f"set models.{role} to a folder with config.json, *.safetensors and a tokenizer, or a hub id"

        def find() -> ModelFolder:
            if name is None:
                raise UserError(f"models.{role}: an arm needs this model, and the recipe names none")
            folder = ModelFolder.open(name, f"models.{role}", self.recipe.models.trust_remote_code)
            folder.require_weights()
            return folder

        return self._once(("folder", role), find, "model-unreadable", remedy)

    def tokenizer(self, role: Role) -> Any:
        folder = self.folder(role)
        remedy = "save the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights"
        return self._once(("tokenizer", role), lambda: folder.tokenizer, "model-unreadable", remedy)

    def config(self, role: Role) -> Any:
        folder = self.folder(role)
        return self._once(
            ("config", role), lambda: folder.config, "model-unreadable", "mend or replace its config.json"
        )

    def generation(self, role: Role) -> GenerationConfig:
        """Its generation config; where it has none, what transformers makes of its config."""
        folder, _ = self.folder(role), self.config(role)
        remedy = "mend its generation_config.json"
        return self._once(("generation", role), lambda: folder.generation_config, "model-unreadable", remedy)

    def stop_ids(self, role: Role) -> tuple[int, ...]:
        return stop_ids_of(self.generation(role), self.config(role), self.tokenizer(role))

    def prompter(self, role: Role) -> Prompter:
        """As the run's, but for the limit: the doctor measures how far over it a prompt is."""
        return Prompter(self.tokenizer(role), self.recipe.prompt.model_copy(update={"max_tokens": 1 << 40}))

    # Data -----------------------------------------------------------------------------------------------------------

    def source(self, what: str) -> Loaded:
        """What a field such as `data.labeled` or `data.evals.NAME` holds."""
        data = self.recipe.data
        named = {"data.labeled": data.labeled, "data.unlabeled": data.unlabeled}
        chosen = (named | {f"data.evals.{name}": source for name, source in data.evals.items()})[what]
        assert chosen is not None
        return self._once(
            what,
            # Without answers it is a finding of its own, with every row.
            lambda: load(chosen, what, need_answers=False, gold=self._gold),
            "data-unreadable",
            "mend the file or the field that the sentence names",
        )

    @property
    def _gold(self) -> Callable[[Any], str | None] | None:
        """How the task reads a gold answer from a cell; as mathematics where the task itself cannot be had."""
        try:
            return self.grade.task.gold
        except UnavailableError:
            return None

    @property
    def labeled(self) -> Loaded:
        return self.source("data.labeled")

    @property
    def unlabeled(self) -> Loaded | None:
        return None if self.recipe.data.unlabeled is None else self.source("data.unlabeled")

    @property
    def evals(self) -> dict[str, Loaded]:
        return {name: self.source(f"data.evals.{name}") for name in self.recipe.data.evals}

    def leaks(self, what: str) -> tuple[Leak, ...]:
        """The problems of `data.labeled` or `data.unlabeled` that stand in an evaluation too."""
        return self._parted(what)[0].leaks

    def _parted(self, what: str) -> tuple[Loaded, dict[str, list[str]]]:
        return self._once(
            ("leaks", what), lambda: without_leaks(self.source(what), self.evals), "data-unreadable", "see above"
        )

    @property
    def clean(self) -> Loaded:
        """The labelled problems that remain when those of the evaluations are left out."""
        return self._parted("data.labeled")[0]

    @property
    def pools(self) -> Pools:
        if self.given is not None:
            return self.given[1].pools
        labels = self.recipe.labels
        return self._once(
            "pools",
            lambda: buy([problem.id for problem in self.clean.problems], labels.budget, labels.seed),
            "label-budget-over-pool",
            "lower labels.budget, or add labelled problems",
        )

    @property
    def problems(self) -> list[Problem]:
        """Every problem that will be put to a model."""
        if self.given is not None:
            held = self.given[1]
            return [*held.problems.values(), *(one for problems, _ in held.evals.values() for one in problems)]
        more = [] if self.unlabeled is None else self.unlabeled.problems
        return [*self.clean.problems, *more, *(one for held in self.evals.values() for one in held.problems)]

    @property
    def prompt_lengths(self) -> list[tuple[int, Problem]]:
        """(tokens, problem) under the student's template, longest first."""
        prompter = self.prompter("student")
        return self._once(
            "lengths",
            lambda: sorted(
                ((len(prompter.ids(problem)), problem) for problem in self.problems), key=lambda one: -one[0]
            ),
            "cannot-run",
            "mend the problem that the sentence names",
        )

    @property
    def grade(self) -> Verifier:
        compute = self.recipe.compute
        return self._once(
            "grade",
            lambda: Verifier(self.recipe.task, workers=compute.grader_workers, seconds=compute.grader_seconds),
            "task-unusable",
            "set task to sums, maths, or package.module:function of a module that imports from this folder",
        )

    # The plan, and what it runs on ----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._once(
            "device",
            lambda: device_of(self.recipe.compute.device),
            "device-missing",
            "set compute.device to auto or cpu, or run where a GPU is visible",
        )

    @property
    def inputs(self) -> RunInputs:
        if self.given is not None:
            return self.given[1]
        return self._once(
            "materials", lambda: load_inputs(self.recipe, self.grade), "cannot-run", "mend what the sentence names"
        )

    @property
    def plan(self) -> Plan:
        if self.given is not None:
            return self.given[0]
        return self._once(
            "plan",
            lambda: make_plan(self.recipe, self.arms, self.seeds, self.inputs.content()),
            "cannot-run",
            "mend what the sentence names",
        )

    @property
    def pending(self) -> list[Node]:
        """The nodes that the output folder does not hold yet."""
        return pending(self.plan, self.out)

    # Models, with their weights -------------------------------------------------------------------------------------

    def policy(self, role: Role, frozen: bool) -> Policy:
        models = self.recipe.models
        adapted = not frozen and models.lora is not None and role in models.lora.roles
        adapt = AdapterSpec(models.lora, (self.seeds[0], "doctor")) if adapted and models.lora is not None else None
        return self._once(
            ("policy", role, frozen),
            lambda: load_policy(self.folder(role), LoadOptions(models, self.device, frozen, adapt)),
            "model-unreadable",
            "the weights are damaged or do not fit config.json: fetch or save them again",
        )

    def sample(self, role: Role) -> Sample:
        """A few completions on the labelled problems' texts, at the temperature of the first stage that samples this model."""
        if self.recipe.compute.sampler != "torch":
            remedy = "set compute.sampler=torch, or mend what the sentence names"
            return self._once(("sample", role), lambda: self._sample(role), "engine-unusable", remedy)
        return self._once(("sample", role), lambda: self._sample(role), "cannot-run", "mend what the sentence names")

    def _sample(self, role: Role) -> Sample:
        whose = role.partition(".")[0]
        settings = [node.settings for node in self.nodes if node.settings is not None and _samples(node) == whose]
        chosen = max(settings, key=lambda one: one.sampling.max_tokens).sampling
        policy = self.policy(role, frozen=role != "student")
        slow = self.device.type == "cpu" and sum(p.numel() for p in policy.model.parameters()) > LARGE_PARAMETERS
        most, problems = (FEW_TOKENS, 2) if slow else (PROBE_TOKENS, PROBE_PROBLEMS)
        sampling = chosen.model_copy(update={"max_tokens": min(most, chosen.max_tokens)})
        prompter, known = self.prompter(role), self.inputs.problems
        prompts = [(name, prompter.ids(known[name])) for name in sorted(self.inputs.pools.all)[:problems]]
        requests = requests_for(prompts, PROBE_SAMPLES, 0, self.seeds[0], "doctor", role)
        rollouts = self.inputs.sampler(policy).sample(requests, sampling)
        return Sample(policy, rollouts, chosen.max_tokens, cut=sampling.max_tokens < chosen.max_tokens)

    @property
    def sampled_roles(self) -> list[Role]:
        """The base models that a stage samples from."""
        used = {_samples(node) for node in self.nodes}
        return [role for role in self.roles if role.partition(".")[0] in used]


def _samples(node: Node) -> Role | None:
    """Whose completions a node samples: its own policy's on-policy, its teacher's when it makes a cache."""
    on_policy = node.kind == "train" and node.settings is not None and node.settings.on_policy
    return base_of(node.start) if on_policy or node.kind == "rollouts" else None


def pending(plan: Plan, out: Path) -> list[Node]:
    """The nodes of a plan that an output folder does not hold yet."""
    folder = RunDir(out)
    return [node for node in plan.order() if not folder.node(plan.names[node]).is_done(plan.fingerprints[node])]
