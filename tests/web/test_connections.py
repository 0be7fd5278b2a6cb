"""HTTP as it is on the wire, with either parser: offers of another protocol, and what is no HTTP."""

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from receiver.web.connection_guard import Guard
from receiver.web.public import STATUS
from receiver.web.server import Server, bind
from tests.support.defaults import connection_limits
from tests.support.patience import PATIENCE_SECONDS

PARSERS = ("httptools", "h11")
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQC\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n"
INNER = b"GET /inner HTTP/1.1\r\nHost: t\r\n\r\n"
BY_LENGTH = b"Content-Length: %d\r\n\r\n%b" % (len(INNER), INNER)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\nX-Forwarded-For: 192.0.2.66\r\n\r\n" % (
    len(INNER),
    INNER,
)


async def _echo(request: Request) -> JSONResponse:
    try:
        body = (await request.body()).decode()
    except ClientDisconnect:  # or the body was malformed
        body = "disconnected"
    names = sorted(name.decode() for name, _ in request.scope["headers"])
    return JSONResponse({"method": request.method, "path": request.url.path, "body": body, "names": names})


@asynccontextmanager
async def run_server(parser: str, reasons: list[str] | None = None) -> AsyncIterator[int]:
    """Serve an app that tells what it was asked, and yield the port."""
    counted = reasons if reasons is not None else []
    guard = Guard(connection_limits(), on_close=counted.append) if parser == "httptools" else None
    app = Starlette(routes=[Route("/{path:path}", _echo, methods=["GET", "POST"])])
    server = Server(app, bind("127.0.0.1", 0), guard=guard)
    await server.start()
    try:
        yield server.port
    finally:
        await server.stop()


async def exchange(port: int, *pieces: bytes) -> bytes:
    """Send the pieces and return what comes until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
    came = b""
    async with asyncio.timeout(PATIENCE_SECONDS):
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65_536):
                came += piece
    writer.transport.abort()
    return came


def parse(came: bytes) -> list[tuple[int, Any]]:
    """Return the status and the JSON of each response."""
    found = []
    while came:
        head, _, came = came.partition(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 100 "):
            continue
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        assert fields[b"content-type"] == b"application/json", head
        length = int(fields[b"content-length"])
        found.append((int(head.split(b" ")[1]), json.loads(came[:length])))
        came = came[length:]
    return found


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("rest", [BY_LENGTH, CHUNKED, b"Content-Length: 0\r\n\r\n", b"\r\n"])
@pytest.mark.parametrize(
    "offer",
    [
        H2C,
        b"Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: TLS/1.0\r\n",
        b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
    ],
)
async def test_an_offer_of_another_protocol_is_ignored(
    parser: str, size: int, rest: bytes, offer: bytes
) -> None:
    """The body stays the body, however it is cut: what is written in it is no request (RFC 9110, 7.8)."""
    sent = b"POST /outer HTTP/1.1\r\nHost: t\r\n" + offer + rest + LAST
    async with run_server(parser) as port:
        came = await exchange(port, *(sent[at : at + size] for at in range(0, len(sent), size)))
    first, last = parse(came)
    body = INNER.decode() if INNER in rest else ""
    assert (first[1]["path"], first[1]["body"]) == ("/outer", body)
    assert "x-forwarded-for" not in first[1]["names"], "a trailer is no header"
    assert last[1]["path"] == "/last"


FRAMINGS = (
    b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    b"Content-Length: +5\r\n\r\nhello",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"X: y\r\n z\r\nContent-Length: 5\r\n\r\nhello",
    b"X: \x00\r\n\r\n",
    b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
    b"Expect: 100-continue\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
)


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_an_offer_changes_nothing_about_the_framing(framing: bytes) -> None:
    """Whatever a request is without the offer, it is with it: as many responses, with the same statuses."""
    start = b"POST /outer HTTP/1.1\r\nHost: t\r\n"
    async with run_server("httptools") as port:
        plain = parse(await exchange(port, start + framing + LAST))
        offered = parse(await exchange(port, start + H2C + framing + LAST))
        behind = parse(
            await exchange(port, start + framing.replace(b"\r\n\r\n", b"\r\n" + H2C + b"\r\n", 1) + LAST)
        )
    assert (
        [status for status, _ in plain]
        == [status for status, _ in offered]
        == [status for status, _ in behind]
    )
    assert [body.get("body") for _, body in plain] == [body.get("body") for _, body in offered]


async def test_many_offers_in_one_piece() -> None:
    """Each takes its place among the pipelined requests; too many are closed as ever."""
    request = b"POST /outer HTTP/1.1\r\nHost: t\r\n" + H2C + BY_LENGTH
    reasons: list[str] = []
    async with run_server("httptools", reasons) as port:
        responses = parse(await exchange(port, request * 16 + LAST))
        assert [body["path"] for _, body in responses] == ["/outer"] * 16 + ["/last"]
        assert await exchange(port, request * 5000) == b""
    assert reasons == ["too_many"]


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"hello\r\n\r\n", id="no HTTP"),
        pytest.param(b"\x16\x03\x01\x00\xf8\x01\x00\x00\xf4\x03\x03", id="TLS"),
        pytest.param(b"GET /\xff HTTP/1.1\r\nHost: t\r\n\r\n", id="bytes in the target"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: t\r\nX Y: z\r\n\r\n", id="white space in a name"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: +5\r\n\r\nhello", id="signed length"),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="no chunk"
        ),
    ],
)
async def test_what_is_no_http_is_refused_in_the_form_of_all_refusals(parser: str, request_: bytes) -> None:
    """In JSON with a code, where uvicorn has plain text."""
    reasons: list[str] = []
    async with run_server(parser, reasons) as port:
        [(status, body)] = parse(await exchange(port, request_))
        assert set(body["error"]) == {"code", "message"}
        assert (status, body["error"]["code"]) == (STATUS["malformed_request"], "malformed_request")
        assert body["error"]["message"]
    assert reasons == (["malformed"] if parser == "httptools" else [])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (b"CONNECT t:443 HTTP/1.1\r\nHost: t\r\n\r\n" + INNER, "no proxy"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", "use HTTP/1.1"),
        (b"GET http://t HTTP/1.1\r\nHost: t\r\n\r\n", "not a URL"),
        (
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
            "Content-Length",
        ),
    ],
)
async def test_the_refusal_says_what_is_wrong(request_: bytes, reason: str) -> None:
    async with run_server("httptools") as port:
        [(_, body)] = parse(await exchange(port, request_))
    assert reason in body["error"]["message"]


@pytest.mark.parametrize("parser", PARSERS)
async def test_requests_before_a_malformed_one_get_their_own_responses(parser: str) -> None:
    """In their order: a refusal that came first would be taken for the response to another request."""
    sent = [INNER, INNER, b"hello\r\n\r\n"]
    async with run_server(parser) as port:
        responses = parse(await exchange(port, b"".join(sent)))
    assert [body.get("path") for _, body in responses][:2] == ["/inner", "/inner"]
    assert [status for status, _ in responses[2:]] in ([], [400])


@pytest.mark.parametrize("parser", PARSERS)
async def test_a_request_gets_no_second_response(parser: str) -> None:
    """Its body turns out to be malformed after the response: the connection is closed without a word."""

    async def refuse(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"2"), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    guard = Guard(connection_limits()) if parser == "httptools" else None
    server = Server(refuse, bind("127.0.0.1", 0), guard=guard)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    async with asyncio.timeout(PATIENCE_SECONDS):
        came = await reader.readuntil(b"{}")
        writer.write(b"zz\r\n")
        with contextlib.suppress(ConnectionError):
            came += await reader.read()
    writer.transport.abort()
    await server.stop()
    assert [status for status, _ in parse(came)] == [413]


def run_curl(*arguments: str) -> Sequence[str]:
    done = subprocess.run(
        ["curl", "-sS", *arguments], capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
    )
    return done.stdout.split()


@pytest.mark.parametrize("parser", PARSERS)
async def test_curl_with_http2(parser: str) -> None:
    """It offers h2c over plain HTTP, and goes on in HTTP/1.1 on the same connection."""
    async with run_server(parser) as port:
        url = f"http://127.0.0.1:{port}/outer"
        form = (
            "--http2",
            "--data",
            "a",
            "--write-out",
            " %{http_version} %{http_code} %{num_connects}\n",
            url,
            url,
        )
        first = await asyncio.to_thread(run_curl, *form)
    assert [each for each in first if not each.startswith("{")] == ["1.1", "200", "1", "1.1", "200", "0"]
