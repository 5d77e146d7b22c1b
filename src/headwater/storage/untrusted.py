"""Run directories that somebody else may have made: names that lead elsewhere are refused before they become paths."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headwater.errors import HeadwaterError, UserError
from headwater.storage.run_dir import read_checked

NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


def refuse_links(folder: Path, option: str) -> None:
    """Raises UserError where something in the folder is a symbolic link: what is written to it would land elsewhere.

    The folder itself may be one: whoever names it means where it leads.
    """
    for parent, folders, found in os.walk(folder):
        for name in (*folders, *found):
            path = Path(parent, name)
            if path.is_symlink():
                where = path.relative_to(folder)
                raise UserError(f"{option} {folder}: {where} is a symbolic link, and no run makes any; remove it")


def read_plan(path: Path) -> dict[str, Any]:
    """A plan.json: {"seeds": [0, …], "arms": {ARM: {SEED: [NODE, …]}}}. Raises UserError where it says anything else.

    A node's name becomes a path, so one with a slash in it would lead out of the folder.
    """
    held = read_checked(path)
    arms = held.get("arms") if isinstance(held, dict) else None
    seeds = held.get("seeds", []) if isinstance(held, dict) else None
    runs: list[Any] = list(arms.values()) if isinstance(arms, dict) else [None]
    whole = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
    for by_seed in runs:
        whole = whole and isinstance(by_seed, dict) and all(re.fullmatch(r"-?\d{1,40}", seed) for seed in by_seed)
        whole = whole and all(isinstance(names, list) for names in by_seed.values())
        if not whole:
            raise UserError(f"{path}: is no plan that this program wrote")
        for name in (name for names in by_seed.values() for name in names):
            if not isinstance(name, str) or not NODE.fullmatch(name):
                raise UserError(f"{path}: names a node {name!r:.80}, which no node is called")
    return dict(held)


@contextlib.contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """Files of a run directory in another shape than this program gives them are the folder's fault: one sentence."""
    try:
        yield
    except (HeadwaterError, OSError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: its files are not as this program writes them ({type(error).__name__}: {said})"
        ) from error
