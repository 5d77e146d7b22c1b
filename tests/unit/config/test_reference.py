"""The recipe reference: explanations, the page's tables and the JSON schema of editors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from headwater.config.builtin import builtin_names, builtin_text
from headwater.config.fields import walk
from headwater.config.recipe import Recipe
from headwater.config.reference import explain, json_schema
from headwater.errors import UserError
from runs import call
from tools.recipe_reference import PAGE, markdown

ROOT = Path(__file__).parents[3]
SCHEMA = json_schema()


def faults(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Paths at which a value does not fit a JSON schema; knows the keywords that pydantic writes for recipes."""
    if "$ref" in schema:
        return faults(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], path)
    if "anyOf" in schema:
        return [] if any(not faults(value, option, path) for option in schema["anyOf"]) else [path]
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        return [path]
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    kind = schema.get("type")
    if kind == "null" and value is not None:
        return [path]
    if kind in types and (not isinstance(value, types[kind]) or isinstance(value, bool) != (kind == "boolean")):
        return [path]
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        missing = [f"{path}.{name}" for name in schema.get("required", ()) if name not in value]
        other = schema.get("additionalProperties", True)
        inner = {name: fields.get(name, other if isinstance(other, dict) else {}) for name in value}
        unknown = [f"{path}.{name}" for name in value if name not in fields and other is False]
        return (
            missing
            + unknown
            + [fault for name in value for fault in faults(value[name], inner[name], f"{path}.{name}")]
        )
    wrong = "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]
    return [path] if wrong or ("minimum" in schema and value < schema["minimum"]) else []


def test_explain_gives_type_default_unit_and_shipped_values() -> None:
    text = explain("stages.opd.sampling.max_tokens")
    assert text.splitlines()[:5] == [
        "stages.opd.sampling.max_tokens",
        "  Longest completion; a longer one is cut.",
        "  type     whole number ≥ 1",
        "  default  512",
        "  unit     tokens",
    ]
    assert "  default  {}" in explain("data.labeled.generate.dials").splitlines()
    shipped = yaml.safe_load(builtin_text("gsm8k"))["stages"]["opd"]["sampling"]["max_tokens"]
    assert f"in gsm8k to {shipped}" in text
    assert all(len(line) <= 80 for line in explain("stages.opd").splitlines())


def test_explain_section_lists_each_field_once() -> None:
    text = explain("models.lora")
    fields = [field.name for field in walk(Recipe) if re.fullmatch(r"models\.lora\.\w+", field.path)]
    assert re.findall(r"^(\w+): ", text, flags=re.MULTILINE) == fields
    assert "data.evals.my_test.limit" in explain("data.evals.my_test.limit") and "limit: " in explain(
        "data.evals.my_test"
    )


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("stages.opd.lr", "stages.opd.optim.lr"),
        ("stages.opd.optm", "optim"),
        ("label", "labels"),
        ("models.dtpe", "dtype"),
    ],
)
def test_explain_suggests_intended_field(path: str, suggestion: str) -> None:
    with pytest.raises(
        UserError, match=rf"explain {path}: no such field; did you mean {suggestion}\? The sections are name"
    ):
        explain(path)


def test_explain_command_prints_field_and_schema() -> None:
    assert call("explain", "labels.budget").out.startswith("labels.budget\n  Labels that training may use")
    assert json.loads(call("explain", "--schema").out) == SCHEMA
    assert call("explain", "labels.budgt").code == 2


def test_reference_page_lists_every_field() -> None:
    page, tables = markdown(), {}
    for heading, table in re.findall(r"^## (.+)\n\n((?:\|.*\n)+)", page, flags=re.MULTILINE):
        tables[heading] = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert "lr" in tables["stages.STAGE.optim"] and "path" in tables["data.SOURCE"] and "seed" in tables["The recipe"]
    listed = {name for names in tables.values() for name in names}
    assert {field.name for field in walk(Recipe)} <= listed


def test_committed_reference_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "python -m tools.recipe_reference"


def test_json_schema_accepts_shipped_recipes_and_short_forms() -> None:
    recipes = {name: builtin_text(name) for name in builtin_names()}
    recipes |= {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.yaml")}
    for name, text in recipes.items():
        assert faults(yaml.safe_load(text), SCHEMA) == [], name
    short = yaml.safe_load(
        "{models: {student: a}, data: {labeled: f.jsonl}, stages: {opd: {steps: 1}}, guards: {truncation: stop}}"
    )
    assert faults(short, SCHEMA) == []


def test_json_schema_refuses_misspelt_and_mistyped_fields() -> None:
    raw = yaml.safe_load(builtin_text("pocket"))
    raw["labels"] = {"budgt": 3}
    raw["evaluate"] = {"samples": "many"}
    assert sorted(faults(raw, SCHEMA)) == [".evaluate.samples", ".labels.budgt"]
