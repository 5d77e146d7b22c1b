"""Rewrite the tables in docs/arms.md from `headwater.config.arms`: `python -m tools.arms_table`."""

from __future__ import annotations

import re
from pathlib import Path

from headwater.config.arm import Arm
from headwater.config.arms import PAPER_ARMS
from headwater.config.follow_up_arms import FOLLOW_UPS

PAGE = Path(__file__).parents[1] / "docs" / "arms.md"


def with_table(page: str) -> str:
    """The page with its two tables replaced by the facts of the paper's arms and of the follow-ups."""
    tables = iter([_table(PAPER_ARMS), _table(FOLLOW_UPS)])
    return re.sub(r"^\| arm \|.*(?:\n\|.*)*", lambda _: next(tables), page, flags=re.MULTILINE)


def _table(arms: dict[str, Arm]) -> str:
    questions = {name: f"{arm.question} ({arm.source})" if arm.source else arm.question for name, arm in arms.items()}
    rows = [f"| `{name}` | {arm.description} | {questions[name]} |" for name, arm in arms.items()]
    return "\n".join(["| arm | what it is | the question it answers |", "|---|---|---|", *rows])


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
