"""Split folders into parts that fit a transfer limit, and join them with checksums: `python -m tools.parts split|join`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import exit_codes
from headwater.errors import UserError
from headwater.storage.files import file_sum

MANIFEST = "manifest.json"
MIB = 1 << 20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def split(
    folder: Annotated[Path, typer.Argument(help="Folder of files, such as a model.")],
    parts: Annotated[Path, typer.Argument(help="Folder to write the parts and their manifest into.")],
    mib: Annotated[int, typer.Option("--mib", min=1, help="Largest part in MiB.")] = 60,
) -> None:
    """Split every file of a folder into parts."""
    print(f"{parts}: {len(split_folder(folder, parts, mib * MIB))} parts")


@app.command()
def join(
    parts: Annotated[Path, typer.Argument(help="Folder with the manifest and all parts.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write the files into.")],
) -> None:
    """Join parts into the files that they were."""
    join_folder(parts, folder)
    print(folder)


def split_folder(folder: Path, parts: Path, size: int) -> list[str]:
    """Write parts of at most `size` bytes and a manifest with their SHA-256; returns the parts' names.

    Raises UserError where the folder holds no file.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        raise UserError(f"{folder}: holds no file")
    parts.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, list[dict[str, str]]] = {}
    names: list[str] = []
    for path in files:
        manifest[path.name] = []
        for block in _blocks(path, size):
            names.append(f"{len(names):04d}.part")
            (parts / names[-1]).write_bytes(block)
            manifest[path.name].append({"part": names[-1], "sha256": hashlib.sha256(block).hexdigest()})
    (parts / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return names


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        block = file.read(size)
        yield block  # an empty file has one empty part
        while block := file.read(size):
            yield block


def missing_parts(parts: Path) -> list[str]:
    """Parts of the manifest that are not there or damaged. Raises UserError without a manifest that can be read."""
    return [
        entry["part"]
        for entries in _manifest(parts).values()
        for entry in entries
        if not (parts / entry["part"]).is_file() or file_sum(parts / entry["part"]) != entry["sha256"]
    ]


def join_folder(parts: Path, folder: Path) -> None:
    """Write the files of a manifest. Raises UserError that names the parts that are missing or damaged; nothing is written then."""
    if missing := missing_parts(parts):
        raise UserError(f"{parts}: {len(missing)} parts are missing or damaged: {', '.join(missing[:5])}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in _manifest(parts).items():
        unfinished = folder / f"{name}.partial"
        with unfinished.open("wb") as file:
            for entry in entries:
                file.write((parts / entry["part"]).read_bytes())
        os.replace(unfinished, folder / name)


def _manifest(parts: Path) -> dict[str, list[dict[str, str]]]:
    path = parts / MANIFEST
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        for name, entries in manifest.items():
            if Path(name).name != name or any(Path(entry["part"]).name != entry["part"] for entry in entries):
                raise UserError(f"{path}: {name}: a name leads out of the folder")
            [entry["sha256"] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is missing, or no manifest of parts") from None
    return dict(manifest)


def main() -> None:
    with exit_codes():
        app()


if __name__ == "__main__":
    main()
