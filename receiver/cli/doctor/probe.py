"""Sends a canary to a callback URL and describes what happened to it. Called by `dev` and `doctor`.

A canary is signed with a key that is derived from the signing secret. The receiver responds after
an empty write, and records neither a callback nor a run.
"""

import json
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from urllib.parse import urlsplit

import httpx

from receiver.flora.signature import HEADER, canary_key, sign

__all__ = ["ProbeFailure", "ProbeResult", "probe"]

_MAX_MESSAGE = 200


class ProbeFailure(StrEnum):
    """Why there was no HTTP response."""

    NAME = "name"
    """The host name could not be resolved."""
    REFUSED = "refused"
    """No connection could be made."""
    TIMEOUT = "timeout"
    """The connection was made, and no response came in time."""
    TLS = "tls"
    """The certificate is not trusted, or the server does not speak TLS."""
    CUT = "cut"
    """The connection ended before a response, or the response was not HTTP."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What happened to one canary that was sent to `url`."""

    url: str
    seconds: float
    status: int | None = None
    code: str | None = None
    """The receiver's `status` (`canary`) or error code; None if the receiver did not respond."""
    location: str | None = None
    """The target of a redirect; FLORA does not follow redirects."""
    server: str | None = None
    """The `Server` header of the response."""
    failure: ProbeFailure | None = None
    message: str = ""
    """The error, or the beginning of a response that is not the receiver's."""

    @property
    def has_arrived(self) -> bool:
        """Whether a receiver that has the secret and can commit got the canary unaltered."""
        return self.status == HTTPStatus.OK and self.code == "canary"


async def probe(
    url: str, secret: str, *, client: httpx.AsyncClient, clock: Callable[[], float] = time.time
) -> ProbeResult:
    """Send one canary to `url`, which includes the path. Network errors are part of the result.

    `client` decides which certificates are trusted and how long a response may take.
    """
    body = json.dumps({"canary": secrets.token_hex(8)}).encode()
    headers = {
        "Content-Type": "application/json",
        # Like FLORA, use a new connection: one that is still open would prove nothing.
        "Connection": "close",
        HEADER: sign(body, canary_key(secret), timestamp=int(clock())),
        # Without this, ngrok's free plan responds with a page of its own, which FLORA never gets.
        "ngrok-skip-browser-warning": "1",
    }
    began = time.perf_counter()
    try:
        response = await client.post(url, content=body, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        seconds = time.perf_counter() - began
        message = _describe_error(error, url)
        return ProbeResult(url, seconds, failure=_classify_error(error), message=message)
    seconds, code = time.perf_counter() - began, _parse_code(response)
    return ProbeResult(
        url,
        seconds,
        status=response.status_code,
        code=code,
        location=response.headers.get("location") if response.is_redirect else None,
        server=response.headers.get("server"),
        message="" if code else " ".join(response.text.split())[:_MAX_MESSAGE],
    )


def _parse_code(response: httpx.Response) -> str | None:
    try:
        document = response.json()
    except ValueError:
        return None
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    code = error.get("code") if isinstance(error, dict) else document.get("status")
    return code if isinstance(code, str) else None


def _classify_error(error: Exception) -> ProbeFailure:
    causes = list(_walk_causes(error))
    if isinstance(error, httpx.ConnectTimeout):
        return ProbeFailure.REFUSED
    if isinstance(error, httpx.TimeoutException):
        return ProbeFailure.TIMEOUT
    if any(isinstance(each, ssl.SSLError) for each in causes):
        return ProbeFailure.TLS
    if isinstance(error, httpx.ConnectError):
        is_unresolved = any(isinstance(each, socket.gaierror) for each in causes)
        return ProbeFailure.NAME if is_unresolved else ProbeFailure.REFUSED
    return ProbeFailure.CUT


def _walk_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _describe_error(error: Exception, url: str) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"{urlsplit(url).netloc} did not respond in time"
    return str(error) or type(error).__name__
