"""Each fault is found under its own id, with real servers on loopback."""

import asyncio
import contextlib
import errno
import json
import os
import pkgutil
import pwd
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine

from receiver.cli import doctor
from receiver.cli.doctor.command import examine
from receiver.cli.doctor.database import check_database
from receiver.cli.doctor.findings import Finding, Severity
from receiver.cli.doctor.flora import check_flora, interpret_response
from receiver.cli.doctor.probe import ProbeFailure, ProbeResult
from receiver.cli.doctor.proxies import check_downloads_proxy, check_environment
from receiver.cli.doctor.public import check_public_url, diagnose_route
from receiver.cli.doctor.settings import check_settings
from receiver.config import Settings
from receiver.net import certificates
from receiver.net.clients import own_client
from receiver.store import open_database
from receiver.store.database import probe_write
from receiver.store.migrate import upgrade
from tests.cli.conftest import KEYS, run_command
from tests.support.forward_proxy import run_forward_proxy
from tests.support.stage import Stage, free_port, run_stage

OLD = "database.old_sqlite"
Respond = Callable[[bytes], Awaitable[bytes]]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with run_stage(tmp_path) as made:
        yield made


def settings(stage: Stage, **sections: Any) -> Settings:
    return Settings.model_validate(stage.document(**sections))


def ids(found: list[Finding]) -> set[str]:
    """Return the ids of the warnings and errors."""
    return {each.id for each in found if each.kind.severity is not Severity.OK}


def names(directory: Path) -> set[str]:
    return {each.name for each in directory.iterdir()}


def reply(status: str, body: bytes = b"", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@contextlib.asynccontextmanager
async def run_proxy(
    stage: Stage, respond: Respond, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Run a server before the receiver; `respond` turns a request into a response, as bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (
                    int(line[15:])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length:")
                ),
                0,
            )
            writer.write(await respond(head + await reader.readexactly(length)))
            await writer.drain()
        writer.close()

    context = tls or ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if tls is None:
        context.load_cert_chain(stage.cert, stage.key)
    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def forward(stage: Stage, change: Callable[[bytes], bytes]) -> Respond:
    """Return a function that changes a request and forwards it to the receiver."""

    async def respond(request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", stage.port, ssl=stage.tls())
        writer.write(change(request))
        await writer.drain()
        response = await reader.read(65_536)
        writer.transport.abort()
        return response

    return respond


def always(response: bytes) -> Respond:
    async def respond(_: bytes) -> bytes:
        return response

    return respond


async def test_a_healthy_set_up_has_no_findings(stage: Stage, tmp_path: Path) -> None:
    """Both beside a running service that holds the ledger, and without one."""
    stage.port = free_port()
    authority = certificates.make_authority()
    ca = tmp_path / "quarter-ca.pem"
    ca.write_bytes(authority.pem)
    issued = certificates.issue(authority, "127.0.0.1", life=timedelta(days=90))
    cert, key = certificates.write(issued, tmp_path, "quarter")
    healthy: dict[str, Any] = {
        "public_url": f"https://127.0.0.1:{stage.port}",
        "tls": {"cert": str(cert), "key": str(key)},
    }
    async with stage.service(**healthy):
        assert ids(await examine(settings(stage, **healthy), ca=ca)) == set()
    assert ids(await check_database(settings(stage), free_bytes=lambda _: 10**12)) == set()


async def test_a_ledger_that_does_not_exist_is_not_created(stage: Stage, tmp_path: Path) -> None:
    """Run as root before the first start, it must leave no files that the service cannot write."""
    url = f"sqlite:///{tmp_path}/not/yet/receiver.db"
    assert ids(await check_database(settings(stage, database={"url": url}))) == set()
    assert not (tmp_path / "not").exists()
    assert not any("doctor" in name for name in names(tmp_path))


async def test_a_receiver_that_is_not_on_loopback_is_reached(stage: Stage) -> None:
    """The address it is bound to counts as this machine, whatever its certificate says."""
    async with own_client(bound="192.0.2.1") as client:
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.get("https://192.0.2.2/")
        with pytest.raises((httpx.ConnectError, httpx.TimeoutException)):
            await client.get("http://192.0.2.1:1/", timeout=0.01)


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (reply("301 Moved", b"", "Location: https://elsewhere.example/"), "public.redirect"),
        (reply("200 OK", b"<html>Sign in</html>", "Content-Type: text/html"), "public.someone_else"),
        (reply("401 Unauthorized", b"", "WWW-Authenticate: Basic"), "public.someone_else"),
        (reply("404 Not Found", b'{"error":{"code":"not_found","message":""}}'), "public.rewritten"),
        (reply("503 Unavailable", b'{"error":{"code":"unavailable","message":""}}'), "public.unavailable"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "public.someone_else"),
    ],
)
async def test_other_responses_than_the_receivers(stage: Stage, response: bytes, found: str) -> None:
    """A redirect, a login page, another path, a receiver that cannot commit, no HTTP."""
    async with stage.service(), run_proxy(stage, always(response)) as origin:
        findings = await check_public_url(settings(stage, public_url=origin), ca=stage.ca)
    assert ids(findings) - {"public.certificate_ends"} == {found}


async def test_changes_by_a_proxy_are_distinguished(stage: Stage) -> None:
    """It changes nothing, the path or the body, in front of the same receiver."""
    changes: dict[str | None, Callable[[bytes], bytes]] = {
        None: lambda request: request,
        "public.rewritten": lambda request: request.replace(b"/callbacks/flora", b"/hooks/callbacks/flora"),
        "public.altered": lambda request: request.replace(b'{"canary": ', b'{"canary":  ').replace(
            b"Content-Length: 30", b"Content-Length: 31"
        ),
    }
    async with stage.service():
        for wanted, change in changes.items():
            async with run_proxy(stage, forward(stage, change)) as origin:
                findings = await check_public_url(settings(stage, public_url=origin), ca=stage.ca)
            assert ids(findings) - {"public.certificate_ends"} == ({wanted} if wanted else set())


async def test_a_slow_or_broken_route_is_diagnosed(stage: Stage) -> None:
    """The duration of a canary decides; the test does not wait."""
    slow, quick = ProbeResult("u", 7.5, 200, "canary"), ProbeResult("u", 0.1, 200, "canary")
    finding = diagnose_route(slow, quick)
    assert finding is not None
    assert (finding.id, finding.what) == ("public.slow", "a canary took 7.5 s")
    assert diagnose_route(quick, quick) is None
    for obstacle, wanted in (
        (ProbeFailure.TIMEOUT, "public.slow"),
        (ProbeFailure.NAME, "public.unresolved"),
        (ProbeFailure.REFUSED, "public.unreachable"),
    ):
        stuck = diagnose_route(ProbeResult("u", 12.0, failure=obstacle), quick)
        assert stuck is not None
        assert stuck.id == wanted


async def test_a_slow_proxy_is_found(stage: Stage) -> None:
    """A real proxy holds the canary for longer than the limit, which is short here."""

    async def hold(request: bytes) -> bytes:
        await asyncio.sleep(0.2)
        return await forward(stage, lambda same: same)(request)

    async with stage.service(), run_proxy(stage, hold) as origin:
        findings = await check_public_url(settings(stage, public_url=origin), ca=stage.ca, slow_seconds=0.1)
    assert ids(findings) - {"public.certificate_ends"} == {"public.slow"}


async def test_a_public_url_without_a_receiver(stage: Stage) -> None:
    """With a receiver on this machine the route is missing, without one the receiver."""
    async with stage.service():
        findings = await check_public_url(
            settings(stage, public_url=f"https://127.0.0.1:{free_port()}"), ca=stage.ca
        )
        assert ids(findings) == {"public.unreachable"}
    stage.port = free_port()
    for response in (None, reply("502 Bad Gateway", b"no upstream")):
        async with run_proxy(stage, always(response or b"")) as origin:
            url = origin if response else f"https://127.0.0.1:{free_port()}"
            findings = await check_public_url(settings(stage, public_url=url), ca=stage.ca)
        assert ids(findings) - {"public.certificate_ends"} == {"receiver.silent"}


def test_a_router_that_does_not_route_back_inside() -> None:
    """A refusal at an address of another machine is a warning while the receiver works."""
    here, refused = (
        ProbeResult("u", 0.1, 200, "canary"),
        ProbeResult("u", 0.1, failure=ProbeFailure.REFUSED, message="why"),
    )
    found = diagnose_route(refused, here, is_ours=False)
    assert found is not None
    assert (found.id, found.kind.severity) == ("public.unchecked", Severity.WARNING)
    assert diagnose_route(refused, here, is_ours=True) == Finding("public.unreachable", "why")


@pytest.mark.parametrize("wrong", ["expired", "another host", "another authority"])
async def test_a_certificate_that_flora_would_not_trust(stage: Stage, tmp_path: Path, wrong: str) -> None:
    """It is the only finding, whatever responds behind it."""
    authority = certificates.make_authority()
    ca = tmp_path / "own-ca.pem"
    ca.write_bytes(authority.pem)
    life = timedelta(hours=-1) if wrong == "expired" else timedelta(days=90)
    host = "elsewhere.example" if wrong == "another host" else "127.0.0.1"
    cert, key = certificates.write(certificates.issue(authority, host, life=life), tmp_path, "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    async with stage.service(), run_proxy(stage, always(reply("200 OK")), context) as origin:
        trusted = stage.ca if wrong == "another authority" else ca
        findings = await check_public_url(settings(stage, public_url=origin), ca=trusted)
    assert ids(findings) == {"public.certificate"}


async def test_a_receiver_with_another_secret(stage: Stage) -> None:
    """It refuses the canary outside and on this machine, so the body is not altered."""
    async with stage.service():
        flora = {"webhook_secrets": ["whsec_another"]}
        findings = await check_public_url(
            settings(stage, public_url=f"https://127.0.0.1:{stage.port}", flora=flora), ca=stage.ca
        )
    assert ids(findings) - {"public.certificate_ends"} == {"public.wrong_secret"}


async def test_a_receiver_without_some_of_the_secrets(stage: Stage) -> None:
    """It was started before a secret or a workspace was added; each secret is tried."""
    stage.port = free_port()
    public_url = f"https://127.0.0.1:{stage.port}"
    flora = {"webhook_secrets": [stage.secret, "whsec_new"]}
    workspaces = [{"id": "ws_new", "secrets": ["whsec_of_ws_new"]}]
    with_all = settings(stage, public_url=public_url, flora=flora, workspaces=workspaces)
    async with stage.service():
        findings = [
            each
            for each in await check_public_url(with_all, ca=stage.ca)
            if each.id != "public.certificate_ends"
        ]
    assert [each.id for each in findings] == ["public.wrong_secret"] * 2
    assert "number 2" in findings[0].what
    assert "ws_new" in findings[1].what
    async with stage.service(flora=flora, workspaces=workspaces):
        assert ids(await check_public_url(with_all, ca=stage.ca)) == {"public.certificate_ends"}


async def test_an_api_behind_a_proxy_is_distinguished(stage: Stage) -> None:
    """Without the proxy that curl would use, through a proxy that fails, and simply unreachable."""
    nowhere = {"base_url": "https://flora.invalid/api/v1"}
    environ = {"HTTPS_PROXY": "http://user:hunter2@127.0.0.1:9"}
    assert ids(await check_flora(settings(stage, flora=nowhere), environ={})) == {"flora.unreachable"}
    [ignored] = await check_flora(settings(stage, flora=nowhere), environ=environ)
    assert ignored.id == "flora.proxy_ignored"
    assert "HTTPS_PROXY" in ignored.what
    assert "hunter2" not in ignored.what
    async with run_forward_proxy() as proxy:
        through = settings(stage, flora={**nowhere, "proxy": f"http://127.0.0.1:{proxy.port}"})
        [failed] = await check_flora(through, environ=environ)
    assert (failed.id, proxy.targets) == ("flora.proxy_failed", ["flora.invalid:443"])
    assert "refused with 502" in failed.what


async def test_the_proxy_for_downloads_is_tried(stage: Stage) -> None:
    """What it allows is not known beforehand; whether it is there and takes the password is."""
    flora = {"base_url": "https://1.1.1.1/api/v1"}
    async with run_forward_proxy() as proxy:
        url = f"127.0.0.1:{proxy.port}"
        with_password = settings(stage, flora=flora, downloads={"proxy": f"http://u:hunter2@{url}"})
        assert await check_downloads_proxy(with_password) == []
        proxy.credentials = "u:hunter2"
        assert await check_downloads_proxy(with_password) == []
        [refused] = await check_downloads_proxy(settings(stage, flora=flora, downloads={"proxy": url}))
    [gone] = await check_downloads_proxy(with_password)
    assert refused.id == gone.id == "downloads.proxy_failed"
    assert "user name and password" in refused.what
    assert "cannot be reached" in gone.what
    assert "hunter2" not in gone.what
    assert await check_downloads_proxy(settings(stage)) == []


def test_a_proxy_of_the_environment_is_mentioned(stage: Stage) -> None:
    """Nothing is wrong with it: curl, and the clients of buckets, obey it, and this program does not."""
    environ = {"https_proxy": "http://127.0.0.1:9"}
    [found] = check_environment(settings(stage, flora={"proxy": "127.0.0.1:9"}), environ)
    assert (found.id, found.kind.severity) == ("proxy.not_used", Severity.OK)
    assert found.what == "https_proxy in the environment; not set: [downloads] proxy"
    both = {"flora": {"proxy": "127.0.0.1:9"}, "downloads": {"proxy": "127.0.0.1:9"}}
    assert list(check_environment(settings(stage, **both), environ)) == []
    assert list(check_environment(settings(stage), {})) == []


async def test_refused_keys_are_distinguished(stage: Stage) -> None:
    """Revoked, forbidden, failing and unreachable have findings of their own."""
    assert ids(await check_flora(settings(stage))) == set()
    revoked = settings(stage, flora={"api_key": "sk_test_revoked"})
    assert ids(await check_flora(revoked)) == {"flora.key_refused"}
    away = settings(stage, flora={"base_url": f"http://127.0.0.1:{free_port()}/api/v1"})
    assert ids(await check_flora(away)) == {"flora.unreachable"}
    for status, wanted in (("403 Forbidden", "flora.key_forbidden"), ("500 Oops", "flora.failing")):

        async def handle(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: str = status
        ) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply(status, b'{"error":{"code":"x","message":"y"}}', "request-id: req_1"))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1"
        [finding] = await check_flora(settings(stage, flora={"base_url": base}))
        server.close()
        assert finding.id == wanted
        assert "req_1" in finding.what
        assert stage.emulator.settings.api_key not in finding.what


async def test_a_clock_that_differs_from_floras(stage: Stage) -> None:
    """The `Date` header of FLORA's response decides."""
    for minutes, word in ((10, "ahead"), (-10, "behind")):
        [finding] = await check_flora(settings(stage), datetime.now(UTC) + timedelta(minutes=minutes))
        assert finding.id == "clock.skewed"
        assert word in finding.what
    assert await check_flora(settings(stage), datetime.now(UTC) + timedelta(seconds=30)) == []


async def test_an_unusable_ledger(stage: Stage, tmp_path: Path) -> None:
    """No directory and no server, no space, and a service that does not respond."""
    file = tmp_path / "a file"
    file.write_text("in the way")
    nowhere = settings(stage, database={"url": f"sqlite:///{file}/receiver.db"})
    assert ids(await check_database(nowhere)) == {"database.unusable"}
    away = settings(stage, database={"url": f"postgresql://nobody@127.0.0.1:{free_port()}/x"})
    assert ids(await check_database(away)) == {"database.unusable"}
    assert ids(await check_database(settings(stage), free_bytes=lambda _: 5 * 1024**2)) == {"database.full"}
    assert ids(await check_database(settings(stage), free_bytes=no_space)) == {"database.full"}
    async with stage.service():
        here, stage.port = stage.port, free_port()
        assert ids(await check_database(settings(stage))) == {"database.unanswered"}
        stage.port = here
        assert ids(await check_database(settings(stage))) == set()


def no_space(_: Path) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def unprivileged_user() -> Iterator[None]:
    """Run as a user who cannot write every file: as root, become `nobody` for the block."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


async def test_a_ledger_that_is_read_only(stage: Stage) -> None:
    """Only the file is read-only; SQLite begins an empty transaction in it without an error."""
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "receiver.db"
        file.parent.chmod(0o777)
        here = settings(stage, database={"url": f"sqlite:///{file}"})
        with unprivileged_user():
            database = open_database(here.database.url)
            await database.close()
            assert ids(await check_database(here)) == set()
            file.chmod(0o444)
            [finding] = [each for each in await check_database(here) if each.id != OLD]
    assert finding.id == "database.unusable"
    assert "Permission denied" in finding.what


def test_probe_write_syncs_and_changes_nothing(tmp_path: Path) -> None:
    """The commit writes to the log, unlike an empty transaction; the content stays the same."""
    log = tmp_path / "a.db-wal"
    engine = create_engine(f"sqlite:///{tmp_path}/a.db")
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        connection.exec_driver_sql("PRAGMA user_version = 7")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        assert log.stat().st_size == 0
        probe_write(connection)
        connection.commit()
        assert log.stat().st_size > 0
        assert connection.exec_driver_sql("PRAGMA user_version").scalar_one() == 7
    engine.dispose()


async def test_a_postgresql_that_is_read_only(postgres_url: str, stage: Stage) -> None:
    """For example a standby, or a server in read-only mode."""
    database = open_database(postgres_url)
    await database.run(upgrade)
    await database.close()
    assert ids(await check_database(settings(stage, database={"url": postgres_url}))) == set()
    separator = "&" if "?" in postgres_url else "?"
    closed = f"{postgres_url}{separator}options=-cdefault_transaction_read_only%3Don"
    [finding] = await check_database(settings(stage, database={"url": closed}))
    assert finding.id == "database.unusable"
    assert "read-only" in finding.what


async def test_a_read_only_file_system(stage: Stage) -> None:
    """/sys is read-only even for root."""
    assert ids(await check_database(settings(stage, database={"url": "sqlite:////sys/receiver.db"}))) == {
        "database.unusable"
    }


async def test_broken_handlers(stage: Stage, tmp_path: Path) -> None:
    """Their check fails, or they cannot be built; the other checks run all the same."""
    file = tmp_path / "a file"
    file.write_text("in the way")
    handlers = [{"use": "storage", "options": {"url": str(file)}}]
    found = await examine(settings(stage, handlers=handlers), ca=stage.ca)
    assert {"handler.broken", "public.missing"} <= ids(found)
    assert found[0].kind.severity is Severity.ERROR
    handlers = [{"use": "storage", "options": {"ulr": "x"}}, {"use": "no.such:Handler", "name": "other"}]
    revoked = {"api_key": "sk_test_revoked"}
    found = await examine(settings(stage, handlers=handlers, flora=revoked), ca=stage.ca)
    assert [each.id for each in found].count("handler.broken") >= 2
    assert "flora.key_refused" in ids(found)


TWO = """
[[workspaces]]
id = "ws_1"
secrets = ["whsec_1"]
[[workspaces]]
id = "ws_2"
secrets = ["{secret}"]
"""


@pytest.mark.parametrize(
    ("env", "toml", "wanted"),
    [
        ({}, "", {"settings.unusable"}),
        ({"FLORA_WEBHOOK_SECRET": "whsec_1\n"}, "", {"secrets.white_space"}),
        ({"FLORA_API_KEY": " sk_live_1"}, "", {"secrets.white_space"}),
        ({"FLORA_API_KEY": "sk_live_1\n# made today"}, "", {"secrets.character"}),
        ({"FLORA_API_KEY": "\ufeffsk_live_1"}, "", {"secrets.character"}),
        ({"FLORA_API_KEY": "sk_live\u200b_1"}, "", {"secrets.character"}),
        ({"FLORA_API_KEY": "sk_live_1\x01"}, "", {"secrets.character"}),
        ({"FLORA_API_KEY": "sk_live_ü"}, "", {"secrets.character"}),
        ({"FLORA_WEBHOOK_SECRET": "whsec_1 whsec_2"}, "", {"secrets.character"}),
        ({"FLORA_WEBHOOK_SECRET": "whsec_1|whsec_2"}, "", {"secrets.character"}),
        ({"FLORA_WEBHOOK_SECRET": '"whsec_1"'}, "", {"secrets.character"}),
        ({"RECEIVER_PUBLIC__PROT": "1"}, "", {"settings.unusable"}),
        ({"RECEIVER_PUBLIC_URL": "https://localhost"}, "", {"public.refused_by_flora"}),
        ({"RECEIVER_PUBLIC_URL": "http://hooks.example.com"}, "", {"public.refused_by_flora"}),
        ({}, TWO.format(secret="whsec_1"), {"secrets.shared"}),
    ],
)
def test_unusable_settings(env: dict[str, str], toml: str, wanted: set[str], tmp_path: Path) -> None:
    """Each problem is a finding; the exit code is 2; no secret is printed."""
    (tmp_path / "receiver.toml").write_text(toml)
    done = run_command("doctor", "--json", cwd=tmp_path, env=(KEYS | env) if env or toml else {})
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr, found["ok"]) == (2, "", False)
    assert {each["id"] for each in found["findings"]} == wanted
    assert not any(
        value in done.stdout for value in env.values() if value.strip().startswith(("sk_", "whsec_"))
    )


def test_a_key_in_the_text_of_an_error_is_not_printed(
    tmp_path: Path,
) -> None:
    """Whatever a library or a plug-in writes into its errors."""
    (tmp_path / "talkative.py").write_text(
        """
from receiver.plugins.functions import NoOptions

class Talkative:
    Config = NoOptions
    def __init__(self, config): pass
    async def handle(self, run, context): ...
    async def check(self): raise ValueError("no: Bearer abc, sk_live_SECRET, postgresql://u:p?w@host/db")
"""
    )
    (tmp_path / "receiver.toml").write_text('[[handlers]]\nuse = "talkative:Talkative"\n')
    for command in ("check", "doctor"):
        for flag in ((), ("--json",)):
            env = {**KEYS, "PYTHONPATH": str(tmp_path), "FLORA_BASE_URL": f"http://127.0.0.1:{free_port()}"}
            done = run_command(command, *flag, cwd=tmp_path, env=env)
            assert "no: Bearer ***, sk_live_***, postgresql://***@host/db" in done.stdout
            assert done.returncode == 1


def test_secrets_in_the_wrong_place(stage: Stage) -> None:
    """They are swapped, or have no known prefix."""
    swapped = settings(stage, flora={"api_key": "whsec_x", "webhook_secrets": ["sk_live_x"]})
    assert ids(list(check_settings(swapped))) == {"secrets.swapped", "secrets.prefix", "public.missing"}
    other = settings(stage, flora={"webhook_secrets": ["a_part_of_it"]})
    assert ids(list(check_settings(other))) == {"secrets.prefix", "public.missing"}
    odd = settings(stage, flora={"tolerance_past_seconds": 300})
    assert ids(list(check_settings(odd))) == {"settings.odd", "public.missing"}


ROW = {
    "run_id": "run_1",
    "status": "completed",
    "progress": 100,
    "created_at": 1733952000000,
    "workspace_id": "ws_2",
}


@pytest.mark.parametrize(
    ("status", "body", "workspace", "wanted"),
    [
        (200, {"technique_runs": [], "meta": {}}, None, set()),
        (200, {"technique_runs": [ROW], "meta": {}}, None, set()),
        (200, {"technique_runs": [ROW], "meta": {}}, "ws_2", set()),
        (200, {"technique_runs": [ROW], "meta": {}}, "ws_1", {"secrets.mixed_up"}),
        (200, {"hello": "there"}, None, {"flora.someone_else"}),
        (200, None, None, {"flora.someone_else"}),
        (302, None, None, {"flora.someone_else"}),
        (404, None, None, {"flora.someone_else"}),
        (404, {"error": {"code": "not_found"}}, None, {"flora.someone_else"}),
        (403, None, None, {"flora.someone_else"}),
        (403, {"error": {"code": "forbidden"}}, None, {"flora.key_forbidden"}),
        (401, {"error": {"code": "invalid_api_key"}}, None, {"flora.key_refused"}),
        (401, None, None, {"flora.key_refused"}),
        (402, {"error": {"code": "insufficient_credits"}}, None, {"flora.failing"}),
        (429, None, None, {"flora.failing"}),
        (503, None, None, {"flora.failing"}),
    ],
)
def test_responses_of_flora_and_of_others(
    status: int, body: Any, workspace: str | None, wanted: set[str]
) -> None:
    """FLORA's errors differ from those of a proxy, a workspace's key from another's."""
    content = b"<html>Welcome to the hotel</html>" if body is None else json.dumps(body).encode()
    request = httpx.Request("GET", "https://app.flora.ai/api/v1/technique-runs")
    response = httpx.Response(status, content=content, request=request)
    assert ids(interpret_response(response, workspace, {"ws_1", "ws_2"} - {workspace or ""})) == wanted


async def test_a_ca_file_without_a_certificate(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    [finding] = await check_flora(settings(stage, flora={"ca_file": str(tmp_path / "empty.pem")}))
    assert (finding.id, "holds no certificate" in finding.what) == ("flora.unreachable", True)
    done = run_command("doctor", "--ca", "empty.pem", cwd=tmp_path, env=KEYS)
    assert (done.returncode, "holds no certificate" in done.stderr) == (2, True)


def test_every_check_is_made() -> None:
    """A public function `check_…` in a module of `doctor` is called by `examine`."""
    modules = [
        pkgutil.resolve_name(f"{doctor.__name__}.{module.name}")
        for module in pkgutil.iter_modules(doctor.__path__)
    ]
    checks = {
        name
        for module in modules
        for name, each in vars(module).items()
        if name.startswith("check_") and each.__module__ == module.__name__
    }
    assert {"check_database", "check_flora", "check_public_url", "check_settings"} <= checks
    assert checks <= set(examine.__code__.co_names)
