"""Table of objectives: what recipe, plan and report derive from each row."""

from __future__ import annotations

import pytest

from headwater.config.objectives import OBJECTIVES
from headwater.config.stage import Stage, Stages
from headwater.losses.objectives import LOSSES
from headwater.report.stages import stage_name

STAGE = {"steps": 1, "batch_size": 8, "group_size": 4}


@pytest.mark.parametrize(
    ("objective", "share", "on_policy", "labels", "teacher", "reference"),
    [
        ("grpo", None, True, True, False, True),
        ("opd", None, True, False, True, False),
        ("mixed", 0.0, True, False, True, False),  # opd itself
        ("mixed", 0.5, True, True, True, True),
        ("mixed", 1.0, True, True, False, True),  # grpo itself
        ("forward_kl", None, False, False, True, False),
        ("sft", None, False, False, True, False),  # the teacher samples, and scores nothing
        ("constant", None, True, False, False, False),
    ],
)
def test_stage_needs_follow_from_source_signals_and_share(
    objective: str, share: float | None, on_policy: bool, labels: bool, teacher: bool, reference: bool
) -> None:
    stage = Stage.model_validate({**STAGE, "objective": objective, "sparse_share": share})
    needs = (stage.on_policy, stage.needs_labels, stage.needs_teacher, stage.needs_reference)
    assert needs == (on_policy, labels, teacher, reference)
    without_kl = Stage.model_validate({**stage.model_dump(), "sparse": {"kl_coef": 0.0}})
    assert not without_kl.needs_reference


def test_every_objective_has_loss_and_names_existing_stages() -> None:
    assert LOSSES.keys() == OBJECTIVES.keys()
    for name, spec in OBJECTIVES.items():
        assert spec.stages and set(spec.stages) <= set(Stages.model_fields), name


def test_report_titles_replace_only_those_of_unusual_objectives() -> None:
    titles = {objective: stage_name("opd", objective) for objective in ("opd", "mixed", "constant", "retired")}
    assert titles == {
        "opd": "On-policy distillation",
        "mixed": "On-policy distillation mixed with reward",
        "constant": "Constant advantage",
        "retired": "On-policy distillation",
    }
