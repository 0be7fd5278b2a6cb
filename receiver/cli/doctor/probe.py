"""Sends one canary to a callback URL and says what it met. Called by `dev` and `doctor`, for any receiver with our secret.

A canary is signed with a key of its own: the door answers it after an empty write, and it is never counted as a run.
"""

import json
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

import httpx

from receiver.flora.signature import HEADER, canary_key, sign

__all__ = ["Obstacle", "Probe", "probe"]

_OK = 200
_SHOWN = 200


class Obstacle(StrEnum):
    """Why there was no HTTP answer at all."""

    NAME = "name"
    """The host's name cannot be resolved."""
    REFUSED = "refused"
    """Nobody listens there, there is no way to the address, or nobody takes the connection up."""
    TIMEOUT = "timeout"
    """There is a connection, and no answer in time."""
    TLS = "tls"
    """Its certificate is not trusted, or it does not speak TLS."""
    CUT = "cut"
    """The connection ended before an answer came, or what came is not HTTP."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What one canary met on its way to `url`."""

    url: str
    seconds: float
    status: int | None = None
    answer: str | None = None
    """The door's word (`canary`) or the code of its refusal; None: the answer is not the receiver's."""
    location: str | None = None
    """Where a redirect leads; FLORA follows none."""
    server: str | None = None
    """Who says to have answered."""
    obstacle: Obstacle | None = None
    message: str = ""
    """What went wrong, for people: the error, or the beginning of an answer that is not ours."""

    @property
    def arrived(self) -> bool:
        """Whether the canary came to a receiver that knows the secret, unaltered, and that can commit."""
        return self.status == _OK and self.answer == "canary"


async def probe(url: str, secret: str, *, client: httpx.AsyncClient, clock: Callable[[], float] = time.time) -> Probe:
    """Send one canary to `url` (with its path). `client` decides about trust and patience; never raises for the network."""
    body = json.dumps({"canary": secrets.token_hex(8)}).encode()
    headers = {
        "Content-Type": "application/json",
        "Connection": "close",  # FLORA comes by a new connection: one that still stands would prove nothing
        HEADER: sign(body, canary_key(secret), timestamp=int(clock())),
        # ngrok's free plan puts a page of its own before visitors that do not say this; FLORA's POSTs never see it.
        "ngrok-skip-browser-warning": "1",
    }
    began = time.perf_counter()
    try:
        response = await client.post(url, content=body, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Probe(url, time.perf_counter() - began, obstacle=_obstacle(error), message=_said(error, url))
    seconds, answer = time.perf_counter() - began, _answer(response)
    return Probe(
        url,
        seconds,
        status=response.status_code,
        answer=answer,
        location=response.headers.get("location") if response.is_redirect else None,
        server=response.headers.get("server"),
        message="" if answer else " ".join(response.text.split())[:_SHOWN],
    )


def _answer(response: httpx.Response) -> str | None:
    try:
        document = response.json()
    except ValueError:
        return None
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    word = error.get("code") if isinstance(error, dict) else document.get("status")
    return word if isinstance(word, str) else None


def _obstacle(error: Exception) -> Obstacle:
    causes = list(_causes(error))
    if isinstance(error, httpx.ConnectTimeout):
        return Obstacle.REFUSED
    if isinstance(error, httpx.TimeoutException):
        return Obstacle.TIMEOUT
    if any(isinstance(each, ssl.SSLError) for each in causes):
        return Obstacle.TLS
    if isinstance(error, httpx.ConnectError):
        return Obstacle.NAME if any(isinstance(each, socket.gaierror) for each in causes) else Obstacle.REFUSED
    return Obstacle.CUT


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _said(error: Exception, url: str) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"{urlsplit(url).netloc} did not answer in time"
    return str(error) or type(error).__name__
