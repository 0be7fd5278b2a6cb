"""How `trigger` sends: one request, whole or held back at its end, and what came of it."""

import asyncio
import contextlib
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from receiver.cli.trigger.cases import Shot
from receiver.net.clients import tls_context

PATIENCE_SECONDS = 20.0
GOOD = frozenset({"accepted", "duplicate", "ignored"})
"""Words of a receiver that took a callback."""


@dataclass(frozen=True, slots=True)
class Hit:
    """What one request was answered with; `word` is the code of a refusal, else the receiver's word.

    Where `status` is None there was no answer, and `text` says why.
    """

    shot: Shot
    status: int | None
    text: str
    word: str | None
    seconds: float

    @property
    def as_expected(self) -> bool:
        wanted = self.shot.expected
        if wanted not in GOOD:
            return self.word == wanted
        # A receiver that is not ours has other words for it; a delivery may have been sent before.
        return self.status == 200 and self.word in {None, wanted, *(("duplicate",) if wanted == "accepted" else ())}


async def send(client: httpx.AsyncClient, url: str, shot: Shot, *, ca: Path | None) -> Hit:
    """Send one request and wait for its answer."""
    target = httpx.URL(url)
    target = target.copy_with(path=target.path + shot.further) if shot.further else target
    headers = {"Content-Type": "application/json", **shot.headers}
    began = time.perf_counter()
    try:
        if shot.held:
            answer = await _held_back(target, shot, headers, ca)
        else:
            answer = await client.request(shot.method, target, content=shot.body, headers=headers)
    except httpx.HTTPError as error:
        return Hit(shot, None, _why(error), None, time.perf_counter() - began)
    return Hit(shot, answer.status_code, answer.text, _word(answer), time.perf_counter() - began)


async def _held_back(url: httpx.URL, shot: Shot, headers: dict[str, str], ca: Path | None) -> httpx.Response:
    """Send all but the last byte, and return what is said to that: no client of HTTP listens before it is done."""
    request = httpx.Request(shot.method, url, content=shot.body, headers={**headers, "Connection": "close"})
    lines = [
        f"{shot.method} {url.raw_path.decode()} HTTP/1.1",
        *(f"{name}: {it}" for name, it in request.headers.items()),
    ]
    tls = tls_context(ca) if url.scheme == "https" else None
    raw = bytearray()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            reader, writer = await asyncio.open_connection(url.host, url.port or (443 if tls else 80), ssl=tls)
            writer.write("\r\n".join([*lines, "", ""]).encode() + shot.body[:-1])
            with contextlib.suppress(ConnectionError):  # it may hang up before we have heard all
                while piece := await reader.read(4096):
                    raw += piece
            writer.transport.abort()
    except TimeoutError as error:
        raise httpx.ReadTimeout("", request=request) from error
    except (OSError, ssl.SSLError) as error:
        raise httpx.ConnectError(str(error), request=request) from error
    head, _, body = bytes(raw).partition(b"\r\n\r\n")
    words = head.split()
    if len(words) < 2 or not words[1].isdigit():
        raise httpx.RemoteProtocolError("it hung up without an answer", request=request)
    return httpx.Response(int(words[1]), content=body, request=request)


def _why(error: httpx.HTTPError) -> str:
    """Say what went wrong on the way, and what to do about it."""
    if isinstance(error, httpx.TimeoutException):
        return "it took too long"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is not trusted here; give its CA with --ca"
    if isinstance(error, httpx.ConnectError):
        return f"{error}. Is it running, and is this its address (https or http)?"
    return str(error) or type(error).__name__


def _word(response: httpx.Response) -> str | None:
    try:
        document = response.json()
        word = document["error"]["code"] if "error" in document else document["status"]
    except (ValueError, KeyError, TypeError):
        return None
    return word if isinstance(word, str) else None
