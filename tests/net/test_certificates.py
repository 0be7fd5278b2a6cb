"""TLS with throw-away certificates: it verifies under their CA alone, for the named hosts alone."""

import asyncio
import ssl
import stat
from pathlib import Path

import pytest

from receiver.net.certificates import Authority, issue, make_authority, write


@pytest.fixture(scope="module")
def authority() -> Authority:
    return make_authority()


async def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str | None:
    """Return the TLS version that both ends agree on over a real connection."""

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    listener = await asyncio.start_server(close, "127.0.0.1", 0, ssl=server)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname=name)
        version: str | None = writer.get_extra_info("ssl_object").version()
        writer.close()
        await writer.wait_closed()
        return version


def contexts(authority: Authority, directory: Path, *hosts: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*write(issue(authority, *hosts), directory))
    client = ssl.create_default_context(cadata=authority.pem.decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # what Python 3.13 asks for by default
    return server, client


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
async def test_a_local_certificate_verifies_under_its_ca(
    authority: Authority, tmp_path: Path, name: str
) -> None:
    assert await handshake(*contexts(authority, tmp_path), name) == "TLSv1.3"


async def test_a_certificate_holds_for_its_own_hosts_alone(authority: Authority, tmp_path: Path) -> None:
    server, client = contexts(authority, tmp_path, "hooks.example.com")
    assert await handshake(server, client, "hooks.example.com")
    with pytest.raises(ssl.SSLCertVerificationError):
        await handshake(server, client, "other.example.com")


async def test_another_ca_is_not_trusted(authority: Authority, tmp_path: Path) -> None:
    server, _ = contexts(authority, tmp_path)
    _, client = contexts(make_authority(), tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        await handshake(server, client, "localhost")


def test_only_the_owner_reads_the_key(authority: Authority, tmp_path: Path) -> None:
    """Also where a file with a wider mode was there before."""
    (tmp_path / "server.key").touch(0o644)
    _, key = write(issue(authority), tmp_path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert b"PRIVATE KEY" in key.read_bytes()


def test_a_private_key_does_not_show_in_repr(authority: Authority) -> None:
    assert "PRIVATE" not in repr(issue(authority))
