"""The kinds of value a setting can have, each with its checks. Used by `sections.py`; a check never tells the value."""

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo

from receiver.config.callback_url import split_http_url
from receiver.net.addresses import is_loopback

__all__ = [
    "Count",
    "DatabaseUrl",
    "ExistingFile",
    "FloraUrl",
    "HttpUrl",
    "Port",
    "Seconds",
    "Secret",
    "SecretList",
    "Span",
    "Tolerance",
    "Words",
    "listed",
    "lower_case",
    "not_empty",
    "read_secret",
]

Values = TypeVar("Values", bound=tuple[Any, ...] | None)


def _dereference(value: object, info: ValidationInfo) -> object:
    """Replace `env:NAME` and `file:/path` by what they point to."""
    if not isinstance(value, str):
        return value
    kind, _, place = value.partition(":")
    if kind == "env":
        environ = info.context["environ"] if info.context else {}
        if not environ.get(place):
            raise ValueError(f"the environment variable {place} is not set")
        return environ[place]
    if kind == "file":
        return read_secret(Path(place))
    return value


def read_secret(path: Path) -> str:
    """Read a secret from a file, without its final newline; ValueError tells what is wrong with the file."""
    try:
        return path.read_text("utf-8").removesuffix("\n").removesuffix("\r")
    except OSError as error:  # without the path: by mistake it is the secret itself
        raise ValueError(f"names a file that cannot be read: {os.strerror(error.errno or 0)}") from None
    except UnicodeDecodeError:
        raise ValueError("names a file that is not UTF-8 text") from None


def _whole(secret: SecretStr) -> SecretStr:
    value = secret.get_secret_value()
    if not value.strip():
        raise ValueError("is empty")
    if value != value.strip():
        raise ValueError("has white space around it: a copied newline or blank makes every comparison fail")
    return secret


def _http_url(value: str) -> str:
    """Check an absolute http(s) URL and drop its final slash."""
    split_http_url(value)
    return value.rstrip("/")


def _secure_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        raise ValueError("must be https: the API key travels to it (http is for loopback only)")
    return value


def _off(value: object) -> object:
    return None if value == "off" else value


def listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def not_empty(values: Values) -> Values:
    if values is not None and not values:
        raise ValueError("must not be empty")
    return values


def lower_case(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _file(value: Path) -> Path:
    try:
        found = value.is_file()
    except (OSError, ValueError):
        found = False
    if not found:  # without the path: by mistake it is the key itself
        raise ValueError("names a file that does not exist")
    return value


def _database_url(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if not separator or scheme not in {"sqlite", "postgresql"}:
        raise ValueError("must be sqlite:///path/to/file.db or postgresql://…")
    if scheme == "sqlite" and (not rest.startswith("/") or rest == "/" or ":memory:" in rest):
        raise ValueError("must name a file, as in sqlite:///var/receiver.db (four slashes for an absolute path)")
    return value


def _postgres_url(value: str) -> str:
    if not value.startswith("postgresql://"):
        raise ValueError("must be postgresql://…")
    return value


Secret = Annotated[SecretStr, BeforeValidator(_dereference), AfterValidator(_whole)]
SecretList = Annotated[tuple[Secret, ...], BeforeValidator(listed)]
Tolerance = Annotated[int | None, Field(ge=0), BeforeValidator(_off)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Span = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
ExistingFile = Annotated[Path, AfterValidator(_file)]
Words = Annotated[tuple[str, ...], BeforeValidator(listed)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
FloraUrl = Annotated[HttpUrl, AfterValidator(_secure_url)]
DatabaseUrl = Annotated[str, AfterValidator(_database_url)]
PostgresUrl = Annotated[str, AfterValidator(_postgres_url)]
