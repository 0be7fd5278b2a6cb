"""The types of values that settings have, each with its checks. Used by `sections.py`.

The message of a check never contains the value, which may be a secret.
"""

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo

from receiver.config.callback_url import split_http_url
from receiver.net.addresses import is_loopback, to_unix_path
from receiver.net.credentials import find_fault, split_list
from receiver.net.database_url import parse_database_url
from receiver.net.proxies import parse_proxy

__all__ = [
    "Count",
    "Credential",
    "CredentialList",
    "DatabaseUrl",
    "Duration",
    "DurationOrZero",
    "ExistingFile",
    "FloraUrl",
    "Host",
    "HttpUrl",
    "Port",
    "PostgresUrl",
    "ProxyUrl",
    "Secret",
    "Tolerance",
    "Words",
    "check_not_empty",
    "read_secret",
    "to_lower_case",
    "to_tuple",
]

_MAX_UNIX_PATH = 107
"""Bytes of the path of a Unix socket on Linux, without the zero at its end."""

Values = TypeVar("Values", bound=tuple[Any, ...] | None)


def _resolve_reference(value: object, info: ValidationInfo) -> object:
    """Return what `env:NAME` or `file:/path` refers to; other values unchanged."""
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
    """Return the text of a file without its final newline and a byte order mark. Raises ValueError."""
    try:
        return path.read_text("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except OSError as error:  # without the path: it may be the secret itself, by mistake
        reason = os.strerror(error.errno or 0)
        raise ValueError(f"names a file that cannot be read: {reason}") from None
    except UnicodeDecodeError:
        raise ValueError("names a file that is not UTF-8 text") from None


def _check_secret(secret: SecretStr) -> SecretStr:
    value = secret.get_secret_value()
    if not value.strip():
        raise ValueError("is empty")
    if value != value.strip():
        raise ValueError("has white space around it; remove the newline or space that was copied")
    return secret


def _check_credential(secret: SecretStr) -> SecretStr:
    if (fault := find_fault(secret.get_secret_value())) is not None:
        raise ValueError(fault)
    return secret


def _split_credentials(value: object) -> object:
    """Return the texts of a list, each split where it holds several; references stay whole."""
    items = to_tuple(value)
    if not isinstance(items, list | tuple):
        return items
    parts = (
        split_list(each) if isinstance(each, str) and not _is_reference(each) else (each,) for each in items
    )
    return tuple(part for each in parts for part in each)


def _is_reference(value: str) -> bool:
    return value.startswith(("env:", "file:"))


def _to_http_url(value: str) -> str:
    split_http_url(value)
    return value.rstrip("/")


def _check_secure_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        raise ValueError("must be https unless it is on loopback, because the API key is sent to it")
    return value


def _check_host(value: str) -> str:
    path = to_unix_path(value)
    if path is None:
        if "/" in value:
            raise ValueError("must be an address, or unix:/path for a Unix socket")
        return value
    if not path.startswith("/"):
        raise ValueError("must name a Unix socket by its absolute path, unix:/path")
    if len(os.fsencode(path)) > _MAX_UNIX_PATH:
        raise ValueError(f"is too long: the path of a Unix socket has at most {_MAX_UNIX_PATH} bytes")
    return value


def _off_to_none(value: object) -> object:
    return None if value == "off" else value


def to_tuple(value: object) -> object:
    """Return a single text as a tuple; other values unchanged."""
    return (value,) if isinstance(value, str) else value


def to_lower_case(value: object) -> object:
    """Return a text in lower case; other values unchanged."""
    return value.lower() if isinstance(value, str) else value


def check_not_empty(values: Values) -> Values:
    """Return the list unchanged. Raises ValueError if it is empty; None is allowed."""
    if values is not None and not values:
        raise ValueError("must not be empty")
    return values


def _check_file(value: Path) -> Path:
    try:
        exists = value.is_file()
    except (OSError, ValueError):
        exists = False
    if not exists:  # without the path: it may be the key itself, by mistake
        raise ValueError("names a file that does not exist")
    return value


def _check_database_url(value: str) -> str:
    parse_database_url(value)
    return value


def _to_proxy_url(value: str) -> str:
    parse_proxy(value)
    return value if "://" in value else f"http://{value}"


def _check_postgres_url(value: str) -> str:
    if parse_database_url(value).path is not None:
        raise ValueError("must start with postgresql://")
    return value


Secret = Annotated[SecretStr, BeforeValidator(_resolve_reference), AfterValidator(_check_secret)]
"""Any text that is not shown: a password, a header, a URL."""
Credential = Annotated[SecretStr, BeforeValidator(_resolve_reference), AfterValidator(_check_credential)]
"""An API key, a signing secret or a token, by the rule of `receiver.net.credentials`."""
CredentialList = Annotated[tuple[Credential, ...], BeforeValidator(_split_credentials)]
ProxyUrl = Annotated[str, BeforeValidator(_resolve_reference), AfterValidator(_to_proxy_url)]
"""The URL of an HTTP proxy, shown without the user name and password in it."""
Tolerance = Annotated[int | None, Field(ge=0), BeforeValidator(_off_to_none)]
Duration = Annotated[float, Field(gt=0, allow_inf_nan=False)]
DurationOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Host = Annotated[str, Field(min_length=1), AfterValidator(_check_host)]
ExistingFile = Annotated[Path, AfterValidator(_check_file)]
Words = Annotated[tuple[str, ...], BeforeValidator(to_tuple)]
HttpUrl = Annotated[str, AfterValidator(_to_http_url)]
FloraUrl = Annotated[HttpUrl, AfterValidator(_check_secure_url)]
DatabaseUrl = Annotated[str, AfterValidator(_check_database_url)]
PostgresUrl = Annotated[str, AfterValidator(_check_postgres_url)]
