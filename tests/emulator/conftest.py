"""A running emulator and a receiver for its callbacks, both servers on loopback."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from receiver.emulator import Emulator, EmulatorSettings
from tests.support.patience import PATIENCE_SECONDS


@contextlib.asynccontextmanager
async def serve_app(app: ASGIApp, certificate: Path | None = None) -> AsyncIterator[str]:
    """Serve `app` on a free loopback port and return its origin.

    A `certificate`, which includes its key, makes it HTTPS.
    """
    # asyncio sets TCP_NODELAY only with a named protocol; without it, responses wait 40 ms for an ACK.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_config=None, lifespan="off", timeout_graceful_shutdown=1, ssl_certfile=certificate
    )
    config.load()
    # serve() would take over the signal handlers of the test run, and its loop ticks every 0.1 s.
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listener])
    try:
        yield f"{'http' if certificate is None else 'https'}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        # uvicorn's shutdown always waits 0.1 s, which idle connections do not need.
        for connection in list(server.server_state.connections):
            connection.shutdown()
        for _ in range(10):
            await asyncio.sleep(0)
        if server.server_state.connections or server.server_state.tasks:
            await server.shutdown([listener])
        for one in server.servers:
            one.close()
        listener.close()


@dataclass
class Inbox:
    """A receiver of callbacks, which records them.

    It responds with the next of `answers`, then with 200.
    """

    url: str = ""
    answers: list[int] = field(default_factory=list)
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def take(self, request: Request) -> Response:
        self.received.append((dict(request.headers), await request.body()))
        status = self.answers.pop(0) if self.answers else 200
        return Response(
            status_code=status, headers={"location": "/callbacks/flora"} if status == 302 else None
        )

    def run_ids(self) -> list[str]:
        return [json.loads(body)["data"]["run_id"] for _, body in self.received]


@dataclass
class Bench:
    """A running emulator, and an HTTP client with its key."""

    emulator: Emulator
    client: httpx.AsyncClient
    origin: str

    async def start(
        self,
        technique: str = "emu-image",
        *,
        faults: object = None,
        status: int = 201,
        body: Mapping[str, object] | None = None,
    ) -> dict[str, object]:
        given: dict[str, object] = {
            "mode": "async",
            "inputs": [{"id": "prompt", "type": "text", "value": "a lighthouse"}],
        }
        given |= dict(body or {})
        headers = {"Emulator-Faults": json.dumps(faults)} if faults is not None else {}
        answer = await self.client.post(f"/techniques/{technique}/runs", json=given, headers=headers)
        assert answer.status_code == status, answer.text
        found: dict[str, object] = answer.json()
        return found

    async def run_id(
        self, technique: str = "emu-image", *, faults: object = None, callback_url: str | None = None
    ) -> str:
        return str(
            (await self.start(technique, faults=faults, body={"callback_url": callback_url}))["run_id"]
        )

    async def media_url(
        self,
        technique: str = "emu-image",
        *,
        faults: object = None,
        body: Mapping[str, object] | None = None,
    ) -> str:
        run = await self.start(technique, faults=faults, body=body)
        answer = await self.client.get(str(run["poll_url"]))
        return str(answer.json()["outputs"][0]["url"])

    async def break_it(self, *faults: dict[str, object]) -> None:
        answer = await self.client.post(f"{self.origin}/_emulator/faults", json={"faults": faults})
        assert answer.status_code == 200, answer.text

    async def drain(self) -> None:
        await asyncio.wait_for(self.emulator.drain(), PATIENCE_SECONDS)


MakeBench = Callable[[EmulatorSettings], Awaitable[Bench]]


@pytest.fixture
async def make_bench() -> AsyncIterator[MakeBench]:
    """Return a maker of emulators, which are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(settings: EmulatorSettings) -> Bench:
            emulator = Emulator(settings)
            origin = await stack.enter_async_context(serve_app(emulator.app))
            stack.push_async_callback(emulator.aclose)
            client = httpx.AsyncClient(
                base_url=emulator.base_url(origin),
                headers={"authorization": f"Bearer {settings.api_key}"},
                trust_env=False,
                # Loading the public CAs takes longer than most tests, and nothing here is HTTPS.
                verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
                timeout=PATIENCE_SECONDS,
            )
            await stack.enter_async_context(client)
            return Bench(emulator, client, origin)

        yield make


@pytest.fixture
async def bench(make_bench: MakeBench) -> Bench:
    """An emulator whose runs end at once and whose retries take milliseconds."""
    return await make_bench(
        EmulatorSettings(run_seconds=0, time_scale=10_000, allow_private_callbacks=True, seed=7)
    )


@pytest.fixture
async def inbox() -> AsyncIterator[Inbox]:
    inbox = Inbox()
    app = Starlette(routes=[Route("/callbacks/flora", inbox.take, methods=["POST"])])
    async with serve_app(app) as origin:
        inbox.url = f"{origin}/callbacks/flora"
        yield inbox


@pytest.fixture
async def tls_inbox(tmp_path: Path) -> AsyncIterator[tuple[Inbox, Path]]:
    """An inbox behind HTTPS, and the file of its self-signed certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "emulator test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1)
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    authority, pair = tmp_path / "ca.pem", tmp_path / "pair.pem"
    authority.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pair.write_bytes(
        authority.read_bytes()
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    inbox = Inbox()
    app = Starlette(routes=[Route("/callbacks/flora", inbox.take, methods=["POST"])])
    async with serve_app(app, pair) as origin:
        inbox.url = f"{origin}/callbacks/flora"
        yield inbox, authority
