"""The recipe reference: one field or a section for a terminal, and a JSON schema for editors."""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

from headwater.config import yaml
from headwater.config.builtin import builtin_names, builtin_text
from headwater.config.fields import ANY_NAME, SchemaField, walk
from headwater.config.recipe import Recipe
from headwater.config.validation import intended_field
from headwater.errors import UserError, did_you_mean


def explain(path: str, width: int = 80) -> str:
    """What the reference says about a field, or about a section and each of its fields. Raises UserError for an unknown path.

    Example: `explain("stages.opd.optim.lr")` has the lines `type     number > 0` and `default  1e-06`.
    """
    if not path:
        return _section_text("", fields_of(""), width)
    name = _known_path(path)
    field = FIELDS[name]
    lines = [path, *_wrapped(field.description, width)]
    facts = {"type": field.type_text, "default": default_text(field), "unit": field.unit}
    lines += [f"  {key:8} {value}" for key, value in facts.items() if value]
    if field.section is None:
        return "\n".join([*lines, *_wrapped(_shipped_values(path), width)])
    return "\n".join([*lines, "", _section_text(f"{path}.", fields_of(name), width)])


def _shipped_values(path: str) -> str:
    """The field's values in the built-in recipes. Example: `set in pocket to 0.001, in gsm8k to 5e-05`."""
    values = []
    for name in builtin_names():
        value: Any = yaml.read(builtin_text(name), name)
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            values.append(f"in {name} to {value_text(value)}")
    return f"set {', '.join(values)}" if values else ""


def fields_of(section: str) -> list[SchemaField]:
    """The fields of a section, or of an entry where it is a mapping; "" is the recipe itself."""
    return [field for field in FIELDS.values() if field.path.rpartition(".")[0].removesuffix(f".{ANY_NAME}") == section]


def _known_path(path: str) -> str:
    """The schema's path of a field, in which NAME stands for the user's own keys."""
    for name in FIELDS:
        pattern = re.escape(name).replace(ANY_NAME, r"[^.]+")
        if re.fullmatch(pattern, path):
            return name
    mapping = path.rpartition(".")[0]
    if any(name.startswith(f"{mapping}.{ANY_NAME}.") for name in FIELDS):
        return mapping  # an entry of a mapping, such as data.evals.test, is explained with the mapping
    suggestion = intended_field(tuple(path.split(".")), Recipe) or did_you_mean(path, FIELDS)
    sections = ", ".join(name for name in FIELDS if "." not in name)
    raise UserError(
        f"explain {path}: no such field{suggestion or ';'} {'T' if suggestion else 't'}he sections are {sections}"
    )


def default_text(field: SchemaField) -> str:
    """A field's default as the reference prints it."""
    if field.required and field.name == "objective":
        return "the stage's own"
    if field.required:
        return "none: must be given"
    if field.section is not None and field.default is not None:
        return ""
    return value_text(field.default)


def value_text(value: Any) -> str:
    """A default as it is written in YAML. Example: `value_text(("teacher", "student"))` is `[teacher, student]`."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    plain = isinstance(value, str) and re.fullmatch(r"[\w.:/+-]+", value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _section_text(prefix: str, fields: list[SchemaField], width: int) -> str:
    """One paragraph a field: name, type, default and unit on a line, the description below it."""
    lines = []
    for field in fields:
        default = default_text(field)
        facts = [field.type_text, f"default {default}" if default else "", field.unit]
        name = field.path.removeprefix(prefix).rpartition(".")[2]
        lines += _wrapped(f"{name}: {', '.join(fact for fact in facts if fact)}", width, indent=0, hanging=4)
        lines += _wrapped(field.description, width, indent=4)
    return "\n".join(lines)


def _wrapped(text: str, width: int, indent: int = 2, hanging: int | None = None) -> list[str]:
    after = indent if hanging is None else hanging
    return textwrap.wrap(
        text, width, initial_indent=" " * indent, subsequent_indent=" " * after, break_on_hyphens=False
    )


def json_schema() -> dict[str, Any]:
    """JSON schema of recipe files (draft 2020-12), for editors, with the short forms that validators complete."""
    schema = Recipe.model_json_schema()
    sections = schema["$defs"]
    sections["Source"] = {"anyOf": [{"type": "string"}, sections["Source"]]}
    for name in ("Guard", "ShareGuard"):
        sections[name].pop("required")
        sections[name] = {"anyOf": [{"enum": ["warn", "stop", "off", False]}, sections[name]]}
    assert sections["Stage"].pop("required") == ["objective"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Headwater recipe"}


FIELDS = {field.path: field for field in walk(Recipe)}
"""Every field of the recipe by its path, in the order of the schema."""
