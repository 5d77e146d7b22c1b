"""Measured differences between arms, as advice cites them: the contrasts of docs/results.md as data, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Evidence:
    """Accuracy of an arm minus that of the bridge at equal labels and FLOPs, in percentage points, with its 95 % interval.

    seeds          training seeds of the study
    recipe         the recipe that it was measured with
    needs_prompts  whether the arm samples labelled problems that the budget does not buy, so that there must be some
    """

    arm: str
    difference: float
    low: float
    high: float
    seeds: int
    recipe: str
    needs_prompts: bool

    def sentence(self) -> str:
        """Example: `+9.0 points [+8.0, +10.0] over bridge at equal labels and FLOPs, on 5 seeds of pocket`."""
        return (
            f"{self.difference:+.1f} points [{self.low:+.1f}, {self.high:+.1f}] over bridge at equal labels and FLOPs, on "
            f"{self.seeds} seeds of {self.recipe}"
        )


MEASURED = (
    Evidence("bridge_plus", 14.1, 11.9, 16.3, 10, "pocket", needs_prompts=True),
    Evidence("bridge_plus", 5.9, 4.1, 7.6, 10, "pocket with the Llama pair", needs_prompts=True),
    Evidence("bridge_plus", -27.0, -30.2, -23.3, 5, "pocket-skills", needs_prompts=True),
    Evidence("every_prompt", 8.6, 6.1, 11.0, 5, "pocket", needs_prompts=True),
    Evidence("short_rl", 0.7, -0.8, 2.1, 5, "pocket", needs_prompts=False),
    Evidence("entropy_aware", 0.3, -1.1, 1.6, 5, "pocket", needs_prompts=False),
    Evidence("exopd_start", 0.2, -0.5, 0.8, 5, "pocket", needs_prompts=False),
    Evidence("soft_or", 0.1, -0.8, 1.0, 5, "pocket", needs_prompts=False),
    Evidence("length_schedule", 0.1, -1.1, 1.5, 5, "pocket", needs_prompts=False),
    Evidence("proximal", -0.7, -1.9, 0.5, 5, "pocket", needs_prompts=False),
)
"""Arms of docs/results.md that were measured at the bridge's labels and FLOPs (within 5 %), gains or not."""


def best_evidence(spare_prompts: int) -> Evidence | None:
    """The measured gain with the highest lower bound, among arms that a recipe with this many unspent prompts can run.

    An arm that was measured to lose on some recipe is not advised: nobody knows which of the recipes a user's resembles.
    """
    losing = {row.arm for row in MEASURED if row.high < 0.0}
    usable = [
        row
        for row in MEASURED
        if row.low > 0.0 and row.arm not in losing and (spare_prompts > 0 or not row.needs_prompts)
    ]
    return max(usable, key=lambda row: row.low, default=None)
