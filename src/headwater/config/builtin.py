"""Built-in recipes, and recipes by name or file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from headwater.config.recipe import Recipe, read_recipe
from headwater.errors import UserError, did_you_mean

FOLDER = Path(str(files("headwater"))) / "builtin"


def builtin_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def builtin_text(name: str) -> str:
    """The commented YAML of a built-in recipe. Raises UserError for an unknown name."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = builtin_names()
        raise UserError(f"no recipe named {name}; there are {', '.join(known)}, and mine{did_you_mean(name, known)}")
    return path.read_text(encoding="utf-8")


def find_recipe(name: str, overrides: list[str]) -> Recipe:
    """Read a YAML file, or else the built-in recipe of that name, with `path=value` overrides. Raises UserError."""
    for path in (Path(name), FOLDER / f"{name}.yaml"):
        if path.is_file():
            return read_recipe(path, overrides)
    known = builtin_names()
    raise UserError(
        f"recipe {name}: no such file, and no built-in recipe of that name ({', '.join(known)}){did_you_mean(name, known)}"
    )
