"""Commands about recipes: explain."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from headwater.cli.options import examples

commands = typer.Typer()


@commands.command(
    epilog=examples(
        "headwater explain stages.opd.optim.lr",
        "headwater explain stages.opd",
        "headwater explain --schema > recipe.schema.json",
    )
)
def explain(
    field: Annotated[
        str, typer.Argument(metavar="FIELD", help="A field or section of the recipe; all sections without it.")
    ] = "",
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON schema of recipes, for editors.")] = False,
) -> None:
    """Explain a field of the recipe: type, default, unit and meaning; of a section every field."""
    from headwater.config import reference
    from headwater.report.format import console

    if schema:
        print(json.dumps(reference.json_schema(), indent=2, ensure_ascii=False))
    else:
        print(reference.explain(field, min(100, console().width)))
