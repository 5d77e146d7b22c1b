"""The table of docs/models.md is what happens: `python -m tests.support.architectures` prints it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.architectures import ARCHITECTURES, EXACT, outcomes, table

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


@pytest.mark.timeout(1200)  # some 40 seconds of a core, on machines that share cores many times that
def test_architecture_table_agrees_with_small_models() -> None:
    results = outcomes(list(ARCHITECTURES))
    page = PAGE.read_text(encoding="utf-8")
    missing = [row for row in table(results).splitlines() if row not in page.splitlines()]
    assert missing == []
    assert [outcome.name for outcome in results if not (outcome.gap <= EXACT and outcome.gradient <= EXACT)] == []
    assert sum(outcome.trains == "exact" for outcome in results) >= 100
