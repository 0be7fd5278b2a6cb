"""Guarded posts to one configured address. Handlers use them through `receiver.handler`.

HTTPS to public addresses unless configured otherwise, no redirects, no cookies, no proxy from the
environment, every wait bounded. An address may itself be a secret, as those of chat services are:
no message made here shows more than its host.
"""

import asyncio
import html
import json
import re
import ssl
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import httpcore
import httpx

from receiver.errors import PostError, PostFailedError, PostRefusedError
from receiver.net.addresses import is_loopback, parse_address
from receiver.net.clients import (
    GuardedBackend,
    PrivateAddressError,
    Resolve,
    is_public,
    media_client,
    resolve,
    tls_context,
)
from receiver.net.retry_after import parse_retry_after

__all__ = ["Posted", "Poster", "header_value", "target_url", "usable_headers"]

MAX_BODY_BYTES = 64 * 1024  # read of a response
EXCERPT = 200  # characters of a response's body that may be shown
BODY_SECONDS = 2.0  # for a response's body, once its status is known
CONNECT_SECONDS = 10.0

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_URL = re.compile(r"https?(?::|%3A)(?:\\?/|%2F){2}[^\s\"'<>]+", re.IGNORECASE)
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "expect",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_RESERVED = frozenset({"host", "content-length", "content-type", "content-encoding", "accept-encoding"})
_MIN_SECRET = 6  # shorter words of a header may be shown


@dataclass(frozen=True, slots=True)
class Posted:
    """The response to a post, whatever its status."""

    status: int
    """The HTTP status."""
    retry_after_seconds: float | None
    """The pause in `Retry-After`, given there in seconds or as a date, at most an hour; else None."""
    location: str | None
    """Scheme and host of a redirect's target. Redirects are not followed."""
    excerpt: str
    """The beginning of the body on one line, without URLs and without the values of `headers`."""


def target_url(text: str, *, allow_private: bool) -> str:
    """Return a URL in the form in which it is posted to.

    Raises ValueError with the reason, which does not show the URL.
    """
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError):
        raise ValueError("is not a URL") from None
    if not text.isprintable() or " " in text:  # httpx would encode them
        raise ValueError("is not a URL: it has blanks in it")
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("must be https://host/path")
    if url.userinfo:
        raise ValueError("must not hold a user name or password: put `Authorization` into `headers`")
    if url.fragment:
        raise ValueError("must not have a fragment (#…): no server would see it")
    if url.port is not None and not 0 < url.port < 65536:
        raise ValueError("has a port that does not exist")
    if allow_private:
        return str(url)
    if url.scheme == "http":
        raise ValueError("must be https; plain http needs `allow_private = true`")
    address = parse_address(url.host)
    if is_loopback(url.host) or (address is not None and not is_public(str(address))):
        raise ValueError("is not a public address: a private one needs `allow_private = true`")
    return str(url)


def usable_headers(headers: Mapping[str, str], *, reserved: Iterable[str] = ()) -> dict[str, str]:
    """Return headers with lower-case names.

    `reserved` are further names that are refused, or prefixes of names, which end in `-`. Raises
    ValueError with the name of a header that no request may carry, never with its value.
    """
    usable: dict[str, str] = {}
    names = _RESERVED | frozenset(reserved)
    prefixes = tuple(name for name in names if name.endswith("-"))
    for name, value in headers.items():
        lower = name.lower()
        if not _TOKEN.fullmatch(name):
            raise ValueError("contains a name that is not a header's name")
        if lower in _HOP_BY_HOP:
            raise ValueError(f"{name} belongs to the connection and cannot be set")
        if lower in names or lower.startswith(prefixes):
            raise ValueError(f"{name} is set by the receiver itself")
        if lower in usable:
            raise ValueError(f"{name} is given twice")
        if not _VALUE.fullmatch(value):
            raise ValueError(
                f"{name} has a value that no header can hold: printable ASCII only, without blanks around it"
            )
        usable[lower] = value
    return usable


def header_value(text: str) -> str:
    """Return a text for a header: percent-encoded except for visible ASCII, as in CloudEvents."""
    return quote(text.encode(errors="replace"), safe="!#$&'()*+,/:;=?@[]^`{|}~<>\\")


class Poster:
    """Posts to one URL and keeps its connections open for a while.

    `allow_private` permits a private address, and plain http, for the host and port of the URL.
    `headers` are sent with every post and count as secret. `ca_file` is a PEM file of further CAs.
    Raises ValueError where the URL, the headers or the file cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        allow_private: bool = False,
        ca_file: Path | None = None,
        timeout_seconds: float = 15.0,
        resolve: Resolve = resolve,
    ) -> None:
        self._url = httpx.URL(target_url(url, allow_private=allow_private))
        self._headers = usable_headers(headers or {})
        self._timeout_seconds = timeout_seconds
        self._tls = _tls(ca_file)
        self._port = self._url.port or (443 if self._url.scheme == "https" else 80)
        self._ascii_host = self._url.raw_host.decode("ascii")
        self._secrets = _secret_spellings(self._url, self._headers)
        names = {self._url.host, self._ascii_host} if allow_private else set()
        self._backend = GuardedBackend(
            allowed=[(name.lower(), self._port) for name in names], resolve=resolve
        )
        self._client = media_client(
            allow_private_hosts=[f"{f'[{name}]' if ':' in name else name}:{self._port}" for name in names],
            resolve=resolve,
            tls=self._tls,
            connect_seconds=min(CONNECT_SECONDS, timeout_seconds),
            stall_seconds=timeout_seconds,
        )

    @property
    def host(self) -> str:
        """The host of the URL, which may be shown."""
        return self._url.host

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def post(
        self, body: bytes, *, content_type: str, headers: Mapping[str, str] | None = None
    ) -> Posted:
        """Post once and return the response; `headers` are sent with this post only.

        A response counts once its status is known: its body may be slow, cut or endless. Raises
        PostRefusedError or PostFailedError where no response comes.
        """
        request = self._client.build_request(
            "POST",
            self._url,
            content=body,
            headers={**self._headers, **usable_headers(headers or {}), "content-type": content_type},
        )
        try:
            async with asyncio.timeout(self._timeout_seconds):
                response = await self._client.send(request, stream=True)
        except TimeoutError:
            raise PostFailedError(f"{self.host}: no answer within {self._timeout_seconds:g} s") from None
        except httpx.HTTPError as error:  # `from None`: the HTTP layer quotes headers
            raise self._to_post_error(error) from None
        try:
            received = await _read_beginning(response)
        finally:
            await response.aclose()
        return Posted(
            status=response.status_code,
            retry_after_seconds=parse_retry_after(response.headers, datetime.now(UTC)) or None,
            location=_origin(response),
            excerpt=_excerpt(received, self._secrets),
        )

    async def connect(self) -> None:
        """Connect, TLS included, and close without a request.

        Raises PostRefusedError or PostFailedError.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                stream = await self._backend.connect_tcp(self._ascii_host, self._port, CONNECT_SECONDS)
                try:
                    if self._url.scheme == "https":
                        stream = await stream.start_tls(self._tls, self._ascii_host, CONNECT_SECONDS)
                finally:
                    await stream.aclose()
        except TimeoutError:
            raise PostFailedError(
                f"{self.host}: no connection within {self._timeout_seconds:g} s"
            ) from None
        except (httpcore.NetworkError, httpcore.TimeoutException) as error:
            raise self._to_connect_error(error) from None

    def _to_post_error(self, error: httpx.HTTPError) -> PostError:
        match error:
            case httpx.ConnectError() | httpx.ConnectTimeout():
                return self._to_connect_error(error.__cause__ or error)
            case httpx.UnsupportedProtocol():
                return PostRefusedError(f"{self.host}: only https is supported")
            case httpx.TimeoutException():
                return PostFailedError(f"{self.host}: no answer within {self._timeout_seconds:g} s")
            case _:
                return PostFailedError(f"{self.host}: cut, or not proper HTTP ({type(error).__name__})")

    def _to_connect_error(self, error: BaseException) -> PostError:
        match error.__cause__ or error.__context__:  # httpcore's pool raises anew, `from None`
            case ssl.SSLCertVerificationError(verify_message=reason):
                return PostRefusedError(
                    f"{self.host}: its certificate is not valid: {reason} (own CAs go into `ca_file`)"
                )
            case _ if isinstance(error, PrivateAddressError):
                return PostRefusedError(f"{error} (`allow_private = true` allows it)")
            case _ if isinstance(error, httpcore.ConnectTimeout | httpx.ConnectTimeout):
                return PostFailedError(f"{self.host}: no connection in time")
            case _:
                return PostFailedError(f"{self.host}: no connection: {error}")


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return tls_context(ca_file)
    except (OSError, ValueError):  # an SSLError is an OSError
        raise ValueError("`ca_file` cannot be read, or holds no certificates in PEM") from None


async def _read_beginning(response: httpx.Response) -> bytes:
    """Return the beginning of the body.

    A short one is read to its end: the connection can be reused.
    """
    received = bytearray()
    with suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(BODY_SECONDS):
            async for part in response.aiter_raw():
                received += part[: MAX_BODY_BYTES - len(received)]
                if len(received) >= MAX_BODY_BYTES:
                    break
    return bytes(received)


def _secret_spellings(url: httpx.URL, headers: Mapping[str, str]) -> list[str]:
    """Return the secrets that a server may quote, in every usual spelling, longest first."""
    words = {
        word for value in headers.values() for word in (value, *value.split()) if len(word) >= _MIN_SECRET
    }
    target = url.raw_path.decode("ascii")
    words |= {part for part in (target, url.path) if part != "/"}
    spellings = {
        spelling
        for word in words
        for spelling in (
            word,
            html.escape(word),
            quote(word, safe=""),
            json.dumps(word)[1:-1],
            json.dumps(word)[1:-1].replace("/", "\\/"),
        )
    }
    return sorted(spellings, key=len, reverse=True)


def _excerpt(received: bytes, secrets: Iterable[str]) -> str:
    text = received.decode("utf-8", errors="replace")
    for word in secrets:
        text = text.replace(word, "…")
    text = _URL.sub("…", text)
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:EXCERPT]


def _origin(response: httpx.Response) -> str | None:
    try:
        target = response.url.join(response.headers["location"])
    except (KeyError, httpx.InvalidURL, UnicodeError):
        return None
    return f"{target.scheme}://{target.raw_host.decode('ascii', 'replace')}"[:EXCERPT]
