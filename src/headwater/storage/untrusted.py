"""Validate untrusted run directories: reject symbolic links and path traversal."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headwater.errors import HeadwaterError, UserError, error_text
from headwater.storage.files import read_checked

MAX_BYTES = 4 << 30
"""Largest file of a run directory besides weights."""
NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


def refuse_links(folder: Path, option: str) -> None:
    """Raise UserError when the folder contains a symbolic link, a pipe, a device or a huge log.

    Writing to a link would change a file elsewhere; reading a pipe may never end. The folder itself may be a link: the user named
    it.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                where = path.relative_to(folder)
                raise UserError(f"{option} {folder}: {where} is a symbolic link, which no run creates; remove it")
            try:
                mode, size = (status := path.stat()).st_mode, status.st_size
            except FileNotFoundError:  # a run in the folder has just removed it
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UserError(f"{option} {folder}: {path.relative_to(folder)} is no regular file; remove it")
            if size > MAX_BYTES and path.suffix != ".safetensors":
                raise UserError(
                    f"{option} {folder}: {path.relative_to(folder)} has {size:,} bytes, which no run writes"
                )


def read_plan(path: Path) -> dict[str, Any]:
    """Read a plan.json: {"seeds": [0, …], "arms": {ARM: {SEED: [NODE, …]}}, "flops": {NODE: 1e12, …}}; earlier ones lack `flops`.

    Raises UserError on any other shape.

    A node's name becomes a path, so a name with a slash could point outside of the folder.
    """
    plan = read_checked(path)
    arms, seeds = plan.get("arms"), plan.get("seeds", [])
    valid = isinstance(arms, dict) and isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
    runs: list[Any] = list(arms.values()) if isinstance(arms, dict) else []
    for by_seed in runs:
        valid = valid and isinstance(by_seed, dict) and all(re.fullmatch(r"-?\d{1,40}", seed) for seed in by_seed)
        valid = valid and all(isinstance(names, list) for names in by_seed.values())
    flops = plan.get("flops", {})
    valid = valid and isinstance(flops, dict) and all(type(value) in (int, float) for value in flops.values())
    if not valid:
        raise UserError(f"{path}: is not a plan written by this program")
    for name in (name for by_seed in runs for names in by_seed.values() for name in names):
        if not isinstance(name, str) or not NODE.fullmatch(name):
            raise UserError(f"{path}: {name!r:.80} is not a valid node name")
    return plan


@contextlib.contextmanager
def refuse_malformed_files(folder: Path) -> Iterator[None]:
    """Turn errors from malformed files of a run directory into one sentence (UserError) that names the folder."""
    try:
        yield
    except (HeadwaterError, OSError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{folder}: its files do not have the format this program writes ({type(error).__name__}: {error_text(error)})"
        ) from error
