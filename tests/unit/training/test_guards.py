"""Guards: values by hand, actions, and equal decisions after a resume."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headwater.config.builtin import find_recipe
from headwater.config.guards import GUARDS, Guards
from headwater.errors import TrainingStoppedError, UserError
from headwater.losses.objectives import objective_of
from headwater.models.policy import Policy
from headwater.storage.files import append_jsonl
from headwater.storage.node_dir import NodeDir
from headwater.training.guards import MEASURES, GuardMonitor, StageOutcomes, Windows, jump
from headwater.training.update import make_optimizer, update
from runs import rows
from tiny import same_bits, sampled_rows, stage_of, weights_of

Steps = list[dict[str, Any]]


def monitor(folder: Path, steps: int = 100, **settings: Any) -> tuple[GuardMonitor, list[str]]:
    """A GuardMonitor with these guards alone, windows of two steps, and the list that receives its warnings.

    steps  length of the stage
    """
    off = dict.fromkeys(GUARDS, "off")
    guards = {
        name: {"window": 2, **({"action": setting} if isinstance(setting, str) else setting)}
        for name, setting in settings.items()
    }
    heard: list[str] = []
    stage = StageOutcomes(NodeDir(folder), "stages.opd", 48)
    return GuardMonitor(Guards.model_validate({**off, **guards}), stage, steps, heard.append), heard


def steps(**columns: list[float]) -> Steps:
    count = len(next(iter(columns.values())))
    return [{"step": place + 1, **{name: values[place] for name, values in columns.items()}} for place in range(count)]


def sounded(folder: Path, guards: Any, given: Steps) -> list[tuple[int, str, float]]:
    """(step, guard, figure) of every alarm that begins."""
    ours, _ = monitor(folder, **guards)
    for row in given:
        assert ours.check(row) is None
    path = folder / "warnings.jsonl"
    return [(row["step"], row["guard"], pytest.approx(row["figure"])) for row in rows(path)] if path.exists() else []


@pytest.mark.parametrize(
    ("guard", "bound", "columns", "expected"),
    [
        # Means of two: 0.3, 0.6, 0.8: above 0.5 from step 3 on; told once.
        ("truncation", 0.5, {"truncated": [0.2, 0.4, 0.8, 0.8]}, [(3, 0.6)]),
        ("truncation", 0.5, {"truncated": [0.5, 0.5, 0.5]}, []),
        # Above, below, above again: told twice.
        ("truncation", 0.5, {"truncated": [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]}, [(2, 1.0), (6, 1.0)]),
        ("sampler_gap", 0.05, {"sampler_gap": [0.0, 0.2]}, [(2, 0.1)]),
        # Shares 0.25, 0.005, 0.0: at or below 0.01 from step 3 on.
        ("no_variance", 0.01, {"informative": [0.49, 0.01, 0.0, 0.0]}, [(3, 0.005)]),
        ("no_variance", 0.0, {"informative": [0.1, 0.0, 0.0]}, [(3, 0.0)]),
        # First window 1.0; later 0.5, 0.02, 0.0: below 3 % at step 4.
        ("entropy_collapse", 0.03, {"entropy": [1.2, 0.8, 0.02, 0.02]}, [(4, 0.02)]),
        ("entropy_collapse", 0.03, {"entropy": [0.001, 0.001, 0.001]}, []),  # low, but no lower than it was
        # A student that nears a sure teacher becomes sure: nothing to say where a teacher is compared with.
        ("entropy_collapse", 0.03, {"entropy": [1.0, 1.0, 0.0, 0.0], "kl_student_teacher": [0.1] * 4}, []),
        # Means 2.0, 0.5, 1.0, 2.0: 1.5 above the lowest at step 5.
        ("kl_explosion", 1.0, {"kl_student_teacher": [3.0, 1.0, 0.0, 2.0, 2.0]}, [(5, 1.5)]),
        ("kl_explosion", 1.0, {"kl_student_teacher": [9.0, 7.0, 5.0, 3.0]}, []),  # a cold student's is high, and falls
        ("kl_explosion", 1.0, {"kl_reference": [0.0, 0.0, 1.0, 3.0]}, [(4, 2.0)]),
        # Of two divergences the worse counts.
        ("kl_explosion", 1.0, {"kl_student_teacher": [0.0] * 4, "kl_teacher_student": [0, 0, 0, 4]}, [(4, 2.0)]),
        # Means 0.525, 0.09, 0.03: at or below 0.1 from step 3 on.
        ("teacher_uniform", 0.1, {"teacher_contrast": [0.9, 0.15, 0.03, 0.03]}, [(3, 0.09)]),
        # Medians 0.1 and 1.1 at step 4: 1.0 / (0 + 0.05). Rollouts from a cache, without a sampler_gap, are skipped.
        ("teacher_jump", 10.0, {"kl_student_teacher": [0.1, 0.1, 0.1, 2.1], "sampler_gap": [0.0] * 4}, [(4, 20.0)]),
        ("teacher_jump", 10.0, {"kl_student_teacher": [0.1, 0.1, 0.1, 2.1]}, []),
        ("teacher_jump", 10.0, {"kl_student_teacher": [3.0, 2.0, 1.0, 0.5, 0.3], "sampler_gap": [0.0] * 5}, []),
    ],
)  # fmt: skip
def test_each_guard_by_hand(
    guard: str, bound: float, columns: dict[str, list[float]], expected: list[tuple[int, float]], tmp_path: Path
) -> None:
    alarms = sounded(tmp_path, {guard: {"action": "warn", "bound": bound}}, steps(**columns))
    assert alarms == [(step, guard, figure) for step, figure in expected]


def test_jump_ignores_odd_steps_and_grows_with_calm_before_it() -> None:
    # Five alike with one odd step: medians 0.1 and 0.1. Then 0.9 for good: 0.8 / 0.05 once three of five steps have it.
    windows, figures = Windows(5), []
    for value in (0.1, 0.1, 9.0, 0.1, 0.1, 0.1, 0.1, 0.1, 9.0, 0.1, 0.1, 0.9, 0.9, 0.9):
        windows.add(value)
        figures.append(jump(windows))
    assert figures[:9] == [None] * 9 and figures[9:12] == [0.0, 0.0, 0.0]
    assert figures[12:] == [pytest.approx(0.8 / 0.05)] * 2


def test_guard_ignores_partial_windows_and_rows_without_its_metric(tmp_path: Path) -> None:
    ours, heard = monitor(tmp_path, truncation="warn")
    for row in (*steps(truncated=[1.0]), {"step": 2, "loss": 0.0}):
        assert ours.check(row) is None
    assert not heard
    ours.check({"step": 3, "truncated": 1.0})
    assert heard == [
        "truncation: 100 % of the completions reached the token limit (window of 2 steps; bound 0.5): "
        "raise stages.opd.sampling.max_tokens"
    ]


@pytest.mark.parametrize(
    ("guard", "window", "length", "columns", "expected"),
    [
        # A window of 20 in a stage of 3 steps is one of 3: the mean of all.
        ("truncation", 20, 3, {"truncated": [0.4, 0.6, 0.8]}, [(3, 0.6)]),
        ("truncation", 20, 1, {"truncated": [1.0]}, [(1, 1.0)]),
        ("no_variance", 10, 2, {"informative": [0.0, 0.0]}, [(2, 0.0)]),
        # Guards that compare with an earlier window need two: of 2 steps in a stage of 4 or 5. Two steps are too few to compare.
        ("kl_explosion", 10, 4, {"kl_reference": [0.0, 0.0, 1.0, 3.0]}, [(4, 2.0)]),
        ("kl_explosion", 10, 5, {"kl_reference": [0.0, 0.0, 0.0, 1.0, 3.0]}, [(5, 2.0)]),
        ("entropy_collapse", 10, 4, {"entropy": [1.0, 1.0, 0.01, 0.01]}, [(4, 0.01)]),
        ("kl_explosion", 10, 2, {"kl_reference": [0.0, 9.0]}, []),
        ("kl_explosion", 1, 2, {"kl_reference": [0.0, 9.0]}, [(2, 9.0)]),  # unless the recipe asks for it
        ("truncation", 2, 3, {"truncated": [0.0, 0.4, 0.8]}, [(3, 0.6)]),  # one that fits stays as it is
    ],
)  # fmt: skip
def test_guard_window_fits_short_stages(
    guard: str, window: int, length: int, columns: dict[str, list[float]], expected: list[Any], tmp_path: Path
) -> None:
    ours, heard = monitor(tmp_path, length, **{guard: {"action": "warn", "window": window}})
    for row in steps(**columns):
        ours.check(row)
    path = tmp_path / "warnings.jsonl"
    warnings = [(row["step"], pytest.approx(row["figure"])) for row in rows(path)] if path.exists() else []
    assert warnings == expected and len(heard) == len(expected)


def test_no_variance_guard_names_largest_cause_in_its_window(tmp_path: Path) -> None:
    ours, heard = monitor(tmp_path, no_variance="warn")
    for step, finish in ((1, "stop"), (2, "length"), (3, "length")):  # the window of step 3 holds the last two
        row = {"correct": False, "reason": "different", "finish": finish}
        append_jsonl(NodeDir(tmp_path).rollouts(step), [row] * 4)
        ours.check({"step": step, "informative": 0.0 if step > 1 else 0.5})
    assert heard == [
        "no_variance: 0 % of the groups have rewards that differ (window of 2 steps; bound 0.01); 100 % of the completions "
        "were cut at max_tokens = 48: raise stages.opd.sampling.max_tokens or, if the answers never end, lower "
        "stages.opd.sampling.temperature or check stop ids and chat template"
    ]


def test_guard_stop_names_value_bound_and_remedy_also_after_resume(tmp_path: Path) -> None:
    given = steps(truncated=[0.2, 0.4, 0.8])
    ours, _ = monitor(tmp_path, truncation="stop", no_variance="warn")
    result = [ours.check(row) for row in given]
    assert result[:2] == [None, None]
    why = str(result[2])
    assert "guard truncation: 60 % of" in why and "bound 0.5" in why and "guards.truncation=warn" in why
    for cut in range(3):  # whatever part of the steps was there before
        again, heard = monitor(tmp_path / str(cut), truncation="stop", no_variance="warn")
        assert again.catch_up(given[:cut]) is None and not heard
        assert [again.check(row) for row in given[cut:]] == result[cut:]
    stopped, heard = monitor(tmp_path / "all", truncation="stop")
    assert stopped.catch_up(given) == why and not heard
    for action in ("warn", "off"):
        eased, _ = monitor(tmp_path / action, truncation=action)
        assert eased.catch_up(given) is None


def test_guard_settings_of_recipe_override_defaults(tmp_path: Path) -> None:
    guards = find_recipe("pocket", []).guards
    assert {name: getattr(guards, name) for name in GUARDS} == GUARDS
    stops = {name for name, guard in GUARDS.items() if guard.action == "stop"}
    assert stops == {"teacher_uniform", "teacher_jump"} and GUARDS.keys() == MEASURES.keys()
    changes = ["guards.truncation=stop", "guards.no_variance=off", "guards.sampler_gap.bound=0.2", "guards.patience=5"]
    guards = find_recipe("pocket", changes).guards
    assert guards.truncation.model_dump() == {"action": "stop", "bound": 0.5, "window": 10}
    assert guards.no_variance.action == "off"  # YAML reads `off` as false
    assert guards.sampler_gap.model_dump() == {"action": "warn", "bound": 0.2, "window": 10}
    assert guards.patience == 5
    for wrong in ("guards.truncation=loud", "guards.truncation.bound=-1", "guards.kl=stop", "guards.truncation=[1]",
                  "guards.truncation=true", "guards.truncation.windows=3", "guards.truncation.bound=.nan"):  # fmt: skip
        with pytest.raises(UserError, match=wrong.split("=")[0].rpartition(".")[0]):
            find_recipe("pocket", [wrong])
    with pytest.raises(UserError, match="guards"):
        find_recipe("pocket", ["guards=3"])


# In a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_non_finite_loss_or_gradient_keeps_weights_and_optimizer_state(policy: Policy, bad: float) -> None:
    rows_, stage = sampled_rows(policy), stage_of("grpo")
    optimizer = make_optimizer(policy, stage.optim)
    update(policy, optimizer, rows_, objective_of(stage), 4096)

    def state() -> dict[str, torch.Tensor]:
        held_ = optimizer.state_dict()["state"]
        return {f"{place}.{key}": value.clone() for place, entry in held_.items() for key, value in entry.items()}

    weights, before = weights_of(policy), state()
    rows_[3] = replace(rows_[3], advantage=bad)
    with pytest.raises(TrainingStoppedError, match="not finite"):
        update(policy, optimizer, rows_, objective_of(stage), 4096)
    assert same_bits(weights_of(policy), weights) and same_bits(state(), before)
    assert before and any(value.ndim for value in before.values())
