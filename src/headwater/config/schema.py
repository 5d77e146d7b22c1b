"""Base class, field types and units of the recipe schema.

A field's docstring is its one description: `headwater explain`, docs/recipe-fields.md, the JSON schema and `init --all` print it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


@dataclass(frozen=True)
class Unit:
    """Unit of a field's value, for the recipe reference."""

    name: str


@dataclass(frozen=True)
class Choices:
    """Values of a text field that a table in the code lists."""

    names: Collection[str]


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Natural = Annotated[int, Field(ge=0, le=1_000_000_000)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Tokens = Annotated[Positive, Unit("tokens")]
Steps = Annotated[Positive, Unit("steps")]
Seconds = Annotated[float, Field(gt=0.0, le=86_400.0), Unit("seconds")]
Gib = Annotated[float, Field(gt=0.0, le=65536.0), Unit("GiB")]


class Strict(BaseModel):
    """A section of the recipe: frozen; unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    LATER: ClassVar[frozenset[str]] = frozenset()
    """Fields that are omitted at their defaults: recipes and fingerprints written before they existed stay equal."""

    @model_serializer(mode="wrap")
    def _omit_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unset = {name for name in self.LATER if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in serialize(self).items() if name not in unset}
