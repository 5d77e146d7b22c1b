"""Context of a running node: the plan, the run's inputs, its folder, its processes, and its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headwater.config.stage import Stage
from headwater.data.labels import Labels
from headwater.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from headwater.errors import TrainingStoppedError
from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.lora import AdapterSpec
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.runs.display import NodeProgress
from headwater.runs.inputs import RunInputs
from headwater.runs.node import Node, Role, StageNode, TrainNode, base_of
from headwater.runs.plan import Plan, reads_contexts
from headwater.runs.translated_teacher import translated_teacher
from headwater.sampling.base import Sampler
from headwater.storage import ledger
from headwater.storage.files import read_jsonl
from headwater.storage.ledger import Purpose, Spend
from headwater.storage.node_dir import NodeDir
from headwater.storage.run_dir import RunDir
from headwater.teachers.build import (
    Teacher,
    is_single_local_model,
    load_base_teacher,
    offload_if_configured,
    sampler_for,
)
from headwater.teachers.translated import Supervisor, TranslatedTeacher
from headwater.training.evaluate import evaluate
from headwater.types import Problem

LoadTeacher = Callable[[Role | TrainNode], Supervisor]
"""Memoized loader of the frozen models that a stage queries: `NodeContext.teacher`, cached while the stage runs."""


@dataclass(frozen=True)
class NodeContext:
    """What a node needs besides its own description.

    ranks    the processes that run the node together
    scratch  node folder of a rank other than the first, for what the first rank writes to the run directory; None on the
             first rank
    """

    plan: Plan
    inputs: RunInputs
    out: RunDir
    progress: NodeProgress
    ranks: ProcessGroup = SINGLE_PROCESS
    scratch: NodeDir | None = None

    def node_dir(self, node: Node) -> NodeDir:
        folder = self.out.node(self.plan.names[node])
        return folder if self.scratch is None or self.scratch.name != folder.name else self.scratch

    def spend(self, node: Node) -> Spend:
        """An empty ledger row of the node."""
        return Spend(self.plan.names[node], node.stage, node.seed, 0, "train")

    def load(self, source: Role | TrainNode, frozen: bool, adapter: AdapterSpec | None = None) -> Policy:
        """Load a base model of the recipe, or the model that a node trained."""
        models, device = self.inputs.recipe.models, self.inputs.device
        if isinstance(source, TrainNode):
            path, fingerprint = self.node_dir(source).model, self.plan.fingerprints[source]
            self.node_dir(source).refuse_damage(f"{path.name}/")
            folder = ModelFolder.open(str(path), str(path), models.trust_remote_code)
        else:  # several teachers by tag have no role of their own here: they are queried (`frozen`), never trained
            folder, fingerprint = self.inputs.model_folder(source), None
        return load_policy(folder, LoadOptions(models, device, frozen, adapter, fingerprint, self.ranks))

    def frozen(self, source: Role | TrainNode, stage: Stage | None = None) -> Teacher:
        """Load a model that only samples and scores. A base teacher may be a server, or several models by tag."""
        inputs = self.inputs
        if source != "teacher" or is_single_local_model(inputs.recipe):
            return offload_if_configured(self.load(source, frozen=True), inputs.recipe, inputs.sampler)
        return load_base_teacher(inputs.recipe, stage, inputs.all_problems, inputs.sampler, inputs.device, self.ranks)

    def teacher(self, source: Role | TrainNode, node: StageNode) -> Supervisor:
        """Load a model that supervises a node's stage. It has its own prompt and token ids where the recipe gives it some."""
        return self.translated_teacher(self.frozen(source, node.settings), base_of(source), node)

    def translated_teacher(self, model: Teacher, role: Role, node: StageNode) -> Supervisor:
        """A model of this role that supervises a node's stage, behind the prompts and token ids that it reads there."""
        return translated_teacher(model, (node.learner, role), node.settings.dense, self.inputs)

    def labels_shown(self, node: StageNode) -> frozenset[str]:
        """Problems whose gold answer the teacher of a node's rollouts reads in its context."""
        teacher = self.inputs.recipe.prompt.teacher
        reads = teacher is not None and teacher.privileged is not None and reads_contexts(node)
        return self.inputs.labeled.answer_in_context if reads else frozenset()

    def trainee(self, node: TrainNode) -> Policy:
        """Load the model that a stage trains: all weights, or a LoRA adapter on frozen ones."""
        settings = node.lora(self.inputs.recipe)
        adapter = None if settings is None else AdapterSpec(settings, (node.seed, node.stage, node.pool))
        return self.load(node.start, frozen=False, adapter=adapter)

    def reference(self, node: TrainNode, policy: Policy) -> Policy:
        """The stage's initial weights, frozen: the base under a LoRA adapter, or a second copy.

        A copy that follows the policy (`dense.start_update`) is in float32, as the policy is: a small change would be rounded away.
        Under an adapter it is a copy of the adapter alone.
        """
        follows = node.settings.dense.start_update is not None
        if policy.adapter is not None:
            return policy.following() if follows else policy.reference()
        reference = self.load(node.start, frozen=not follows)
        reference.model.requires_grad_(False).eval()
        return reference

    def sampling_copy(self, node: TrainNode) -> Policy:
        """A frozen model for the policy's weights, whole on every rank, which samples while the policy trains."""
        copy = replace(self, ranks=SINGLE_PROCESS).load(node.start, frozen=True)
        for parameter in copy.model.parameters():
            parameter.data = parameter.data.clone()  # as the trained weights: not mapped from a file
        return copy

    def steps(self, node: TrainNode) -> int:
        """Maximum steps of a stage: the recipe's, or as many as match another arm's FLOPs."""
        return node.matched_steps(self.inputs.steps(node.pool, node.settings), self.flops)

    def flops(self, node: Node) -> float:
        """Training FLOPs of a finished node, from its ledger."""
        return ledger.totals(read_jsonl(self.node_dir(node).ledger)).flops

    def sampler(self, policy: Supervisor) -> Sampler:
        return policy if isinstance(policy, TranslatedTeacher) else sampler_for(policy, self.inputs.sampler)

    def prompter(self, node: Node, policy: Supervisor) -> Prompter:
        """A prompter for a node's rollouts, with the prompt settings of its learner."""
        return self.inputs.prompter(policy.tokenizer, node.learner)

    def grade_held_out(
        self,
        node: Node,
        policy: Teacher,
        held_out: tuple[Sequence[Problem], Labels],
        purpose: Purpose,
        step: int,
        draw: Sequence[str | int],
        progress: Callable[[int], None] | None = None,
    ) -> tuple[list[dict[str, Any]], Spend]:
        """Grade the policy on problems that no stage trains on: one row per completion (`evaluate`), and the ledger row.

        The caller records the ledger row. Raises TrainingStoppedError when the model's log-probs are not finite.
        """
        problems, labels = held_out
        with after_step(step):
            rows, cost = evaluate(
                self.sampler(policy),
                self.prompter(node, policy),
                problems,
                labels,
                self.inputs.recipe.evaluate,
                draw,
                self.inputs.task.extract,
                progress,
            )
        tokens = cost["tokens_sampled"] + cost["tokens_prompt"]
        spend = replace(
            self.spend(node),
            purpose=purpose,
            step=step,
            labels=tuple(problem.id for problem in problems),
            checks=int(cost["checks"]),
            tokens_sampled=int(cost["tokens_sampled"]),
            flops=policy.shape.flops(tokens, tokens / max(1, cost["checks"])),
            seconds=cost["seconds"],
        )
        return rows, spend


@contextlib.contextmanager
def after_step(step: int) -> Iterator[None]:
    """Prefix the sentence of a TrainingStoppedError with the number of finished steps."""
    try:
        yield
    except TrainingStoppedError as error:
        raise TrainingStoppedError(f"after step {step}: {error}") from None
