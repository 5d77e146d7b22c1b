"""Choose the arm of `run` without --arm: from the run directory, its probe, or the recipe."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from headwater.config.arms import ARMS, BASE_MODELS, DEFAULT_ARM, DESCRIPTIONS, default_arm, missing_fields
from headwater.config.recipe import Recipe
from headwater.errors import UserError
from headwater.storage.files import read_json
from headwater.storage.run_dir import RunDir
from headwater.storage.untrusted import read_plan, refuse_malformed_files


@dataclass(frozen=True)
class ArmChoice:
    """An arm, and why it runs."""

    arm: str
    because: str

    @property
    def sentence(self) -> str:
        """Example: "arm bridge (GRPO on the teacher → warm-up → OPD): the default; choose another with --arm"."""
        return f"arm {self.arm} ({DESCRIPTIONS[self.arm]}): {self.because}; choose another with --arm"


def choose_arm(recipe: Recipe, out: Path) -> ArmChoice:
    """The arm of a run in folder `out` where the user names none.

    The one that the folder already holds, so that the same command resumes it; else what a probe of this recipe advised there;
    else `bridge_rl`, if the recipe stops OPD at a plateau and keeps half of its labels for then; else `config.arms.default_arm`.
    """
    with contextlib.suppress(OSError, UserError):  # the run itself says what is wrong with its folder
        folder = RunDir(out)
        earlier = read_plan(folder.plan)["arms"] if folder.plan.exists() else {}
        trained = [arm for arm in earlier if arm not in BASE_MODELS]
        if len(trained) == 1 and trained[0] in DESCRIPTIONS:
            return ArmChoice(trained[0], f"{out} holds a run of it")
        if not trained and (advised := _probed_arm(folder)) is not None:
            return advised
    arm, opd = default_arm(recipe), recipe.stages.opd
    if arm != DEFAULT_ARM:
        missing = ", ".join(missing_fields(ARMS[DEFAULT_ARM], recipe))
        return ArmChoice(arm, f"the recipe has no {missing}, which {DEFAULT_ARM} needs")
    plateau = opd is not None and opd.until is not None and recipe.labels.split == "half"
    if plateau and not missing_fields(ARMS["bridge_rl"], recipe):
        return ArmChoice(
            "bridge_rl",
            "the recipe stops OPD at a plateau (stages.opd.until) and keeps half of the labels for then (labels.split: half)",
        )
    spent = "all labels" if recipe.labels.split == "full" else "half of the labels (labels.split)"
    return ArmChoice(
        DEFAULT_ARM, f"the default, which spends {spent} on the teacher; `headwater probe` checks whether to"
    )


def _probed_arm(folder: RunDir) -> ArmChoice | None:
    """What probe.json in the folder advises to run; None if there is none, or it advises no arm."""
    if not folder.probe.exists():
        return None
    with refuse_malformed_files(folder.path):
        advice = read_json(folder.probe)["advice"].get("run", {})  # a probe of an earlier version names no arm to run
        if advice.get("arm") not in DESCRIPTIONS:
            return None
        return ArmChoice(advice["arm"], f"advised by the probe in {folder.probe}: {advice['because']}")
