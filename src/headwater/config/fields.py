"""Fields of a pydantic schema: path, type, default, unit and description of each. Nothing here names a recipe's field."""

from __future__ import annotations

import re
import types
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from headwater.config.schema import Choices, Unit

REQUIRED = PydanticUndefined
"""Default of a field that has none."""
UNBOUNDED = 1_000_000_000
"""A larger bound guards against nonsense and is not shown."""
ANY_NAME = "NAME"
"""Stands in paths for a key that the user chooses."""


@dataclass(frozen=True)
class SchemaField:
    """One field of the schema.

    path      dotted; `NAME` stands for a key of the user's own, such as an evaluation's
    section   the fields below it, if it is a section
    choices   values of a field that takes one of a few
    """

    path: str
    type_text: str
    default: Any
    unit: str
    description: str
    section: type[BaseModel] | None
    choices: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


def walk(model: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None) -> Iterator[SchemaField]:
    """Every field of a schema and of its sections, a section before its fields.

    defaults  the default of the whole section, which holds those of its fields
    """
    for name, info in model.model_fields.items():
        default = info.get_default(call_default_factory=True) if defaults is None else getattr(defaults, name)
        path, section, metadata = f"{prefix}{name}", section_of(info.annotation), _metadata(info)
        yield SchemaField(
            path=path,
            type_text=type_text(info.annotation, info.metadata),
            default=default,
            unit=next((item.name for item in metadata if isinstance(item, Unit)), ""),
            description=re.sub(r"\bNone\b", "null", " ".join((info.description or "").split())),
            section=section,
            choices=tuple(choices_of(info.annotation, metadata)),
        )
        if section is not None:
            is_mapping = any(get_origin(member) is dict for member in _members(info.annotation))
            inner = f"{path}.{ANY_NAME}." if is_mapping else f"{path}."
            yield from walk(section, inner, default if isinstance(default, section) else None)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The schema of a field that is a section, or a mapping to sections; None of a plain value."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
        if get_origin(member) is dict:
            return section_of(get_args(member)[1])
    return None


def path_of(model: type[BaseModel], location: Sequence[str | int]) -> tuple[str, ...]:
    """Keys of the field that a pydantic error is about: its location without the tags of unions and of keys."""
    keys: list[str] = []
    current: Any = model
    for part in map(str, location):
        members = _members(current)
        if len(members) > 1 and part not in keys[-1:]:  # a union: the part names the member that was tried
            current = next((member for member in members if part.startswith(_tag(member))), None)
            continue
        if part != "[key]":
            keys.append(part)
        member = members[0] if members else None
        if isinstance(member, type) and issubclass(member, BaseModel):
            info = member.model_fields.get(part)
            current = None if info is None else info.annotation
        else:
            current = get_args(member)[1] if get_origin(member) is dict else None
    return tuple(keys)


def type_text(annotation: Any, metadata: Collection[Any] = ()) -> str:
    """A type in words. Example: `whole number ≥ 1 or null`."""
    metadata = _flat(metadata)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return type_text(inner, [*metadata, *more])
    if choices := choices_of(annotation, metadata):
        return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(member, metadata) for member in get_args(annotation))
    if origin is dict:
        return f"mapping NAME: {type_text(get_args(annotation)[1])}"
    if origin is tuple:
        return f"list of {type_text(get_args(annotation)[0])}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return " ".join([names.get(annotation, str(annotation)), ", ".join(_bounds(metadata))]).strip()


def choices_of(annotation: Any, metadata: Collection[Any] = ()) -> list[str]:
    """The values of a field that takes one of a few, else nothing."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return next((list(item.names) for item in metadata if isinstance(item, Choices)), [])


def _bounds(metadata: Collection[Any]) -> Iterator[str]:
    for item in metadata:
        for kind, attribute, sign in ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<")):
            if isinstance(item, kind) and abs(bound := getattr(item, attribute)) < UNBOUNDED:
                yield f"{sign} {bound:,}" if isinstance(bound, int) else f"{sign} {bound:g}"


def _flat(metadata: Collection[Any]) -> list[Any]:
    """Metadata with that of nested `Field(…)` in its place."""
    result: list[Any] = []
    for item in metadata:
        result += _flat(item.metadata) if isinstance(item, FieldInfo) else [item]
    return result


def _metadata(info: FieldInfo) -> list[Any]:
    """Metadata of a field and, of an optional one, of its type."""
    result = list(info.metadata)
    for member in get_args(info.annotation) if get_origin(info.annotation) in (Union, types.UnionType) else ():
        result += get_args(member)[1:] if get_origin(member) is Annotated else ()
    return _flat(result)


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a type, without None and annotations."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [] if annotation is type(None) or annotation is None else [annotation]


def _tag(member: Any) -> str:
    """How pydantic begins the tag of a union's member."""
    origin = get_origin(member)
    return {dict: "dict", tuple: "tuple", Literal: "literal"}.get(origin, getattr(member, "__name__", ""))
