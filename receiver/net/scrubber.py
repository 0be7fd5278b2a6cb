"""What no log line, finding or error may show, and how it is masked. Pure.

Used by `telemetry`, `config`, `plugins` and `cli`, so that all of them hide the same things.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

__all__ = ["MASK", "clean", "is_secret_name", "mask", "mask_all", "scrub"]

MASK = "***"
_SECRET_NAME = re.compile(
    r"(^|_)(secrets?|tokens?|authorization|api_?keys?|access_?keys?|private_?keys?|signatures?|body|credentials?"
    r"|passw(or)?ds?|passphrase|cookies?)$",
    re.IGNORECASE,
)
_SUSPECT = re.compile(r"://|whsec_|sk_live_|sk_test_|bearer |password=", re.IGNORECASE)
_CREDENTIAL = re.compile(r"(whsec_|sk_live_|sk_test_|bearer )[^\s\"',;)\]}]+", re.IGNORECASE)
_WEB_URL = re.compile(
    r"\b((?:https?|wss?)://)(?:[^\s/?#\"'<>]*@)?([^\s/?#\"'<>@]*)([^\s\"'<>]*)", re.IGNORECASE
)
# A password may hold any of ?, # and /, unescaped by mistake. Paths of stores may hold an @.
_SERVER_USERINFO = re.compile(
    r"((?:postgres(?:ql)?|mysql|mariadb|mssql|oracle|rediss?|amqps?|nats|mqtts?|kafka)(?:\+\w+)?://)[^\s\"'<>]*@",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(?<=://)[^\s/?#\"'<>]*@")
_PASSWORD = re.compile(r"\b((?:ssl)?password=)[^\s&\"',;]+", re.IGNORECASE)


def mask(text: str) -> str:
    """Return a text without keys, secrets, tokens and passwords; URLs stay."""
    if not _SUSPECT.search(text):
        return text
    text = _SERVER_USERINFO.sub(rf"\1{MASK}@", text)
    text = _USERINFO.sub(f"{MASK}@", text)
    return _PASSWORD.sub(rf"\1{MASK}", _CREDENTIAL.sub(rf"\1{MASK}", text))


def mask_all(value: Any) -> Any:
    """Return JSON values with `mask` applied to every text in them."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {name: mask_all(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [mask_all(each) for each in value]
    return value


def scrub(text: str) -> str:
    """Return a text as a log line shows it: secrets masked, web URLs cut to scheme and host."""
    return mask(_WEB_URL.sub(_shorten, text)) if _SUSPECT.search(text) else text


def clean(name: str, value: Any, *, shorten: bool = True) -> Any:
    """Return `value` as a log line shows it under `name`; `shorten` cuts web URLs."""
    if value is None or isinstance(value, int | float):
        return value
    if is_secret_name(name):
        return MASK
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return {str(key): clean(str(key), each, shorten=shorten) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [clean("", each, shorten=shorten) for each in value]
    text = str(value) if isinstance(value, str | BaseException) else repr(value)
    return scrub(text) if shorten else mask(text)


@lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Return whether what is called `name` is a secret: `api_key`, `lease_token`, `Flora-Signature`."""
    return _SECRET_NAME.search(_to_snake_case(name)) is not None


def _to_snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_")


def _shorten(url: re.Match[str]) -> str:
    scheme, host, rest = url.groups()
    return f"{scheme}{host}{'/…' if len(rest) > 1 else rest}"
