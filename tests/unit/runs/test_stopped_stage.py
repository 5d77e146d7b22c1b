"""A stage that stops: whatever stops it, and wherever it was killed before, its last step is recorded once and whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest

from headwater.config.builtin import find_recipe
from headwater.data.labels import Labels
from headwater.errors import TrainingStoppedError
from headwater.losses.objectives import objective_of
from headwater.models.oom import BatchBudget
from headwater.models.policy import Policy
from headwater.models.prompts import Prompter
from headwater.runs import train_node
from headwater.runs.display import NodeProgress
from headwater.runs.inputs import RunInputs
from headwater.runs.node import TrainNode
from headwater.runs.node_context import NodeContext
from headwater.runs.plan import Plan
from headwater.runs.stage_measurements import StageMeasurements
from headwater.sampling.torch_sampler import TorchSampler
from headwater.storage import fault_points
from headwater.storage.files import read_jsonl
from headwater.storage.node_dir import NodeDir
from headwater.storage.run_dir import RunDir
from headwater.training.rollouts import PolicyRollouts
from headwater.types import Verdict, problem_id
from runs import without_seconds
from tiny import PROMPTS, stage_of, tiny_policy

IDS = {problem_id(str(prompt)): prompt for prompt in PROMPTS}
STAGE = stage_of("grpo", steps=4, batch_size=8, group_size=4, checkpoint_every=0, sampling={"max_tokens": 2})
NO_SIGNAL = ("guards.no_signal=stop", "guards.patience=2")
TRUNCATION = ("guards.no_signal=continue", "guards.truncation.action=stop", "guards.truncation.window=2")


class KilledError(BaseException):
    """Stands for the end of the process: no handler of the project catches it."""


@dataclass
class StageRun:
    """Runs a GRPO stage in a folder on two problems a step, in this process, and counts what its grader is asked.

    right  whether a completion is graded right, by its number within the step
    """

    folder: NodeDir
    right: Callable[[int], bool] = lambda number: False
    graded: list[str] = field(default_factory=list)

    def grade(self, pairs: Any) -> list[Verdict]:
        start = len(self.graded)
        self.graded += [gold for gold, _ in pairs]
        return [Verdict(self.right(start + place), "by hand") for place in range(len(pairs))]

    def __call__(self, *changes: str, fault: Callable[[str, Policy], None] | None = None) -> str | None:
        """Run the stage to its end, or resume it; returns the message with which it stops itself, if it does."""
        recipe = find_recipe("pocket", list(changes))
        policy = tiny_policy()
        node = TrainNode("student_rl", "student", 7, "student", "all", STAGE)
        labels = Labels({name: name for name in IDS}, self.grade, len(IDS))

        def prompter(tokenizer: Any, role: str = "student") -> Prompter:
            return Prompter(tokenizer, recipe.prompt)

        source = PolicyRollouts(
            policy=policy,
            stage=STAGE,
            draw=(7, "student_rl"),
            objective=objective_of(STAGE),
            prompts=IDS,
            sampler=TorchSampler(policy, 4),
            prompter=prompter(policy.tokenizer),
            labels=labels,
            teacher=None,
            reference=None,
            budget=BatchBudget(4096),
        )
        inputs = SimpleNamespace(recipe=recipe, evals={}, validation=None, prompter=prompter, pool=lambda name: [*IDS])
        context = NodeContext(
            plan=cast(Plan, SimpleNamespace(names={node: "node"})),
            inputs=cast(RunInputs, inputs),
            out=cast(RunDir, SimpleNamespace(node=lambda name: self.folder)),
            progress=NodeProgress(lambda *given: None, lambda *given: None, lambda: False),
        )
        with mock.patch.object(train_node, "rollout_source", return_value=source), armed(fault, policy):
            try:
                train_node.train_stage(node, context, policy, STAGE.steps or 0)
            except TrainingStoppedError as error:
                return str(error)
        return None

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.folder.ledger))

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        return list(read_jsonl(self.folder.rollouts(step)))

    def files(self) -> dict[str, Any]:
        """Every row of every log and rollout file by name, without times."""
        paths = [path for path in sorted(self.folder.path.rglob("*.jsonl")) if "checkpoint" not in path.parts]
        return {str(path.relative_to(self.folder.path)): without_seconds(list(read_jsonl(path))) for path in paths}


@contextmanager
def armed(fault: Callable[[str, Policy], None] | None, policy: Policy) -> Iterator[None]:
    fault_points.arm(None if fault is None else lambda name: fault(name, policy))
    try:
        yield
    finally:
        fault_points.arm(None)


def at(point: str, arrival: int, act: Callable[[Policy], None]) -> Callable[[str, Policy], None]:
    """A fault that acts at one arrival at one point, counted from 1."""
    arrivals: Counter[str] = Counter()

    def fault(name: str, policy: Policy) -> None:
        arrivals[name] += 1
        if (name, arrivals[name]) == (point, arrival):
            act(policy)

    return fault


def spoil_weights(policy: Policy) -> None:
    policy.model.model.embed_tokens.weight.data[:] = float("nan")


def out_of_memory(policy: Policy) -> None:
    raise TrainingStoppedError("memory ran out")


def kill(policy: Policy) -> None:
    raise KilledError


def every_other(number: int) -> bool:
    return number % 2 == 0


def assert_recorded(run: StageRun, steps: int, graded: list[str]) -> None:
    """The ledger, the metrics and the rollouts hold these steps once each, and exactly what the grader was asked."""
    ledger = run.ledger
    assert [row["step"] for row in ledger] == list(range(1, steps + 1))
    assert [row["step"] for row in read_jsonl(run.folder.metrics)] == list(range(1, steps + 1))
    assert sum(row["checks"] for row in ledger) == len(graded)
    assert {label for row in ledger for label in row["labels"]} == set(graded)
    for row in ledger:
        rollouts = run.rollouts(row["step"])
        assert Counter(rollout["problem_id"] for rollout in rollouts).keys() == set(row["labels"])
        assert (len(rollouts), sum(rollout["tokens"] for rollout in rollouts)) == (row["checks"], row["tokens_sampled"])
        assert all("correct" in rollout for rollout in rollouts)


# What stops a stage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "right", "fault", "message", "graded"),
    [
        (
            NO_SIGNAL,
            lambda number: False,
            None,
            "4 labels were used; raise stages.student_rl.sampling.max_tokens",
            16,
        ),
        (TRUNCATION, every_other, None, "guard truncation", 16),
        # The weights turn NaN after the second step is graded, so that its loss is NaN.
        (NO_SIGNAL, every_other, at("step.gathered", 2, spoil_weights), "the loss is not finite", 16),
        # The sampler finishes four completions at a time: the third and fourth arrivals are those of step 2.
        (NO_SIGNAL, every_other, at("rollouts.arrived", 4, out_of_memory), "memory ran out", 16),
        (NO_SIGNAL, every_other, at("rollouts.arrived", 3, out_of_memory), "memory ran out", 12),
    ],
    ids=["no_signal", "guard", "loss", "sampling", "sampling_half"],
)
def test_step_is_recorded_before_training_stops(
    changes: tuple[str, ...], right: Any, fault: Any, message: str, graded: int, tmp_path: Path
) -> None:
    run = StageRun(NodeDir(tmp_path), right)
    why = run(*changes, fault=fault)
    assert why is not None and why.startswith("step 2 of 4: ") and message in why
    assert len(run.graded) == graded
    assert_recorded(run, 2, run.graded)


@pytest.mark.parametrize("measurement", ["condition_c2", "validation"])
def test_step_is_recorded_before_measurement_stops_training(tmp_path: Path, measurement: str) -> None:
    def measure(self: Any, step: int, last: bool = False) -> dict[str, float]:
        if step == 2:
            raise TrainingStoppedError("after step 2: the log-probs are not finite")
        return {}

    run = StageRun(NodeDir(tmp_path), every_other)
    with mock.patch.object(StageMeasurements, measurement, measure):
        assert run() == "after step 2: the log-probs are not finite"
    assert_recorded(run, 2, run.graded)


def test_step_is_recorded_when_scoring_stops_training(tmp_path: Path) -> None:
    def score(self: Any, rows: Any, scored: Any) -> Any:
        return out_of_memory(self.policy)

    run = StageRun(NodeDir(tmp_path), every_other)
    with mock.patch.object(PolicyRollouts, "_score", score):
        assert run() == "step 1 of 4: memory ran out"
    assert len(run.graded) == 8
    assert_recorded(run, 1, run.graded)


def test_stage_stopped_before_grading_records_nothing(tmp_path: Path) -> None:
    run = StageRun(NodeDir(tmp_path), every_other)
    why = run(fault=at("step.begun", 2, spoil_weights))
    assert why is not None and why.startswith("step 2 of 4: the model's log-probs are not finite")
    assert_recorded(run, 1, run.graded)


# Killed, and run again ------------------------------------------------------------------------------------------------


def arrivals_of_the_last_step(folder: Path, right: Any, spoiled: bool) -> list[tuple[str, int]]:
    """(point, arrival) of every failpoint that a stopping stage passes after it has begun its second and last step."""
    counts: Counter[str] = Counter()
    passed: list[tuple[str, int]] = []
    spoil = at("step.gathered", 2, spoil_weights)

    def fault(name: str, policy: Policy) -> None:
        counts[name] += 1
        if counts["step.begun"] == 2:
            passed.append((name, counts[name]))
        if spoiled:
            spoil(name, policy)

    StageRun(NodeDir(folder), right)(*NO_SIGNAL, fault=fault)
    return passed


@pytest.mark.parametrize("spoiled", [False, True], ids=["no_signal", "loss"])
def test_stage_killed_before_its_stop_spends_and_reports_same(spoiled: bool, tmp_path: Path) -> None:
    right = every_other if spoiled else lambda number: False
    whole = StageRun(NodeDir(tmp_path / "whole"), right)
    spoil = partial(at, "step.gathered", 2, spoil_weights)
    message = whole(*NO_SIGNAL, fault=spoil() if spoiled else None)
    passed = arrivals_of_the_last_step(tmp_path / "counted", right, spoiled)
    assert {"rollouts.arrived", "verdicts.checked", "step.gathered", "append.torn", "step.kept"} <= dict(passed).keys()
    for point, arrival in passed:
        run = StageRun(NodeDir(tmp_path / f"{point}-{arrival}"), right)
        killing, spoiling = at(point, arrival, kill), spoil()

        def both(name: str, policy: Policy, killing: Any = killing, spoiling: Any = spoiling) -> None:
            if spoiled:
                spoiling(name, policy)
            killing(name, policy)

        with pytest.raises(KilledError):
            run(*NO_SIGNAL, fault=both)
        run.graded.clear()
        assert run(*NO_SIGNAL, fault=spoil() if spoiled else None) == message, point
        assert run.files() == whole.files(), point


@pytest.mark.parametrize(
    ("stopping", "easing"),
    [(NO_SIGNAL, ("guards.no_signal=continue",)), (TRUNCATION, ("guards.no_signal=continue",)),
     (NO_SIGNAL, ("guards.no_signal=stop", "guards.patience=4"))],
)  # fmt: skip
def test_stopped_stage_run_again_spends_nothing_twice(
    stopping: tuple[str, ...], easing: tuple[str, ...], tmp_path: Path
) -> None:
    run = StageRun(NodeDir(tmp_path))
    message = run(*stopping)
    before, graded = run.files(), len(run.graded)
    assert run(*stopping) == message and run.files() == before and len(run.graded) == graded
    run(*easing)
    assert_recorded(run, 4, run.graded)
    assert run.ledger[:2] == before["ledger.jsonl"] or without_seconds(run.ledger[:2]) == before["ledger.jsonl"]


def test_stopped_stage_run_again_with_less_patience_stops_at_once(tmp_path: Path) -> None:
    run = StageRun(NodeDir(tmp_path))
    run("guards.no_signal=stop", "guards.patience=3")
    graded = len(run.graded)
    why = run("guards.no_signal=stop", "guards.patience=2")
    assert why is not None and why.startswith("step 3 of 4: ")
    assert len(run.graded) == graded == 24
