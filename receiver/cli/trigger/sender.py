"""Sending one request of `trigger`, whole or without its last byte, and judging the response."""

import asyncio
import contextlib
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from receiver.cli.trigger.cases import CallbackRequest
from receiver.net.clients import tls_context

TIMEOUT_SECONDS = 20.0
SUCCESSES = frozenset({"accepted", "duplicate", "ignored"})
"""Values of `status` in a receiver's response 200."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one request; `code` is that of a refusal, else the `status` in the response.

    `status` is None if there was no response; `text` is then the reason, else the response's body.
    """

    request: CallbackRequest
    status: int | None
    text: str
    code: str | None
    seconds: float

    @property
    def is_expected(self) -> bool:
        expected = self.request.expected
        if expected not in SUCCESSES:
            return self.code == expected
        # Other receivers have other codes, or none; an accepted delivery may have been sent before.
        codes = {None, expected, "duplicate"} if expected == "accepted" else {None, expected}
        return self.status == httpx.codes.OK and self.code in codes


async def send(client: httpx.AsyncClient, url: str, request: CallbackRequest, *, ca: Path | None) -> Result:
    """Send one request and wait for the response."""
    target = httpx.URL(url)
    if request.path_suffix:
        target = target.copy_with(path=target.path + request.path_suffix)
    headers = {"Content-Type": "application/json", **request.headers}
    began = time.perf_counter()
    try:
        if request.is_held:
            response = await _send_held(target, request, headers, ca)
        else:
            response = await client.request(request.method, target, content=request.body, headers=headers)
    except httpx.HTTPError as error:
        return Result(request, None, _describe_error(error, ca), None, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return Result(request, response.status_code, response.text, _find_code(response), seconds)


async def _send_held(
    url: httpx.URL, request: CallbackRequest, headers: dict[str, str], ca: Path | None
) -> httpx.Response:
    """Send all but the last byte and return the response, which HTTP clients would not read yet."""
    headers = {**headers, "Connection": "close"}
    built = httpx.Request(request.method, url, content=request.body, headers=headers)
    lines = [f"{request.method} {url.raw_path.decode()} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in built.headers.items()]
    tls = tls_context(ca) if url.scheme == "https" else None
    port = url.port or (443 if tls else 80)
    raw = bytearray()
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            reader, writer = await asyncio.open_connection(url.host, port, ssl=tls)
            writer.write("\r\n".join([*lines, "", ""]).encode() + request.body[:-1])
            with contextlib.suppress(ConnectionError):  # the receiver may close without a TLS goodbye
                while piece := await reader.read(4096):
                    raw += piece
            writer.transport.abort()
    except TimeoutError as error:
        raise httpx.ReadTimeout("", request=built) from error
    except (OSError, ssl.SSLError) as error:
        raise httpx.ConnectError(str(error), request=built) from error
    head, _, body = bytes(raw).partition(b"\r\n\r\n")
    words = head.split()
    if len(words) < 2 or not words[1].isdigit():
        raise httpx.RemoteProtocolError("the connection was closed without a response", request=built)
    return httpx.Response(int(words[1]), content=body, request=built)


def _describe_error(error: httpx.HTTPError, ca: Path | None) -> str:
    """Return why there was no response, and what to do about it."""
    if isinstance(error, httpx.TimeoutException):
        return "it took too long"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return _describe_certificate(str(error), ca)
    if isinstance(error, httpx.ConnectError):
        return f"{error}. Is the receiver running, and is the URL right (https or http)?"
    return str(error) or type(error).__name__


def _describe_certificate(text: str, ca: Path | None) -> str:
    """Return why a certificate is refused; a CA only helps where its issuer is unknown."""
    if "expired" in text or "not yet valid" in text:
        return "the certificate is not valid now: it has expired, or a clock is wrong"
    if "mismatch" in text:
        return "the certificate is for another host than the one in the URL"
    if ca is not None:
        return f"the certificate is issued by none of the CAs in {ca} and none that this machine trusts"
    return "the certificate is not trusted on this machine; pass its CA with --ca"


def _find_code(response: httpx.Response) -> str | None:
    try:
        document = response.json()
        code = document["error"]["code"] if "error" in document else document["status"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, str) else None
