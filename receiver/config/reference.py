"""Settings in the words of whoever writes the file: path, type, default and help of each field of a model."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ByteSize, SecretStr
from pydantic.fields import FieldInfo


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, for the documentation: `path` is `public.port` or `handlers[].name`; `default` is as in TOML."""

    path: str
    type: str
    default: str
    help: str


def describe_model(model: type[BaseModel], prefix: str = "") -> list[Setting]:
    """Return every field of a model, in its order."""
    return [setting_of(f"{prefix}{name}", field) for name, field in model.model_fields.items()]


def setting_of(path: str, field: FieldInfo) -> Setting:
    default = "required" if field.is_required() else _as_toml(field.get_default(call_default_factory=True))
    return Setting(path, _kind(field.annotation), default, " ".join((field.description or "").split()))


_KINDS = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "boolean",
    SecretStr: "secret",
    Path: "path",
    ByteSize: "integer or text",
}


def _kind(annotation: Any) -> str:
    """Say a type in plain words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin in {Union, UnionType}:
        return " or ".join(dict.fromkeys(_kind(each) for each in inner if each is not NoneType))
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in inner)
    if origin in {tuple, list, frozenset}:
        return f"list of {_kind(inner[0])}"
    if annotation in _KINDS:
        return _KINDS[annotation]
    return "text" if isinstance(annotation, type) and issubclass(annotation, str) else "table"


def _as_toml(value: object) -> str:
    match value:
        case None | "":
            return ""
        case bool():
            return str(value).lower()
        case str() | Path():
            return f'"{value}"'
        case frozenset():
            return _as_toml(sorted(value))
        case tuple() | list():
            return f"[{', '.join(_as_toml(each) for each in value)}]"
        case BaseModel():
            return _as_toml(value.model_dump(exclude_none=True))
        case Mapping():
            inner = ", ".join(f"{name} = {_as_toml(each)}" for name, each in value.items())
            return f"{{ {inner} }}" if inner else "{}"
        case float():
            return f"{value:g}"
        case _:
            return str(value)
