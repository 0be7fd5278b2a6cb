"""What a running service takes over, tick by tick."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from starlette.types import Receive, Scope, Send

from receiver.config import Settings, Tls
from receiver.errors import ConfigError, Problem
from receiver.net import certificates
from receiver.service.certificate_watch import CertificateWatch
from receiver.service.reloader import Reloader
from receiver.service.service import Service
from receiver.telemetry import Metrics
from receiver.web.server import Server, bind
from tests.support.core import Clock


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotImplementedError


@asynccontextmanager
async def watched(cert: Path, key: Path) -> AsyncIterator[tuple[CertificateWatch, Server, Metrics]]:
    """Serve a pair, and watch its files by the real clock."""
    server = Server(app, bind("127.0.0.1", 0), cert=cert, key=key, name="public")
    await server.start()
    metrics = Metrics()
    watch = CertificateWatch(Tls(cert=cert, key=key), metrics=metrics, clock=lambda: datetime.now(UTC))
    watch.attach(server)
    try:
        yield watch, server, metrics
    finally:
        await server.stop()


async def served(server: Server) -> bytes:
    """Return the certificate that a new connection gets, as PEM."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return ssl.DER_cert_to_PEM_cert(found).encode()


def write_rsa(cert: Path, key: Path, *, days: int = 90) -> bytes:
    """Write a self-signed RSA pair, and return the certificate."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
        .serial_number(1).not_valid_before(now - timedelta(days=100)).not_valid_after(now + timedelta(days=days))
        .sign(private, hashes.SHA256())
    )  # fmt: skip
    pem = made.public_bytes(serialization.Encoding.PEM)
    cert.write_bytes(pem)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return pem


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return certificates.write(certificates.issue(certificates.make_authority()), tmp_path)


async def test_a_pair_of_another_key_type_replaces_the_old_one(pair: tuple[Path, Path]) -> None:
    """A context that is loaded again would keep both, and serve the old one to most callers."""
    async with watched(*pair) as (watch, server, metrics):
        assert not await watch.tick()
        assert metrics.certificate_seconds.labels("public")._value.get() == pytest.approx(
            7 * 86_400, abs=3600
        )
        old = await served(server)
        new = write_rsa(*pair)
        assert await watch.tick()
        assert await served(server) == old  # seen once: it may still be written
        assert not await watch.tick()
        assert await served(server) == new
        assert metrics.certificate_seconds.labels("public")._value.get() == pytest.approx(
            90 * 86_400, abs=3600
        )


async def test_an_expired_pair_does_not_replace_a_valid_one(pair: tuple[Path, Path]) -> None:
    """A restored backup, for example: the one in use is better."""
    async with watched(*pair) as (watch, server, _):
        await watch.tick()
        old = await served(server)
        write_rsa(*pair, days=-1)
        await watch.tick()
        await watch.tick()
        assert await served(server) == old
        with pytest.raises(ConfigError, match="has expired"):
            watch.prepare(watch.tls)


async def test_a_symlink_that_is_swapped_is_noticed(tmp_path: Path) -> None:
    """As certbot and Kubernetes do it; the time of the file tells nothing."""
    authority = certificates.make_authority()
    for name in ("a", "b"):
        certificates.write(certificates.issue(authority), tmp_path / name)
    link = tmp_path / "live"
    link.symlink_to("a")
    async with watched(link / "server.pem", link / "server.key") as (watch, server, _):
        await watch.tick()
        (tmp_path / "next").symlink_to("b")
        (tmp_path / "next").replace(link)
        await watch.tick()
        await watch.tick()
        assert await served(server) == (tmp_path / "b" / "server.pem").read_bytes()


class Loader:
    """Settings that a test changes, in place of files."""

    def __init__(self, directory: Path, **sections: Any) -> None:
        self.directory = directory
        self.sections: dict[str, Any] = {}
        self.problem: Problem | None = None
        self.change(**sections)

    def change(self, **sections: Any) -> None:
        self.sections |= sections

    def settings(self) -> Settings:
        base = {
            "public": {"host": "127.0.0.1", "port": 0},
            "operations": {"port": 0},
            "database": {"url": f"sqlite:///{self.directory / 'receiver.db'}"},
            "handlers": [{"use": "log"}],
        }
        return Settings.model_validate(base | self.sections)

    def __call__(self, reread: bool) -> Settings:
        if self.problem is not None:
            raise ConfigError([self.problem])
        return self.settings()


@asynccontextmanager
async def reloading(loader: Loader) -> AsyncIterator[tuple[Service, Reloader]]:
    """Run a service, and tick a reloader of its parts beside its own loop."""
    service = Service(loader.settings(), clock=Clock())
    async with service.running():
        yield service, Reloader(service._parts, load=loader)


async def test_a_workspace_gains_and_loses_its_key(tmp_path: Path) -> None:
    """Its runs are read and started with the key of its own, and then with the common one again."""
    flora = {"api_key": "sk_test_1", "webhook_secrets": ["whsec_1"]}
    own = [{"id": "ws_1", "secrets": ["whsec_2"], "api_key": "sk_test_2"}]
    loader = Loader(tmp_path, flora=flora)
    async with reloading(loader) as (service, reloader):
        common = service.starter._client("ws_1")
        assert common.api_key == "sk_test_1"
        loader.change(workspaces=own)
        await reloader.tick()
        assert service.starter._client("ws_1") is common  # seen once
        await reloader.tick()
        assert service.starter._client("ws_1").api_key == "sk_test_2"
        assert service.starter._client("ws_2") is common  # with its rate limit and its connections
        assert set(service.poller._keys) == {None, "ws_1"}
        loader.change(workspaces=[])
        await reloader.tick()
        await reloader.tick()
        assert service.starter._client("ws_1") is common
        assert set(service.poller._keys) == {None}


async def test_a_request_is_served_at_once_and_a_wrong_one_changes_nothing(tmp_path: Path) -> None:
    flora = {"api_key": "sk_test_1", "webhook_secrets": ["whsec_1"]}
    loader = Loader(tmp_path, flora=flora)
    async with reloading(loader) as (service, reloader):
        loader.change(flora=flora | {"webhook_secrets": ["whsec_2"]})
        loader.problem = Problem("flora.api_key", "is empty")
        reloader.request()
        await reloader.tick()
        assert service.intake._keys == ("whsec_1",)
        loader.problem = None
        reloader.request()
        await reloader.tick()
        assert service.intake._keys == ("whsec_2",)


async def test_a_request_is_reported_to_the_supervisor(tmp_path: Path) -> None:
    """The service manager waits for the end of a reload, however it ends."""
    loader = Loader(tmp_path, flora={"api_key": "sk_test_1", "webhook_secrets": ["whsec_1"]})
    heard: list[bool] = []
    async with reloading(loader) as (_, reloader):
        reloader.on_request = heard.append
        await reloader.tick()
        assert heard == []
        loader.problem = Problem("flora", "is wrong")
        reloader.request()
        await reloader.tick()
        assert heard == [False, True]
