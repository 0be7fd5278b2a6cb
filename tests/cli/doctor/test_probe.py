"""A canary is sent to a real receiver, and to servers that are none."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from receiver.cli.doctor.probe import ProbeFailure, probe
from receiver.net.clients import own_client, probe_client
from receiver.web.server import Server, bind
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, free_port

SECRET = "whsec_probe"


async def test_a_canary_arrives_and_leaves_no_trace(stage: Stage) -> None:
    """Through TLS with a trusted CA, and on loopback without a check of the certificate."""
    async with stage.service(), probe_client(ca=stage.ca) as outside, own_client() as inside:
        for client in (outside, inside):
            found = await probe(stage.url, stage.secret, client=client)
            assert found.has_arrived
            assert (found.status, found.code, found.failure) == (200, "canary", None)
            assert found.seconds > 0
    assert stage.rows("SELECT * FROM deliveries") == []
    assert stage.rows("SELECT * FROM runs") == []


async def test_a_refused_canary_has_the_error_code(stage: Stage) -> None:
    """A wrong secret and a wrong clock have the same code: a canary is valid for one minute."""
    async with stage.service(), own_client() as client:
        wrong = await probe(stage.url, "whsec_another", client=client)
        old = await probe(stage.url, stage.secret, client=client, clock=lambda: 1.0)
    for found in (wrong, old):
        assert not found.has_arrived
        assert (found.status, found.code) == (401, "signature_mismatch")


async def test_a_certificate_that_is_not_trusted(stage: Stage) -> None:
    async with stage.service(), probe_client() as client:
        found = await probe(stage.url, stage.secret, client=client)
    assert found.failure is ProbeFailure.TLS
    assert "CERTIFICATE_VERIFY_FAILED" in found.message


async def respond(request: Request) -> Response:
    match request.path_params["what"]:
        case "redirect":
            return RedirectResponse("https://127.0.0.1/other", 301)
        case "page":
            return PlainTextResponse("Tunnel   not found\n", 404)
        case _:
            return JSONResponse([])


@pytest.fixture
async def other() -> AsyncIterator[str]:
    """Run a server that is no receiver."""
    server = Server(Starlette(routes=[Route("/{what}", respond, methods=["POST"])]), bind("127.0.0.1", 0))
    await server.start()
    yield f"http://127.0.0.1:{server.port}"
    await server.stop()


async def test_a_server_that_is_no_receiver(other: str) -> None:
    """A redirect is not followed, and each kind of failure is distinguished."""
    async with probe_client(timeout_seconds=PATIENCE_SECONDS) as client:
        moved = await probe(f"{other}/redirect", SECRET, client=client)
        assert (moved.status, moved.location, moved.has_arrived) == (301, "https://127.0.0.1/other", False)
        page = await probe(f"{other}/page", SECRET, client=client)
        assert (page.status, page.code, page.message) == (404, None, "Tunnel not found")
        assert (await probe(f"{other}/list", SECRET, client=client)).code is None
        closed = await probe(f"http://127.0.0.1:{free_port()}/", SECRET, client=client)
        assert closed.failure is ProbeFailure.REFUSED
        unknown = await probe("http://unknown.invalid/", SECRET, client=client)
        assert unknown.failure in {
            ProbeFailure.NAME,
            ProbeFailure.REFUSED,
        }  # a resolver may be slow to say no
        assert (await probe("https://" + other[7:], SECRET, client=client)).failure is ProbeFailure.TLS


async def test_no_response_in_time() -> None:
    """The connection is accepted and nothing follows, as with a suspended program."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        async with probe_client(timeout_seconds=0.2) as client:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            assert (await probe(url, SECRET, client=client)).failure is ProbeFailure.TIMEOUT


async def test_a_connection_that_is_cut() -> None:
    async def cut(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(cut, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, probe_client() as client:
        assert (await probe(f"http://127.0.0.1:{port}/", SECRET, client=client)).failure is ProbeFailure.CUT


async def test_the_client_without_certificate_checks_stays_on_loopback() -> None:
    """It trusts any certificate, so it must not connect elsewhere."""
    async with own_client() as client:
        found = await probe("https://hooks.example.com/", SECRET, client=client)
    assert "not on this machine" in found.message
