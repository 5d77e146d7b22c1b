"""Fields of the recipe schema, as the reference lists them."""

from __future__ import annotations

from headwater.config.fields import path_of, walk
from headwater.config.recipe import Recipe

FIELDS = {field.path: field for field in walk(Recipe)}


def test_recipe_fields_have_descriptions() -> None:
    assert [path for path, field in FIELDS.items() if not field.description] == []
    assert len(FIELDS) > 200


def test_walk_gives_type_default_and_unit() -> None:
    shown = {
        path: (FIELDS[path].type_text, FIELDS[path].default, FIELDS[path].unit)
        for path in ("stages.opd.sampling.max_tokens", "labels.budget", "models.dtype", "stages.opd.dense.beta")
    }
    assert shown == {
        "stages.opd.sampling.max_tokens": ("whole number ≥ 1", 512, "tokens"),
        "labels.budget": ("whole number ≥ 1 or null", None, "labels"),
        "models.dtype": ("float32 or bfloat16", "float32", ""),
        "stages.opd.dense.beta": ("number > 0, < 1", 0.5, ""),
    }
    assert FIELDS["models.teacher"].type_text == "text or mapping NAME: text or null"
    assert FIELDS["compute.sampler"].choices == ("torch", "vllm")


def test_walk_shows_values_of_filled_in_sections() -> None:
    """A guard's fields have no defaults of their own: those shown are of the guard's."""
    assert FIELDS["guards.truncation.bound"].default == 0.5 and FIELDS["guards.kl_explosion.bound"].default == 1.0


def test_path_of_drops_tags_of_unions_and_keys() -> None:
    assert path_of(Recipe, ("models", "teacher", "str")) == ("models", "teacher")
    assert path_of(Recipe, ("models", "lora", "targets", "tuple[x, ...]", 1)) == ("models", "lora", "targets", "1")
    assert path_of(Recipe, ("data", "evals", "a/b", "[key]")) == ("data", "evals", "a/b")
    assert path_of(Recipe, ("stages", "opd", "stepz")) == ("stages", "opd", "stepz")
