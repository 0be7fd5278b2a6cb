"""Describes the fields of a settings model for documentation: path, type, default and help."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ByteSize, SecretStr
from pydantic.fields import FieldInfo

__all__ = ["Setting", "describe_field", "describe_model"]


@dataclass(frozen=True, slots=True)
class Setting:
    """A documented setting. `path` is `public.port` or `handlers[].name`; `default` is TOML."""

    path: str
    type: str
    default: str
    help: str


def describe_model(model: type[BaseModel], prefix: str = "") -> list[Setting]:
    """Return every field of a model in order, each path with `prefix` before it."""
    return [describe_field(f"{prefix}{name}", field) for name, field in model.model_fields.items()]


def describe_field(path: str, field: FieldInfo) -> Setting:
    """Return one field as a setting."""
    default = "required"
    if not field.is_required():
        default = _to_toml(field.get_default(call_default_factory=True))
    help_ = " ".join((field.description or "").split())
    return Setting(path, _type_name(field.annotation), default, help_)


_TYPE_NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "boolean",
    SecretStr: "secret",
    Path: "path",
    ByteSize: "integer or text",
}


def _type_name(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin in {Union, UnionType}:
        names = (_type_name(each) for each in inner if each is not NoneType)
        return " or ".join(dict.fromkeys(names))
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in inner)
    if origin in {tuple, list, frozenset}:
        return f"list of {_type_name(inner[0])}"
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    return "text" if isinstance(annotation, type) and issubclass(annotation, str) else "table"


def _to_toml(value: object) -> str:
    match value:
        case None | "":
            return ""
        case bool():
            return str(value).lower()
        case str() | Path():
            return f'"{value}"'
        case frozenset():
            return _to_toml(sorted(value))
        case tuple() | list():
            return f"[{', '.join(_to_toml(each) for each in value)}]"
        case BaseModel():
            return _to_toml(value.model_dump(exclude_none=True))
        case Mapping():
            inner = ", ".join(f"{name} = {_to_toml(each)}" for name, each in value.items())
            return f"{{ {inner} }}" if inner else "{}"
        case float():
            return f"{value:g}"
        case _:
            return str(value)
