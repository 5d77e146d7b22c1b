"""The base models of a recipe by name, and the check of those that come from the hub."""

from __future__ import annotations

from pathlib import Path

from headwater.config.recipe import Models
from headwater.errors import UserError
from headwater.runs.node import ROLES
from headwater.runs.read_once import InputError
from headwater.storage import hub
from headwater.teachers.server_client import is_served


def named_models(models: Models) -> dict[str, str]:
    """Field -> name of every base model."""
    return {f"models.{name}": model for role in ROLES for name, model in models.by_role(role).items()}


def refuse_unreachable_hub(models: Models) -> None:
    """Raises InputError, one for all models that are to come from a hub that cannot be reached."""
    wanted = {
        field: name
        for field, name in named_models(models).items()
        if not is_served(name) and hub.HUB_ID.match(name) and not Path(name).expanduser().is_dir()
    }
    try:
        hub.refuse_unreachable(wanted)
    except UserError as error:
        raise InputError("hub", str(error)) from None
