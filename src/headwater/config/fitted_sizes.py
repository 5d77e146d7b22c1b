"""How much the recipe of `headwater init mine` trains: labels, rollouts, lengths and batches, from the facts and a limit of time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from headwater.config.commented_yaml import Setting
from headwater.config.fitted import (
    GROUP,
    JUDGED_GROUPS,
    MOST_LABELS,
    ROLLOUTS,
    STEP_SECONDS,
    USUAL_EFFORT,
    DataFacts,
    DeviceFacts,
    Effort,
    Form,
    ModelFacts,
    Trained,
    max_tokens,
    rounded_up,
)


@dataclass(frozen=True)
class FittedSizes:
    """Sizes for one pair, its data and a device, in one form of training, within an effort."""

    student: ModelFacts
    teacher: ModelFacts
    data: DataFacts
    device: DeviceFacts
    form: Form
    effort: Effort = USUAL_EFFORT

    @property
    def budget(self) -> int:
        """Labels: all up to MOST_LABELS; where time is short, what one pass of a GRPO stage can use, at least 8."""
        effort, fewest = self.effort, self.effort.fewest_rollouts
        affordable = max(effort.fewest_steps, int(effort.stage / self.rl_seconds("teacher", fewest))) * fewest // GROUP
        budget = min(self.data.labels, MOST_LABELS, max(8, affordable))
        return budget // 8 * 8 if budget < self.data.labels else budget

    @property
    def completion(self) -> Setting:
        """`max_tokens` of a completion."""
        positions = [model.positions for model in (self.student, self.teacher) if model.positions is not None]
        return max_tokens(self.data, min(positions, default=None))

    @property
    def longest_prompt(self) -> int:
        return rounded_up(1.25 * self.data.prompt_tokens, 64)

    def seconds(self, rollouts: int, weights: float) -> float:
        """Seconds for rollouts whose completions are half as long as the limit, at 2 FLOPs for each token and weight."""
        return rollouts * (self.completion.value / 2 + self.data.prompt_tokens) * 2 * weights / self.device.flops

    def rl_seconds(self, role: Trained, rollouts: int) -> float:
        """Seconds of a GRPO step: sampling, and a forward and backward pass."""
        return self.seconds(rollouts, 4 * self.model(role).parameters)

    def transfer_seconds(self, rollouts: int) -> float:
        """Seconds of a step of warm-up or OPD: the same for the student, and one pass of the teacher."""
        return self.seconds(rollouts, 4 * self.student.parameters + self.teacher.parameters)

    def model(self, role: Trained) -> ModelFacts:
        return self.student if role == "student" else self.teacher

    @property
    def slow(self) -> bool:
        """Whether the device, and not the data, decides how much is trained."""
        return self.rl_seconds("teacher", ROLLOUTS) > STEP_SECONDS

    @property
    def rollouts(self) -> int:
        """Rollouts of a GRPO step: fewer where it would take too long, or the labels are few."""
        rollouts = ROLLOUTS
        while rollouts > self.effort.fewest_rollouts and (
            self.rl_seconds("teacher", rollouts) > self.effort.step or rollouts // GROUP > self.budget // 4
        ):
            rollouts //= 2
        return rollouts

    @property
    def transfer_rollouts(self) -> int:
        return max(self.effort.fewest_rollouts, self.rollouts // 2)

    @property
    def patience(self) -> int:
        """First steps of a GRPO stage that hold enough groups to judge whether it learns."""
        return max(3, math.ceil(JUDGED_GROUPS * GROUP / self.rollouts))

    @property
    def tight(self) -> bool:
        """Whether time, and not the data, decides how much is trained."""
        return self.slow or (
            self.rollouts < ROLLOUTS and self.rl_seconds("teacher", 2 * self.rollouts) > self.effort.step
        )

    def microbatch(self) -> int:
        """Tokens of a pass; at least one row."""
        row = rounded_up(self.longest_prompt + self.completion.value, 256)
        return max(8192 if self.device.kind == "cuda" else 2048, row)

    def sample_batch(self) -> int:
        numbers = max(1, self.student.cache_numbers, self.teacher.cache_numbers)
        width = 2 if self.form.dtype == "bfloat16" else 4
        row, rows = (self.longest_prompt + self.completion.value) * numbers * width, 256
        while rows > 8 and (rows * row > self.device.memory / 5 or rows > max(16, 2 * self.rollouts)):
            rows //= 2
        return rows
