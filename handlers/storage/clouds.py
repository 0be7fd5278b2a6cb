"""Which cloud a URL means, how it is opened, and what its errors say in plain words. For `handlers.storage.objects`.

obstore reads each cloud's usual environment variables (`AWS_…`, `GOOGLE_…`, `AZURE_…`); what the option `store` names
comes before them. Its errors quote addresses, signed ones too: none of them is passed on as it is.
"""

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import obstore.store
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError, UnknownConfigurationKeyError
from obstore.store import AzureStore, GCSStore, S3Store
from pydantic import SecretStr

from handlers.storage.places import PlaceError, PlaceUnreachableError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

Store = S3Store | GCSStore | AzureStore

_CLIENT = frozenset(
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
"""Options of the HTTP client; obstore takes them apart from those of the store."""
_TIMES = {"connect_timeout": "8s", "timeout": "180s"}  # a part of 8 MiB over a link of 0.5 Mbit/s still passes
_RETRIES: "RetryConfig" = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}  # then the dispatch's own come
_NAMED_BY_THE_URL = frozenset({"bucket", "bucket_name", "container_name"})
_ENDPOINTS = frozenset({"endpoint", "endpoint_url", "aws_endpoint_url_s3", "base_url"})
_PREFIX = re.compile("^(aws|google|azure_storage|azure)_")
_HINTS = {
    "Missing SecretAccessKey": "access_key_id without secret_access_key",
    "Missing AccessKeyId": "secret_access_key without access_key_id",
    "Account must be specified": "the account is missing: account_name, or AZURE_STORAGE_ACCOUNT_NAME",
}
_CREDENTIALS = {
    S3Store: "access_key_id and secret_access_key, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    GCSStore: "service_account (a path) or service_account_key, or GOOGLE_APPLICATION_CREDENTIALS",
    AzureStore: "account_key or sas_key, or AZURE_STORAGE_ACCOUNT_KEY",
}

_ANSWERED = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>([\w.-]{1,60})</Code>")
_MESSAGE = re.compile(r"<Message>([^<\n]{1,200})")
_QUOTED = re.compile("'[^']*'")
_UNSENT = re.compile(r"HTTP error: ([^\n]{1,80})")
_FROM_THE_MACHINE = re.compile(r"169\.254\.|metadata\.google|fd00:ec2|token request|/metadata/identity")


def open_store(url: str, options: Mapping[str, SecretStr]) -> Store:
    """Open `s3://…`, `gs://…`, `az://…` and their kin; ValueError in plain words where that cannot be."""
    values = {_plain_name(key): value.get_secret_value() for key, value in options.items()}
    for name in _NAMED_BY_THE_URL & values.keys():
        raise ValueError(f"`store` must not have {name}: the URL names it")
    client = {**_TIMES, **{name: values.pop(name) for name in _CLIENT & values.keys()}}
    client.setdefault("allow_http", str(_plain_http_allowed()).lower())
    for name in _ENDPOINTS & values.keys():
        if values[name].lower().startswith("http://") and client["allow_http"].lower() != "true":
            raise ValueError(f"`store` has a {name} without TLS: allow_http = true permits that")
    try:
        store = obstore.store.from_url(
            url,
            config=cast("S3Config", values) or None,
            client_options=cast("ClientConfig", client),
            retry_config=_RETRIES,
        )
    except UnknownConfigurationKeyError as exc:
        raise ValueError(f"`store` has an unknown option {_QUOTED.findall(str(exc))[0]}") from None
    except (BaseError, ValueError, TypeError) as exc:
        raise ValueError(f"not a place that can be written to: {_configured(exc)}") from None
    if not isinstance(store, S3Store | GCSStore | AzureStore):
        raise ValueError("not a place that can be written to: there are directories, s3://, gs:// and az://")  # noqa: TRY004
    return store


def explained(what: str, exc: Exception, store: object) -> PlaceError:
    """Turn an error of obstore into one for operators: `what` could not be done, and why."""
    text = str(exc)
    status = _ANSWERED.search(text)
    if _FROM_THE_MACHINE.search(text.partition("\n")[0]):
        return PlaceError(f"{what}: no credentials; give {_CREDENTIALS.get(type(store), 'some')}")
    if isinstance(exc, FileNotFoundError):
        return PlaceError(f"{what}: {_told(text) or '404'}; does the bucket exist?")
    if isinstance(exc, PermissionDeniedError | UnauthenticatedError) or (status and status[1] in {"401", "403"}):
        return PlaceError(f"{what}: {_told(text) or 'refused'}; are the credentials and their rights right?")
    if status is not None:
        kind = PlaceUnreachableError if status[1].startswith("5") else PlaceError
        return kind(f"{what}: it answered {status[1]}{_in_words(text)}")
    unsent = _UNSENT.search(text)
    if unsent is not None and "builder error" in unsent[1]:
        return PlaceError(f"{what}: its endpoint is no https URL; allow_http = true in `store` permits http")
    if unsent is not None:
        return PlaceUnreachableError(f"{what}: no answer from its endpoint ({unsent[1].strip()})")
    return PlaceError(f"{what}: {_without_addresses(text)}")


def _plain_name(key: str) -> str:
    """Give obstore's own short name of an option, which may be written as the environment variable's."""
    name = key.lower()
    short = _PREFIX.sub("", name)
    return short if short in _CLIENT | _NAMED_BY_THE_URL else name


def _plain_http_allowed() -> bool:
    """Whether the environment says so; obstore itself looks at the first of these alone, and not always."""
    names = ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP")
    return any(os.environ.get(name, "").lower() in {"1", "true"} for name in names)


def _configured(exc: Exception) -> str:
    text = _without_addresses(str(exc)).removeprefix("Generic ").replace(" error:", ":", 1)
    for told, meant in _HINTS.items():
        if told in text:
            return meant
    return text


def _told(text: str) -> str:
    code, message = _CODE.search(text), _MESSAGE.search(text)
    return ", ".join(found[1].strip().rstrip(".") for found in (code, message) if found is not None)


def _in_words(text: str) -> str:
    told = _told(text)
    return f" ({told})" if told else ""


def _without_addresses(text: str) -> str:
    return re.sub(r"\w+://\S+", "…", text.partition("\n")[0])[:200]
