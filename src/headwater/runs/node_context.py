"""What a node has at hand while it runs: the plan, the data, the folder, and who is told how far it is."""

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
from headwater.runs.inputs import RunInputs
from headwater.runs.plan import Node, Plan, Role
from headwater.sampling.base import Sampler
from headwater.storage import ledger
from headwater.storage.ledger import Purpose, Spend
from headwater.storage.run_dir import NodeDir, RunDir, read_jsonl
from headwater.teachers.build import (
    Teacher,
    is_single_local_model,
    load_base_teacher,
    offload_if_configured,
    sampler_for,
)
from headwater.training.evaluate import evaluate
from headwater.training.loop import Metrics
from headwater.types import Problem


def _ignore(said: str) -> None:
    """For those who show nothing."""


@dataclass(frozen=True)
class NodeProgress:
    """Who is told how far a node is: start(steps already done, total, unit), advance(count, metrics), warn(a sentence), say(a line
    for the user)."""

    start: Callable[[int, int, str], None]
    advance: Callable[[int, Metrics], None]
    should_stop: Callable[[], bool]
    warn: Callable[[str], None] = _ignore
    say: Callable[[str], None] = _ignore


Asked = Callable[[Role | Node], Teacher]
"""Whoever a stage asks, loaded once however many ask it: `NodeContext.frozen`, remembered for as long as the stage runs."""


@dataclass(frozen=True)
class NodeContext:
    """What a node needs beside its own description.

    ranks  the processes that run it together
    aside  where this one writes of the node at work what the first rank writes to the run's folder; None for the first
    """

    plan: Plan
    inputs: RunInputs
    out: RunDir
    watch: NodeProgress
    ranks: ProcessGroup = SINGLE_PROCESS
    aside: NodeDir | None = None

    def node_dir(self, node: Node) -> NodeDir:
        found = self.out.node(self.plan.names[node])
        return found if self.aside is None or self.aside.name != found.name else self.aside

    def spend(self, node: Node, stage: str | None = None) -> Spend:
        return Spend(self.plan.names[node], stage or node.stage, node.seed, 0, "train")

    def load(self, whose: Role | Node, frozen: bool, adapt: AdapterSpec | None = None) -> Policy:
        """Base weights of the recipe, or those that a node trained."""
        models, device = self.inputs.recipe.models, self.inputs.device
        if isinstance(whose, Node):
            folder, known = self.node_dir(whose).model, self.plan.fingerprints[whose]
            self.node_dir(whose).refuse_damage(f"{folder.name}/")
            source = ModelFolder.open(str(folder), str(folder), models.trust_remote_code)
            return load_policy(source, LoadOptions(models, device, frozen, adapt, known, self.ranks))
        (field, name), *others = models.named(whose).items()
        assert not others  # several teachers are asked (`frozen`), never trained (`refuse_what_it_cannot`)
        source = ModelFolder.open(name, field, models.trust_remote_code)
        return load_policy(source, LoadOptions(models, device, frozen, adapt, ranks=self.ranks))

    def frozen(self, whose: Role | Node, stage: Stage | None = None) -> Teacher:
        """Whoever is only asked: to sample, and to score for a stage. A base teacher may be elsewhere."""
        inputs = self.inputs
        if whose != "teacher" or is_single_local_model(inputs.recipe):
            return offload_if_configured(self.load(whose, frozen=True), inputs.recipe, inputs.sampler)
        return load_base_teacher(inputs.recipe, stage, inputs.everything, inputs.sampler, inputs.device, self.ranks)

    def trainee(self, node: Node) -> Policy:
        """What a stage trains: all weights, or an adapter on frozen ones."""
        asked = node.lora(self.inputs.recipe)
        adapt = None if asked is None else AdapterSpec(asked, (node.seed, node.stage, node.pool or ""))
        return self.load(node.start, frozen=False, adapt=adapt)

    def reference(self, node: Node, policy: Policy) -> Policy:
        """The stage's starting weights: what is under an adapter, or a frozen copy."""
        return self.load(node.start, frozen=True) if policy.adapter is None else policy.reference()

    def steps(self, node: Node) -> int:
        """How many steps a stage takes at most: the recipe's, or as many as cost what another arm did."""
        assert node.settings is not None and node.pool is not None
        usual = self.inputs.steps(node.pool, node.settings)
        if node.compute is None:
            return usual
        like, as_ = node.compute
        spent = {one: self.flops(one) for one in {*node.lineage(), *like.lineage(), *as_.lineage()} - {node}}
        wanted = sum(spent[one] for one in as_.lineage()) - sum(spent[one] for one in node.lineage() if one != node)
        return max(1, round(wanted / (spent[like] / usual)))

    def flops(self, node: Node) -> float:
        """What a finished node's training cost, from its ledger."""
        return ledger.totals(read_jsonl(self.node_dir(node).ledger)).flops

    def sampler(self, policy: Teacher) -> Sampler:
        return sampler_for(policy, self.inputs.sampler)

    def prompter(self, policy: Teacher) -> Prompter:
        return Prompter(policy.tokenizer, self.inputs.recipe.prompt)


def held_out(
    node: Node,
    context: NodeContext,
    policy: Teacher,
    asked: tuple[Sequence[Problem], Labels],
    purpose: Purpose,
    step: int,
    draw: Sequence[str | int],
    progress: Callable[[int], None] | None = None,
) -> tuple[list[dict[str, Any]], Spend]:
    """Grade the policy on problems that no stage trains on: a row a completion (`evaluate`), and what the looks cost.

    The caller records the spend. Raises TrainingStoppedError that names the stage when the model gives no finite numbers.
    """
    problems, labels = asked
    with named(node, step):
        rows, spent = evaluate(
            context.sampler(policy),
            context.prompter(policy),
            problems,
            labels,
            context.inputs.recipe.evaluate,
            draw,
            context.inputs.task.extract,
            progress,
        )
    tokens = spent["tokens_sampled"] + spent["tokens_prompt"]
    spend = replace(
        context.spend(node),
        purpose=purpose,
        step=step,
        labels=tuple(problem.id for problem in problems),
        checks=int(spent["checks"]),
        tokens_sampled=int(spent["tokens_sampled"]),
        flops=policy.shape.flops(tokens, tokens / max(1, spent["checks"])),
        seconds=spent["seconds"],
    )
    return rows, spend


@contextlib.contextmanager
def named(node: Node, step: int) -> Iterator[None]:
    """Put the stage and the step in front of the sentence with which something below stops."""
    try:
        yield
    except TrainingStoppedError as error:
        raise TrainingStoppedError(f"{node.stage}, after step {step}: {error}") from None


StudyProgress = Callable[[int, float | None], None]


def _ignore_standing(done: int, left: float | None) -> None:
    """For those who do not ask where a study stands."""


@dataclass(frozen=True)
class ProgressDisplay:
    """Who is told what happens.

    say       a line
    node      a context manager that watches one node (title, its number, of how many); several may be open at once
    together  the same for a study with several nodes at work (of how many): it is told (nodes done, seconds left or None)
    """

    say: Callable[[str], None]
    node: Callable[[str, int, int], contextlib.AbstractContextManager[NodeProgress]]
    together: Callable[[int], contextlib.AbstractContextManager[StudyProgress]] = lambda total: contextlib.nullcontext(
        _ignore_standing
    )
