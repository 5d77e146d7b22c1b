"""Nodes of a plan: evaluate a base model, cache a teacher's rollouts, train a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from headwater.config.arm import Pool
from headwater.config.dense import TeacherWeights
from headwater.config.lora import Lora
from headwater.config.recipe import Recipe
from headwater.config.stage import Stage
from headwater.errors import UserError

Role = Literal["student", "teacher", "expert"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Node:
    """One unit of work.

    start  the weights that it begins with: a base model of the recipe, or the node that trained them
    """

    kind: ClassVar[Literal["train", "rollouts", "evaluate"]]

    stage: str
    role: Role
    seed: int
    start: Role | TrainNode

    @property
    def learner(self) -> Role:
        """The role whose token ids its rollouts are in."""
        return self.role

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes whose weights or rollouts it uses."""
        return (self.start,) if isinstance(self.start, Node) else ()

    @property
    def parents(self) -> tuple[Node, ...]:
        """The nodes that must be done before it starts: its inputs, and those that determine its number of steps."""
        return self.inputs

    def ancestry(self) -> Iterator[Node]:
        """Itself and all nodes that it waits for, each once, in topological order."""
        yield from _post_order(self, lambda node: node.parents)

    def lineage(self) -> Iterator[Node]:
        """Itself, its inputs and theirs, in topological order: the nodes, and so the cost, of an arm that ends here."""
        yield from _post_order(self, lambda node: node.inputs)


def _post_order(node: Node, parents: Callable[[Node], tuple[Node, ...]]) -> Iterator[Node]:
    seen: set[Node] = set()

    def visit(node: Node) -> Iterator[Node]:
        if node not in seen:
            for parent in parents(node):
                yield from visit(parent)
            seen.add(node)
            yield node

    yield from visit(node)


@dataclass(frozen=True)
class EvaluateNode(Node):
    """Evaluate a base model."""

    kind = "evaluate"


@dataclass(frozen=True)
class StageNode(Node):
    """A node that runs on a pool of problems with the settings of a stage."""

    pool: Pool
    settings: Stage

    @property
    def aligns_tokenizers(self) -> bool:
        """Whether its teacher may have another tokenizer than its learner."""
        return self.settings.needs_teacher and self.settings.dense.tokenizers != "same"


@dataclass(frozen=True)
class CacheNode(StageNode):
    """Cache the rollouts of a teacher, its `start`, with the settings of the off-policy stage that reads them."""

    kind = "rollouts"

    @property
    def learner(self) -> Role:
        """The role that reads them."""
        return "student" if self.role == "teacher" else "teacher"


@dataclass(frozen=True)
class TrainNode(StageNode):
    """Train a stage and evaluate its model.

    teacher  scores the rollouts of a dense on-policy stage
    cache    the teacher rollouts that an off-policy stage reads
    compute  (like, match): take as many steps as the FLOPs of `match` and its lineage pay for, at the cost per step of `like`
    """

    kind = "train"

    teacher: Role | TrainNode | None = None
    cache: CacheNode | None = None
    compute: tuple[TrainNode, TrainNode] | None = None

    @property
    def inputs(self) -> tuple[Node, ...]:
        return tuple(source for source in (self.start, self.teacher, self.cache) if isinstance(source, Node))

    @property
    def parents(self) -> tuple[Node, ...]:
        return self.inputs + (self.compute or ())

    @property
    def supervisor(self) -> Role | TrainNode | None:
        """Its teacher, live or as cached rollouts; None for a stage without one."""
        return self.teacher if self.cache is None else self.cache.start

    @property
    def c2_teacher(self) -> Role | TrainNode | None:
        """The teacher with which condition C2 compares a student; None for a stage that has none or trains another role."""
        return self.supervisor if self.role == "student" else None

    def lora(self, recipe: Recipe) -> Lora | None:
        """The LoRA settings of this node, its stage's own or its role's; None where it trains all weights."""
        lora = self.settings.lora or recipe.models.lora
        return lora if lora is not None and self.role in lora.roles else None

    def matched_steps(self, steps: int, flops: Callable[[Node], float]) -> int:
        """`steps`; with `compute`, as many as the FLOPs of the matched arm pay for, if it takes any step."""
        if self.compute is None or steps == 0:
            return steps
        unmatched, match = self.compute
        matched = sum(flops(node) for node in match.lineage())
        spent = sum(flops(node) for node in self.lineage() if node != self)
        return max(1, round((matched - spent) / (flops(unmatched) / steps)))

    def scorers(self) -> dict[Role | TrainNode, float]:
        """The frozen models that score the rollouts of an on-policy stage, and the weight of each (`dense.teacher_weights`).

        Models of weight 0 are left out, and a model that two names mean counts once. So λ = 1, and a reference that is the teacher
        itself, are plain distillation. With `dense.gain_over`, the teacher and −1 for the model that it is compared with. Empty for a
        stage without a teacher.

        Raises UserError where `gain_over` names the teacher itself.
        """
        if self.teacher is None:
            return {}
        if (over := self.settings.dense.gain_over) is not None:
            base = "teacher" if over == "base_teacher" else self.start
            if base == self.teacher:
                raise UserError(
                    f"stages.{self.stage}.dense.gain_over: {over} is the teacher itself, which has no gain over itself; run an arm "
                    "that trains the teacher, or leave it out"
                )
            return {self.teacher: 1.0, base: -1.0}
        given = self.settings.dense.teacher_weights or TeacherWeights(teacher=1.0)
        weights: dict[Role | TrainNode, float] = {}
        for source, weight in (
            (self.teacher, given.teacher),
            ("teacher", given.base_teacher),
            (self.start, given.start),
        ):
            weights[source] = weights.get(source, 0.0) + weight
        return {source: weight for source, weight in weights.items() if weight}


def base_of(source: Role | Node) -> Role:
    """The base model whose shape a node's weights have."""
    while isinstance(source, Node):
        source = source.start
    return source
