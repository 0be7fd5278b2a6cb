"""Limits on accepting: TLS handshakes in progress, and the limit of open files."""

import asyncio
import contextlib
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from receiver.net import certificates
from receiver.web.accept_limits import Acceptor, max_handshakes
from receiver.web.server import bind
from tests.support.patience import PATIENCE_SECONDS
from tests.web.test_connection_guard import hang_up


class Greeter(asyncio.Protocol):
    """Sends `hello` after the handshake."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(b"hello")
        transport.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The TLS contexts of a server and of a client that trusts it."""
    directory = tmp_path_factory.mktemp("tls")
    authority = certificates.make_authority()
    cert, key = certificates.write(certificates.issue(authority, "127.0.0.1"), directory)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    return server, ssl.create_default_context(cafile=str(certificates.save_authority(authority, directory)))


@contextlib.asynccontextmanager
async def run_acceptor(tls: ssl.SSLContext, at_once: int) -> AsyncIterator[int]:
    """Accept, and yield the port."""
    (listener,) = bind("127.0.0.1", 0)
    acceptor = Acceptor(listener, Greeter, tls, at_once=at_once, handshake_seconds=60)
    try:
        yield listener.getsockname()[1]
    finally:
        acceptor.close()
        await acceptor.wait_closed()
        listener.close()


async def read_greeting(port: int, tls: ssl.SSLContext) -> bytes:
    async with asyncio.timeout(PATIENCE_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        greeting = await reader.read()
        await hang_up(writer)
        return greeting


async def test_the_oldest_handshake_is_ended(certificate: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """A silent connection is kept only until another one needs its place."""
    server, client = certificate
    async with run_acceptor(server, at_once=5) as port:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        assert await read_greeting(port, client) == b"hello"
        for reader, _ in silent[:15]:
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    assert await reader.read() == b""
        assert await read_greeting(port, client) == b"hello"
        for _, writer in silent:
            await hang_up(writer)


async def test_a_failed_handshake_affects_no_other(
    certificate: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    """Plain HTTP, random bytes, a closed connection, a client without trust."""
    server, client = certificate
    async with run_acceptor(server, at_once=5) as port:
        for rubbish in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, b""):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(rubbish)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        with pytest.raises(ssl.SSLError):
            await read_greeting(port, ssl.create_default_context())
        assert await read_greeting(port, client) == b"hello"


@pytest.mark.parametrize(
    ("soft", "hard", "possible"),
    [
        pytest.param(256, 8000, 2000, id="raised"),
        pytest.param(256, 1024, 341, id="raised as far as it may be"),
        pytest.param(64, 64, 21, id="hardly any"),
    ],
)
def test_connections_fit_the_limit_of_open_files(soft: int, hard: int, possible: int) -> None:
    """Otherwise the guard's limit is never reached, and files get no descriptor."""
    program = f"""if True:
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
        from receiver.web.accept_limits import fit_connections
        print(fit_connections(2000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    found, files = map(int, done.stdout.splitlines()[-1].split())
    assert (found, files) == (possible, min(hard, 2000 + max_handshakes(2000) + 512))
