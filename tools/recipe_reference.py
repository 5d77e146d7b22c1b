"""Rewrite docs/recipe-fields.md, the tables of every field of the recipe: `python -m tools.recipe_reference`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from headwater.config.fields import SchemaField
from headwater.config.recipe import Source
from headwater.config.reference import FIELDS, default_text, fields_of
from headwater.config.stage import Stage

PAGE = Path(__file__).parents[1] / "docs" / "recipe-fields.md"
HEAD = """# Recipe fields

Every field of a [recipe](recipe.md), generated from the schema. A field's path joins the heading and the name:
`--set stages.opd.optim.lr=1e-5`. `STAGE` is `teacher_rl`, `warmup`, `opd`, `student_rl` or `sft`;
`SOURCE` is `labeled`, `unlabeled`, `validation` or `evals.NAME`.
`headwater explain stages.opd.optim.lr` prints the same in a terminal.

"""
EXPLAINED_ONCE: dict[type[BaseModel], str] = {Stage: "stages.STAGE", Source: "data.SOURCE"}
"""Sections that several fields hold, and the heading under which the page lists their fields once."""


def markdown() -> str:
    """Every field as one Markdown table a section; fields of stages and of problem sources are listed once."""
    parts = []
    for heading, fields in _page_sections():
        rows = [
            f"| `{field.name}` | {_cell(field.type_text)} | {_cell(default_text(field))} | {field.unit} | {_cell(field.description)} |"
            for field in fields
        ]
        parts.append(
            "\n".join(
                [f"## {heading}", "", "| field | type | default | unit | meaning |", "|---|---|---|---|---|", *rows, ""]
            )
        )
    return HEAD + "\n".join(parts)


def _page_sections() -> Iterator[tuple[str, list[SchemaField]]]:
    yield "The recipe", fields_of("")
    done: set[type[BaseModel]] = set()
    for field in FIELDS.values():
        if field.section is None or (field.section in EXPLAINED_ONCE and field.section in done):
            continue
        heading = field.path
        owner = next((section for section in EXPLAINED_ONCE if field.path.startswith(tuple(_paths_of(section)))), None)
        if owner is not None:
            first = next(_paths_of(owner))
            if not field.path.startswith(first):
                continue
            heading = EXPLAINED_ONCE[owner] + field.path.removeprefix(first)
        done.add(field.section)
        yield heading, fields_of(field.path)


def _paths_of(section: type[BaseModel]) -> Iterator[str]:
    return (field.path for field in FIELDS.values() if field.section is section)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("{", "&#123;")


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
