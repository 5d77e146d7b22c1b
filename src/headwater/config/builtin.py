"""Built-in recipes, and recipes by name or file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from headwater.config.recipe import Recipe, read_recipe
from headwater.config.recipe_paths import refuse_missing
from headwater.errors import UserError, did_you_mean

FOLDER = Path(str(files("headwater"))) / "builtin"
MOST_LISTED = 50
"""Most files of a folder that a misspelt name is compared with."""


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
            recipe = read_recipe(path, overrides)
            if path.parent != FOLDER:
                refuse_missing(recipe.model_dump(mode="json"), path.parent)
            return recipe
    path = Path(name)
    if path.is_dir():
        inside = sorted(map(str, [*path.glob("*.y*ml"), *path.glob("*recipe*")]))
        raise UserError(f"recipe {name}: is a folder; name a recipe's file{f', such as {inside[0]}' if inside else ''}")
    known = builtin_names()
    if path.suffix in (".yaml", ".yml", ".json") or path.parent != Path():
        candidates = sorted(str(other) for other in path.parent.glob("*.y*ml"))[:MOST_LISTED]
        hint = did_you_mean(name, candidates) or "; `headwater init` prints one to start from"
        raise UserError(f"recipe {name}: no such file in {path.parent.absolute()}{hint}")
    raise UserError(
        f"recipe {name}: no such file, and no built-in recipe of that name ({', '.join(known)}){did_you_mean(name, known)}"
    )
