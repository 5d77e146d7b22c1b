"""Reading YAML: repeated keys are refused, what YAML allows works."""

from __future__ import annotations

import pytest

from headwater.config import yaml
from headwater.config.builtin import builtin_names, builtin_text
from headwater.errors import UserError


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: 1\nseed: 2\n", "r, line 2: the key 'seed' is given twice (first in line 1); keep one"),
        ("a:\n  b: 1\n  c: 2\n  b: 1\n", "r, line 4: the key 'b' is given twice (first in line 2)"),
        ("- {x: 1}\n- {y: 1, y: 2}\n", "r, line 2: the key 'y' is given twice (first in line 2)"),
        ('"seed": 1\nseed: 2\n', "r, line 2: the key 'seed' is given twice"),
        ("a: {b: [{c: {d: 1, e: 2, d: 3}}]}\n", "the key 'd' is given twice"),
        ("a: &a {x: 1, x: 2}\nb: *a\n", "r, line 1: the key 'x' is given twice"),
        ("1: a\n1: b\n", "the key '1' is given twice"),
        ('{"name": "a", "name": "b"}', "the key 'name' is given twice"),  # a recipe in JSON
    ],
)
def test_repeated_key_is_refused_with_its_lines(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        yaml.read(text, "r")
    assert sentence in str(refused.value)


def test_same_key_in_different_objects_merges_and_aliases_work() -> None:
    text = "base: &base {x: 1, y: 2}\na: {<<: *base, x: 3}\nb: {x: 1}\nc: *base\nd: {<<: [*base, {z: 4}], y: 5}\n"
    assert yaml.read(text, "r") == {
        "base": {"x": 1, "y": 2}, "a": {"x": 3, "y": 2}, "b": {"x": 1}, "c": {"x": 1, "y": 2}, "d": {"x": 1, "y": 5, "z": 4},
    }  # fmt: skip
    assert yaml.read("a: 1\n'1': 2\n1: 3\n", "r") == {"a": 1, "1": 2, 1: 3}  # a text and a number are different keys


@pytest.mark.parametrize("name", builtin_names())
def test_builtin_recipes_repeat_no_key(name: str) -> None:
    assert yaml.read(builtin_text(name), name)["name"] == name
