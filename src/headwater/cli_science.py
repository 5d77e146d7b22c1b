"""The verbs that measure: readiness before labels are spent, and how the outcome moves with one thing."""

from __future__ import annotations

import typer

science = typer.Typer()
