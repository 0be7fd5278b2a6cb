"""Clouds: opening the store of a URL, and translating obstore's errors. For `objects`.

obstore reads each cloud's environment variables (`AWS_…`, `GOOGLE_…`, `AZURE_…`); the option
`store` takes precedence. Its errors quote URLs, signed ones too, so none is passed on as it is.
"""

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import obstore.store
from obstore.exceptions import (
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import AzureStore, GCSStore, S3Store
from pydantic import SecretStr

from handlers.storage.places import PlaceError, PlaceUnreachableError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

Store = S3Store | GCSStore | AzureStore

_CLIENT_OPTIONS = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "http1_only",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "read_timeout",
        "root_certificate",
        "timeout",
        "user_agent",
    }
)
"""Options of the HTTP client, which obstore takes separately from those of the store."""
_TIMEOUTS = {"connect_timeout": "8s", "timeout": "180s"}  # enough for a part of 8 MiB at 0.5 Mbit/s
# After these, the dispatcher retries.
_RETRIES: "RetryConfig" = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
_SET_BY_URL = frozenset({"bucket", "bucket_name", "container_name"})
_ENDPOINTS = frozenset({"endpoint", "endpoint_url", "aws_endpoint_url_s3", "base_url"})
_BULK_DELETE = frozenset({"disable_bulk_delete", "aws_disable_bulk_delete"})
"""Some S3-compatible stores refuse `POST ?delete`, by which obstore deletes even a single object."""
_PREFIX = re.compile("^(aws|google|azure_storage|azure)_")
_HINTS = {
    "Missing SecretAccessKey": "access_key_id without secret_access_key",
    "Missing AccessKeyId": "secret_access_key without access_key_id",
    "Account must be specified": "set account_name, or AZURE_STORAGE_ACCOUNT_NAME",
}
_CREDENTIAL_OPTIONS = {
    S3Store: "access_key_id and secret_access_key, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    GCSStore: "service_account (a path) or service_account_key, or GOOGLE_APPLICATION_CREDENTIALS",
    AzureStore: "account_key or sas_key, or AZURE_STORAGE_ACCOUNT_KEY",
}

_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>([\w.-]{1,60})</Code>")
_MESSAGE = re.compile(r"<Message>([^<\n]{1,200})")
_QUOTED = re.compile("'[^']*'")
_NOT_SENT = re.compile(r"HTTP error: ([^\n]{1,80})")
_INSTANCE_CREDENTIALS = re.compile(r"169\.254\.|metadata\.google|fd00:ec2|token request|/metadata/identity")


def open_store(url: str, options: Mapping[str, SecretStr]) -> Store:
    """Open `s3://…`, `gs://…`, `az://…` or a similar URL. ValueError, for operators."""
    values = {_to_short_name(key): value.get_secret_value() for key, value in options.items()}
    for name in _SET_BY_URL & values.keys():
        raise ValueError(f"`store` must not contain {name}: it is part of the URL")
    client = {**_TIMEOUTS, **{name: values.pop(name) for name in _CLIENT_OPTIONS & values.keys()}}
    client.setdefault("allow_http", str(_is_http_allowed()).lower())
    for name in _ENDPOINTS & values.keys():
        if values[name].lower().startswith("http://") and client["allow_http"].lower() != "true":
            raise ValueError(f"`store` has a {name} without TLS: allow it with allow_http = true")
    try:
        store = _from_url(url, values, client)
        if isinstance(store, S3Store) and not values.keys() & _BULK_DELETE:
            store = _from_url(url, {**values, "disable_bulk_delete": "true"}, client)
    except UnknownConfigurationKeyError as error:
        raise ValueError(f"`store` contains an unknown option {_QUOTED.findall(str(error))[0]}") from None
    except (BaseError, ValueError, TypeError) as error:
        raise ValueError(f"not a place that can be written to: {_describe_configuration(error)}") from None
    if isinstance(store, S3Store | GCSStore | AzureStore):
        return store
    raise ValueError("not a place that can be written to: use a directory, s3://, gs:// or az://")


def _from_url(url: str, values: Mapping[str, str], client: Mapping[str, str]) -> object:
    return obstore.store.from_url(
        url,
        config=cast("S3Config", values) or None,
        client_options=cast("ClientConfig", client),
        retry_config=_RETRIES,
    )


def to_place_error(failure: str, error: Exception, store: object) -> PlaceError:
    """Translate an error of obstore for operators; `failure` says what could not be done."""
    text = str(error)
    status = _STATUS.search(text)
    if _INSTANCE_CREDENTIALS.search(text.partition("\n")[0]):
        return PlaceError(f"{failure}: no credentials; set {_CREDENTIAL_OPTIONS.get(type(store), 'some')}")
    if isinstance(error, FileNotFoundError):
        return PlaceError(f"{failure}: {_service_message(text) or '404'}; does the bucket exist?")
    is_denied = isinstance(error, PermissionDeniedError | UnauthenticatedError)
    if is_denied or (status and status[1] in {"401", "403"}):
        return PlaceError(
            f"{failure}: {_service_message(text) or 'refused'}; check credentials and permissions"
        )
    if status is not None:
        kind = PlaceUnreachableError if status[1].startswith("5") else PlaceError
        return kind(f"{failure}: it responded with {status[1]}{_in_parentheses(text)}")
    not_sent = _NOT_SENT.search(text)
    if not_sent is not None and "builder error" in not_sent[1]:
        return PlaceError(
            f"{failure}: its endpoint is not https; to allow http, set allow_http = true in `store`"
        )
    if not_sent is not None:
        return PlaceUnreachableError(f"{failure}: no response from its endpoint ({not_sent[1].strip()})")
    return PlaceError(f"{failure}: {_without_urls(text)}")


def _to_short_name(key: str) -> str:
    """Return obstore's short name of an option that may be named as an environment variable."""
    name = key.lower()
    short = _PREFIX.sub("", name)
    return short if short in _CLIENT_OPTIONS | _SET_BY_URL else name


def _is_http_allowed() -> bool:
    """Whether the environment allows http; obstore reads only the first, and not always."""
    names = ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP")
    return any(os.environ.get(name, "").lower() in {"1", "true"} for name in names)


def _describe_configuration(error: Exception) -> str:
    text = _without_urls(str(error)).removeprefix("Generic ").replace(" error:", ":", 1)
    for message, hint in _HINTS.items():
        if message in text:
            return hint
    return text


def _service_message(text: str) -> str:
    code, message = _CODE.search(text), _MESSAGE.search(text)
    return ", ".join(found[1].strip().rstrip(".") for found in (code, message) if found is not None)


def _in_parentheses(text: str) -> str:
    message = _service_message(text)
    return f" ({message})" if message else ""


def _without_urls(text: str) -> str:
    return re.sub(r"\w+://\S+", "…", text.partition("\n")[0])[:200]
