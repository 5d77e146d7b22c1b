"""Rewrite the table in docs/arms.md from `headwater.config.arms.ARMS`: `python -m tools.arms_table`."""

from __future__ import annotations

import re
from pathlib import Path

from headwater.config.arms import ARMS

PAGE = Path(__file__).parents[1] / "docs" / "arms.md"


def with_table(page: str) -> str:
    """The page with its table replaced by the facts of `ARMS`."""
    rows = [f"| `{name}` | {arm.description} | {arm.question} |" for name, arm in ARMS.items()]
    table = "\n".join(["| arm | what it is | the question it answers |", "|---|---|---|", *rows])
    return re.sub(r"^\| arm \|.*(?:\n\|.*)*", lambda _: table, page, flags=re.MULTILINE)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
