"""Measurements of the policy while a stage trains: condition C2 against its teacher, and accuracy on data.validation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from headwater.models.policy import Policy
from headwater.runs.estimate import condition_schedule
from headwater.runs.node import TrainNode
from headwater.runs.node_context import LoadTeacher, NodeContext, after_step
from headwater.sampling.base import requests_for
from headwater.storage import fault_points
from headwater.storage.files import append_jsonl, read_jsonl
from headwater.storage.ledger import record
from headwater.teachers.translated import Supervisor, TranslatedTeacher
from headwater.training import conditions
from headwater.training.conditions import Schedule
from headwater.training.evaluate import refuse_nan
from headwater.training.update import Metrics
from headwater.types import Problem, Rollout

NOTABLE_SHARE = 0.1
"""Share of a stage's FLOPs above which a message says what measuring costs."""


@dataclass(frozen=True)
class StageMeasurements:
    """Measures the policy between the steps of one stage.

    load_teacher  loads the stage's teacher, which the stage itself may query too
    """

    node: TrainNode
    context: NodeContext
    policy: Policy
    load_teacher: LoadTeacher

    def condition_c2(self, step: int, last: bool) -> None:
        """Write a row of conditions.jsonl at the first and the last step and every `conditions.every` steps, unless it is there.

        Raises StopRequested when asked to stop; nothing is written then.
        """
        if step == 0:
            self._say_what_is_measured()
        folder = self.context.node_dir(self.node)
        written = any(row["step"] == step for row in read_jsonl(folder.conditions))
        if self.context.ranks.broadcast(written) or not self._schedule.due(step, last):
            return
        self.context.progress.part("measuring C2")
        settings = self.context.inputs.recipe.conditions
        started = time.perf_counter()
        with after_step(step):
            teacher, teacher_rollouts = self._teacher
            student_rollouts = self._sample(self.policy, "student", step)
        microbatch_tokens = self.context.inputs.recipe.compute.microbatch_tokens
        measured = conditions.measure(
            self.policy,
            teacher,
            student_rollouts,
            teacher_rollouts,
            settings.top_k,
            microbatch_tokens,
            self.context.progress.check_stop,
        )
        append_jsonl(
            folder.conditions,
            [{"step": step, **measured, "top_k": settings.top_k, "problems": len(self._problems)}],
        )
        fault_points.failpoint("conditions.measured")
        rollouts = (*student_rollouts, *teacher_rollouts)
        tokens = sum(rollout.length for rollout in rollouts)
        mean_context = tokens / len(rollouts) / 2
        tokens_sampled = sum(len(rollout.completion_ids) for rollout in student_rollouts)
        student_flops = self.policy.shape.flops(tokens + tokens_sampled, mean_context)
        record(
            folder.ledger,
            replace(
                self.context.spend(self.node),
                purpose="measure",
                step=step,
                tokens_sampled=tokens_sampled,
                tokens_teacher_scored=tokens,
                flops=student_flops + teacher.shape.flops(tokens, mean_context),
                seconds=time.perf_counter() - started,
            ),
        )
        self.context.progress.part("")

    def validation(self, step: int) -> Metrics:
        """Accuracy on `data.validation` at the end of each window of a stage that stops on it, for its row of metrics.jsonl.

        Its checks count apart.
        """
        until, held_out = self.node.settings.until, self.context.inputs.validation
        if until is None or until.metric != "validation" or held_out is None or step == 0 or step % until.every:
            return {}
        rows, spend = self.context.grade_held_out(
            self.node, self.policy, held_out, "validation", step, (self.node.seed, "validation")
        )
        record(self.context.node_dir(self.node).ledger, spend)
        return {"validation": sum(row["correct"] for row in rows) / len(rows)}

    @cached_property
    def _cost(self) -> tuple[Schedule, float]:
        """When condition C2 is measured, and its share of the stage's FLOPs; it depends on nothing that a resume changes."""
        if self.node.c2_teacher is None or not self.context.inputs.condition_problems:
            return Schedule(0, 1), 0.0
        return condition_schedule(self.node, self.context.plan, self.context.inputs, self.context.steps(self.node))

    @property
    def _schedule(self) -> Schedule:
        return self._cost[0]

    def _say_what_is_measured(self) -> None:
        """Tell the user what measuring costs where that is much, and where less is measured than the recipe's defaults."""
        if self.node.c2_teacher is None or not self.context.inputs.condition_problems:
            return
        wanted, (schedule, share) = len(self.context.inputs.condition_problems), self._cost
        settings, say, stage = self.context.inputs.recipe.conditions, self.context.progress.say, self.node.stage
        if schedule.problems == 0:
            assert settings.max_share is not None  # nothing else leaves no problem
            say(
                f"{stage}: condition C2 (how far student and teacher are apart) is not measured, which would take more "
                f"than {100 * settings.max_share:.0f} % of the stage's FLOPs; set conditions.problems or conditions.every "
                "to measure it anyway"
            )
        elif share > NOTABLE_SHARE or (schedule.problems, schedule.every) != (wanted, settings.every):
            times = schedule.measurements(self.context.steps(self.node))
            say(
                f"{stage}: condition C2 (how far student and teacher are apart) is measured {times} times on {schedule.problems} "
                f"problems: at most {100 * share:.0f} % of the stage's FLOPs; conditions.problems: 0 turns it off"
            )

    @cached_property
    def _problems(self) -> Sequence[Problem]:
        return self.context.inputs.condition_problems[: self._schedule.problems]

    @cached_property
    def _teacher(self) -> tuple[Supervisor, list[Rollout]]:
        """The stage's teacher and its rollouts, sampled once."""
        source = self.node.c2_teacher
        assert source is not None
        teacher = self.load_teacher(source)
        if isinstance(teacher, TranslatedTeacher) and teacher.form in ("spans", "sorted"):
            teacher = replace(teacher, form="prefix")  # whatever the loss compares, C2 is a KL
        return teacher, self._sample(teacher, "teacher")

    @cached_property
    def _prompts(self) -> list[tuple[str, tuple[int, ...]]]:
        prompter = self.context.prompter(self.node, self.policy)
        return [(problem.id, prompter.ids(problem)) for problem in self._problems]

    def _sample(self, model: Supervisor, *draw: str | int) -> list[Rollout]:
        requests = requests_for(self._prompts, 1, self.node.seed, "conditions", *draw)
        check_stop = self.context.progress.check_stop
        rollouts = self.context.sampler(model).sample(
            requests, self.node.settings.sampling, lambda finished: check_stop()
        )
        refuse_nan(rollouts)
        return rollouts
