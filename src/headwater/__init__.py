"""Headwater: post-train language models where labels are scarce, with GRPO on a teacher and distillation into a student."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.api import (
        compare_evaluations,
        diagnose,
        evaluate,
        evaluate_each,
        grade,
        probe,
        read_recipe,
        rebuild_report,
        run,
        study,
        validate,
    )
    from headwater.config.recipe import Recipe
    from headwater.doctor.probe_result import ProbeResult
    from headwater.evaluation import EvaluationSettings
    from headwater.report.result import Result

__version__ = "0.1.0"
__all__ = [
    "EvaluationSettings", "ProbeResult", "Recipe", "Result", "__version__", "compare_evaluations", "diagnose", "evaluate",
    "evaluate_each", "grade", "probe", "read_recipe", "rebuild_report", "run", "study", "validate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The functions of the Python API on first use: reading a recipe or a report then needs no tensor library."""
    if name in __all__:
        return getattr(importlib.import_module("headwater.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
