"""Inputs of the doctor's checks: a run's data and models, its plan, and a few samples of its models."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headwater.config.arms import BASE_MODELS, arm_of
from headwater.config.recipe import Recipe
from headwater.config.stage import Sampling, Stage
from headwater.errors import UserError
from headwater.models.load import LoadOptions, load_policy
from headwater.models.lora import AdapterSpec
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter, with_context
from headwater.models.shape import Shape
from headwater.runs.estimate import model_shapes
from headwater.runs.inputs import RunInputs
from headwater.runs.node import CacheNode, Node, Role, StageNode, TrainNode, base_of
from headwater.runs.plan import Plan, last_node, make_plan
from headwater.runs.read_once import InputError, read_once
from headwater.sampling.base import requests_for
from headwater.storage.run_dir import RunDir
from headwater.teachers.server_client import is_served
from headwater.types import Problem, Rollout

SAMPLED_PROBLEMS, SAMPLES, SAMPLED_TOKENS = 8, 2, 64
"""What is sampled for the checks of weights. Longer completions are cut."""
FEW_PROBLEMS, FEW_TOKENS = 2, 8
"""For a large model without a GPU, where a token takes a second."""
LARGE_PARAMETERS = 64_000_000
COMPARED_PROBLEMS = 32
"""Problems on which tokenizers and chat templates are compared, in addition to the probe strings."""
MAX_COMPARED_CHARACTERS = 10_000
"""Of a problem's text; a prompt that is far too long is reported by name."""


@dataclass(frozen=True)
class Sample:
    """A few completions of one model, drawn as its stage draws them.

    sampling   the stage's own settings
    shortened  whether completions were cut before its `max_tokens`, so that nothing follows from their length
    seconds    time that sampling took
    """

    policy: Policy
    rollouts: list[Rollout]
    sampling: Sampling
    shortened: bool
    seconds: float


@dataclass(frozen=True)
class DoctorContext:
    """A run's inputs and arms, with what the checks derive from them, each computed once on first use.

    exhaustive  grade every gold answer and sample whole completions, also where that takes long
    """

    inputs: RunInputs
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path
    exhaustive: bool = True
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, plan: Plan, inputs: RunInputs, out: Path = Path()) -> DoctorContext:
        """The context of a run that has made its plan."""
        arms = tuple(arm for arm in plan.arms if arm not in BASE_MODELS)
        return cls(inputs, arms, plan.seeds, out, exhaustive=False, memo={("plan",): plan})

    def close(self) -> None:
        """Free the models."""
        self.memo.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # What will run ----------------------------------------------------------------------------------------------------

    @property
    def recipe(self) -> Recipe:
        return self.inputs.recipe

    @property
    @read_once("plan")
    def nodes(self) -> list[StageNode]:
        """Every node of the arms, from the recipe alone; seeds differ in nothing that is checked."""
        arms = (arm_of(arm, self.recipe) for arm in self.arms)
        every = (node for arm in arms for node in last_node(arm, self.recipe, self.seeds[0]).ancestry())
        return list(dict.fromkeys(node for node in every if isinstance(node, StageNode)))

    @property
    def training(self) -> list[tuple[TrainNode, Stage]]:
        """The nodes that train, each with its stage's settings."""
        return [(node, node.settings) for node in self.nodes if isinstance(node, TrainNode)]

    def recipe_stage(self, node: Node) -> str:
        """The stage of the recipe that holds a node's settings: of a cache that of its reader; `sft` may take the warm-up's."""
        stage = next((reader.stage for reader, _ in self.training if reader.cache == node), node.stage)
        return "warmup" if stage == "sft" and self.recipe.stages.sft is None else stage

    def steps(self, node: TrainNode) -> int:
        """Steps of a node that trains, without an adjustment to equal compute."""
        return self.inputs.steps(node.pool, node.settings)

    @property
    @read_once("plan")
    def plan(self) -> Plan:
        return make_plan(self.recipe, self.arms, self.seeds, self.inputs.content())

    @property
    def pending(self) -> list[Node]:
        """The plan's nodes that the output folder does not hold yet."""
        return self.plan.unfinished(RunDir(self.out))

    # Models, without their weights ------------------------------------------------------------------------------------

    @property
    def roles(self) -> list[str]:
        """The base models that are local; a run reads the student's and the teacher's tokenizer whatever the arm."""
        used = {base_of(node.start) for node in self.nodes}
        return ["student", *self.local("teacher"), *(self.local("expert") if "expert" in used else [])]

    @property
    def trained_roles(self) -> Mapping[str, bool]:
        """Each base model that a stage trains -> whether every such stage trains adapters on it."""
        adapted: dict[str, bool] = {}
        for node, _ in self.training:
            base = base_of(node.start)
            adapted[base] = adapted.get(base, True) and node.lora(self.recipe) is not None
        return {role: adapted[role] for role in self.roles if role in adapted}

    def local(self, role: Role) -> list[str]:
        """The models of a role that no server holds: one, or `teacher.TAG` for each of a mapping."""
        models = self.recipe.models.by_role(role)
        if role == "expert" and not models:
            models = {"expert": ""}  # has its own finding
        return [name for name, model in models.items() if not is_served(model)]

    @property
    def served_teachers(self) -> list[str]:
        return [name for name, model in self.recipe.models.by_role("teacher").items() if is_served(model)]

    @property
    def _supervised(self) -> Iterator[tuple[TrainNode, Stage, Role]]:
        """The nodes that train with a teacher, their settings, and the base model of that teacher."""
        for node, stage in self.training:
            if stage.needs_teacher and node.supervisor is not None:
                yield node, stage, base_of(node.supervisor)

    @property
    def distillations(self) -> Mapping[tuple[str, str], bool]:
        """(learner, teacher) -> whether their distributions are compared, rather than sampled tokens alone."""
        pairs: dict[tuple[str, str], bool] = {}
        for node, stage, base in self._supervised:
            for teacher in self.local(base):
                pair = base_of(node.start), teacher
                pairs[pair] = pairs.get(pair, False) or "teacher" in stage.signals
        return pairs

    @property
    def aligned_pairs(self) -> Mapping[tuple[str, str], list[str]]:
        """(learner, teacher) -> stages of the recipe that align tokenizers, of pairs that no other compares token by token."""
        stages: dict[tuple[str, str], list[str]] = {}
        plain: set[tuple[str, str]] = set()
        for node, _, base in self._supervised:
            for teacher in self.recipe.models.by_role(base):
                pair = base_of(node.start), teacher
                if node.aligns_tokenizers:
                    stages.setdefault(pair, []).append(self.recipe_stage(node))
                else:
                    plain.add(pair)
        return {pair: names for pair, names in stages.items() if pair not in plain}

    @property
    def aligned_roles(self) -> set[str]:
        """Teachers whose learner aligns tokenizers."""
        return {teacher for _, teacher in self.aligned_pairs}

    @property
    @read_once("plan")
    def compared_problems(self) -> list[Problem]:
        problems = self.inputs.problems
        return [problems[name] for name in sorted(problems)[:COMPARED_PROBLEMS]]

    def prompter(self, role: str) -> Prompter:
        """As in a run, but without a limit: a check measures how far over it a prompt is."""
        return self.inputs.prompter(self.inputs.tokenizer(role), role.partition(".")[0]).without_limit()

    @property
    @read_once("config")
    def model_shapes(self) -> dict[Role, Shape]:
        return model_shapes(self.inputs)

    @property
    def prompt_lengths(self) -> list[tuple[int, Problem]]:
        return self.lengths_of("student")

    @read_once("plan")
    def lengths_of(self, role: str) -> list[tuple[int, Problem]]:
        """(tokens, problem) under the template and words of a role, with its privileged contexts; longest first."""
        if role != "student" and role not in self.aligned_roles and self.recipe.prompt.teacher is None:
            return self.prompt_lengths
        contexts = {} if role == "student" else self.inputs.contexts
        prompter, prompt, problems = self.prompter(role), self.recipe.prompt, self.inputs.all_problems
        readers = (with_context(prompter, prompt, contexts.get(problem.id)) for problem in problems)
        lengths = [(len(reader.ids(problem)), problem) for reader, problem in zip(readers, problems, strict=True)]
        return sorted(lengths, key=lambda pair: -pair[0])

    @property
    @read_once("plan")
    def problem_ids(self) -> list[tuple[Problem, list[int]]]:
        """Every problem and its text in the student's token ids, without a template; of a long text the beginning."""
        problems = self.inputs.all_problems
        texts = ["\n".join(problem.contents)[:MAX_COMPARED_CHARACTERS] for problem in problems]
        ids = self.inputs.tokenizer("student")(texts, add_special_tokens=False)["input_ids"] if texts else []
        return list(zip(problems, ids, strict=True))

    # Models, with their weights ---------------------------------------------------------------------------------------

    @read_once("weights")
    def policy(self, role: str, frozen: bool) -> Policy:
        models, lora = self.recipe.models, self.recipe.models.lora
        trains = lora is not None and role in lora.roles and not frozen
        adapt = AdapterSpec(lora, (self.seeds[0], "doctor")) if lora is not None and trains else None
        return load_policy(self.inputs.model_folder(role), LoadOptions(models, self.inputs.device, frozen, adapt))

    @read_once("plan")
    def sample(self, role: str) -> Sample:
        """A few completions on labelled problems, else on prompts, at the temperature of the stage that samples it the longest."""
        base = role.partition(".")[0]
        stages = [node.settings for node in self.nodes if _sampled_model(node) == base]
        sampling = max(stages, key=lambda stage: stage.sampling.max_tokens).sampling
        policy, inputs = self.policy(role, frozen=role != "student"), self.inputs
        slow = inputs.device.type == "cpu" and sum(p.numel() for p in policy.model.parameters()) > LARGE_PARAMETERS
        tokens, problems = (FEW_TOKENS, FEW_PROBLEMS) if slow else (SAMPLED_TOKENS, SAMPLED_PROBLEMS)
        shorter = sampling.model_copy(update={"max_tokens": min(tokens, sampling.max_tokens)})
        prompter = self.prompter(role)
        names = sorted(inputs.pools.all or inputs.unlabeled)[:problems]
        prompts = [(name, prompter.ids(inputs.problems[name])) for name in names]
        requests = requests_for(prompts, SAMPLES, self.seeds[0], "doctor", role)
        started = time.perf_counter()
        try:
            rollouts = inputs.sampler(policy).sample(requests, shorter)
        except UserError as error:
            raise InputError("plan" if self.recipe.compute.sampler == "torch" else "engine", str(error)) from None
        shortened = shorter.max_tokens < sampling.max_tokens
        return Sample(policy, rollouts, sampling, shortened, time.perf_counter() - started)

    @property
    def sampled_roles(self) -> list[str]:
        """The base models that a stage samples from."""
        used = {_sampled_model(node) for node in self.nodes}
        return [role for role in self.roles if role.partition(".")[0] in used]


def _sampled_model(node: StageNode) -> Role | None:
    """The base model that a node samples: its own policy on-policy, its teacher when it makes a cache."""
    return base_of(node.start) if node.settings.on_policy or isinstance(node, CacheNode) else None
