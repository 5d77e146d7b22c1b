"""The table of docs/models.md is what happens: `python -m tests.support.architectures` prints it."""

from __future__ import annotations

from pathlib import Path

from tests.support.architectures import ARCHITECTURES, EXACT, outcomes, table

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


def test_architecture_table_agrees_with_small_models() -> None:
    found = outcomes(list(ARCHITECTURES))
    page = PAGE.read_text(encoding="utf-8")
    missing = [row for row in table(found).splitlines() if row not in page.splitlines()]
    assert missing == []
    assert [one.name for one in found if not (one.gap <= EXACT and one.gradient <= EXACT)] == []
    assert sum(one.trains == "exact" for one in found) >= 100
