"""`init --all`: a recipe with every field at its default and its description as the comment."""

from __future__ import annotations

from typing import Any

from headwater.config.commented_yaml import Setting, commented_yaml
from headwater.config.fields import SchemaField
from headwater.config.objectives import default_objective
from headwater.config.reference import fields_of

VALUES: dict[str, Any] = {
    "name": "my-recipe",
    "task": "maths",
    "models.student": "Qwen/Qwen3-0.6B",
    "models.teacher": "Qwen/Qwen3-4B",
    "data.labeled.path": "train.jsonl",
    "data.evals": {"held_out": "test.jsonl"},
}
"""Values of fields without a default of their own, and of what a recipe with labels, teacher and evaluation needs."""
NAMED_VALUES = {"pool": "train", "count": 1000, "metric": "loss"}
"""The same by the field's name, in sections that are commented out."""
SHOWN = ("data.labeled", "stages.teacher_rl", "stages.warmup", "stages.opd", "stages.student_rl")
"""Sections that are written although their default is null."""


def full_recipe() -> str:
    """The YAML text. A section that is null by default is commented out; fields that repeat are described once."""
    head = [
        "# Every field of a recipe at its default. Delete what you do not change: a recipe needs only what its arm uses."
    ]
    return "\n".join([*head, *_fields("", 0, True, set())]) + "\n"


def _fields(path: str, indent: int, comments: bool, seen: set[type]) -> list[str]:
    """Lines of the fields below a path.

    seen  kinds of sections whose fields have been described
    """
    pad, lines = " " * indent, list[str]()
    for field in fields_of(path):
        unit = f" Unit: {field.unit}." if field.unit else ""
        comment = f"{field.description}{unit}" if comments else ""
        value = _value(field)
        if field.section is None or isinstance(value, dict):
            lines += commented_yaml({field.name: Setting(value, comment)}, indent).splitlines()
            continue
        first = field.section not in seen
        seen.add(field.section)
        if field.default is None and field.path not in SHOWN:
            lines += commented_yaml({field.name: Setting(None, comment)}, indent).splitlines()
            block = [f"{pad}{field.name}:", *_fields(field.path, indent + 2, True, seen)] if first else []
            lines += [f"{pad}# {line[indent:]}" for line in block]
        else:
            lines += [f"{pad}# {comment}"] if comment else []
            lines += [f"{pad}{field.name}:", *_fields(field.path, indent + 2, comments and first, seen)]
    return lines


def _value(field: SchemaField) -> Any:
    section, _, name = field.path.rpartition(".")
    if field.path in VALUES or not field.required:
        is_length = name == "epochs" and section in SHOWN
        return VALUES.get(field.path, 1.0 if is_length else field.default)
    if name == "objective":
        return default_objective(section.rpartition(".")[2])
    return NAMED_VALUES.get(name)
