"""The doctor finds each illness under its own id, by real servers on loopback, and is silent about a healthy set-up."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from receiver import certificates
from receiver.cli.doctor import examine
from receiver.config import Settings
from receiver.doctor.findings import ILLNESSES, Finding, Severity
from receiver.doctor.flora import of_flora
from receiver.doctor.machine import of_ledger
from receiver.doctor.public import judged, of_public
from receiver.doctor.settings import of_settings
from receiver.tunnel.probe import Obstacle, Probe
from tests.e2e.stage import Stage, free_port, staged

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
Answer = Callable[[bytes], Awaitable[bytes]]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with staged(tmp_path) as made:
        yield made


def settings(stage: Stage, **sections: Any) -> Settings:
    return Settings.model_validate(stage.document(**sections))


def ids(found: list[Finding]) -> set[str]:
    """What a person would have to do something about."""
    return {each.id for each in found if each.illness.severity is not Severity.OK}


def reply(status: str, body: bytes = b"", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@contextlib.asynccontextmanager
async def before(stage: Stage, answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Something that stands before the receiver; `answer` makes a whole answer of a whole request. Yields its origin."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            writer.write(await answer(head + await reader.readexactly(length)))
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


def handing_on(stage: Stage, change: Callable[[bytes], bytes]) -> Answer:
    """A proxy that changes requests before the receiver sees them."""

    async def answer(request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", stage.port, ssl=stage.tls())
        writer.write(change(request))
        await writer.drain()
        answer = await reader.read(65_536)
        writer.transport.abort()
        return answer

    return answer


def always(whole: bytes) -> Answer:
    async def answer(_: bytes) -> bytes:
        return whole

    return answer


async def test_a_healthy_set_up_is_no_alarm(stage: Stage) -> None:
    """Beside the running service, whose ledger is its own; and without it, from the settings alone."""
    stage.port = free_port()
    public_url = f"https://127.0.0.1:{stage.port}"
    async with stage.service(public_url=public_url):
        found = await examine(settings(stage, public_url=public_url), ca=stage.ca)
        assert ids(found) <= {"public.certificate_ends", "settings.odd"}  # the stage's certificate is for a week
    found = await of_ledger(settings(stage), free=lambda _: 10**12)
    assert ids(found) == set()


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (reply("301 Moved", b"", "Location: https://elsewhere.example/"), "public.redirect"),
        (reply("200 OK", b"<html>Sign in</html>", "Content-Type: text/html"), "public.someone_else"),
        (reply("401 Unauthorized", b"", "WWW-Authenticate: Basic"), "public.someone_else"),
        (reply("404 Not Found", b'{"error":{"code":"not_found","message":""}}'), "public.rewritten"),
        (reply("503 Unavailable", b'{"error":{"code":"unavailable","message":""}}'), "public.unavailable"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "public.someone_else"),
    ],
)
async def test_who_answers_in_place_of_the_receiver(stage: Stage, answer: bytes, found: str) -> None:
    async with stage.service(), before(stage, always(answer)) as origin:
        told = await of_public(settings(stage, public_url=origin), ca=stage.ca)
    assert ids(told) - {"public.certificate_ends"} == {found}


async def test_what_a_proxy_changes_is_told_apart(stage: Stage) -> None:
    """The path, the bytes, or nothing: the receiver behind it is the same."""
    changes: dict[str | None, Callable[[bytes], bytes]] = {
        None: lambda request: request,
        "public.rewritten": lambda request: request.replace(b"/callbacks/flora", b"/hooks/callbacks/flora"),
        "public.altered": lambda request: request.replace(b'{"canary": ', b'{"canary":  ').replace(
            b"Content-Length: 30", b"Content-Length: 31"
        ),
    }
    async with stage.service():
        for wanted, change in changes.items():
            async with before(stage, handing_on(stage, change)) as origin:
                told = await of_public(settings(stage, public_url=origin), ca=stage.ca)
            assert ids(told) - {"public.certificate_ends"} == ({wanted} if wanted else set())


async def test_a_slow_way_is_told(stage: Stage) -> None:
    """By what a canary took: no test waits for it."""
    slow, quick = Probe("u", 7.5, 200, "canary"), Probe("u", 0.1, 200, "canary")
    finding = judged(slow, quick)
    assert finding is not None
    assert (finding.id, finding.what) == ("public.slow", "a canary took 7.5 s")
    assert judged(quick, quick) is None
    for obstacle, wanted in (
        (Obstacle.TIMEOUT, "public.slow"),
        (Obstacle.NAME, "public.unresolved"),
        (Obstacle.REFUSED, "public.unreachable"),
    ):
        stuck = judged(Probe("u", 12.0, obstacle=obstacle), quick)
        assert stuck is not None
        assert stuck.id == wanted


async def test_nobody_there(stage: Stage) -> None:
    told = await of_public(settings(stage, public_url=f"https://127.0.0.1:{free_port()}"), ca=stage.ca)
    assert ids(told) == {"public.unreachable"}


@pytest.mark.parametrize("wrong", ["expired", "another host", "another authority"])
async def test_a_certificate_that_flora_would_not_take(stage: Stage, tmp_path: Path, wrong: str) -> None:
    authority = certificates.make_authority()
    ca = tmp_path / "own-ca.pem"
    ca.write_bytes(authority.pem)
    life = timedelta(hours=-1) if wrong == "expired" else timedelta(days=90)
    host = "elsewhere.example" if wrong == "another host" else "127.0.0.1"
    cert, key = certificates.write(certificates.issue(authority, host, life=life), tmp_path, "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    async with stage.service(), before(stage, always(reply("200 OK")), context) as origin:
        trusted = stage.ca if wrong == "another authority" else ca
        told = await of_public(settings(stage, public_url=origin), ca=trusted)
    assert ids(told) == {"public.certificate"}


async def test_a_receiver_with_another_secret(stage: Stage) -> None:
    async with stage.service():
        flora = {"webhook_secrets": ["whsec_another"]}
        told = await of_public(settings(stage, public_url=f"https://127.0.0.1:{stage.port}", flora=flora), ca=stage.ca)
    assert ids(told) - {"public.certificate_ends"} == {"public.wrong_secret"}


async def test_keys_that_flora_refuses_are_told_apart(stage: Stage) -> None:
    """Revoked is not forbidden, and no answer is neither."""
    assert ids(await of_flora(settings(stage))) == set()
    revoked = settings(stage, flora={"api_key": "sk_test_revoked"})
    assert ids(await of_flora(revoked)) == {"flora.key_refused"}
    away = settings(stage, flora={"base_url": f"http://127.0.0.1:{free_port()}/api/v1"})
    assert ids(await of_flora(away)) == {"flora.unreachable"}
    for status, wanted in (("403 Forbidden", "flora.key_forbidden"), ("500 Oops", "flora.failing")):

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: str = status) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply(status, b'{"error":{"code":"x","message":"y"}}', "request-id: req_1"))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1"
        [finding] = await of_flora(settings(stage, flora={"base_url": base}))
        server.close()
        assert finding.id == wanted
        assert "req_1" in finding.what
        assert stage.emulator.settings.api_key not in finding.what


async def test_a_clock_that_is_wrong(stage: Stage) -> None:
    """Held against FLORA's own `Date`."""
    for minutes, word in ((10, "ahead"), (-10, "behind")):
        [finding] = await of_flora(settings(stage), datetime.now(UTC) + timedelta(minutes=minutes))
        assert finding.id == "clock.skewed"
        assert word in finding.what
    assert await of_flora(settings(stage), datetime.now(UTC) + timedelta(seconds=30)) == []


async def test_a_ledger_that_cannot_be_written(stage: Stage, tmp_path: Path) -> None:
    """Read-only, no directory, no server: unusable; little room: full; a service that does not answer: that."""
    file = tmp_path / "a file"
    file.write_text("in the way")
    nowhere = settings(stage, database={"url": f"sqlite:///{file}/receiver.db"})
    assert ids(await of_ledger(nowhere)) == {"database.unusable"}
    away = settings(stage, database={"url": f"postgresql://nobody@127.0.0.1:{free_port()}/x"})
    assert ids(await of_ledger(away)) == {"database.unusable"}
    assert ids(await of_ledger(settings(stage), free=lambda _: 5 * 1024**2)) == {"database.full"}
    async with stage.service():
        here, stage.port = stage.port, free_port()
        assert ids(await of_ledger(settings(stage))) == {"database.unanswered"}
        stage.port = here
        assert ids(await of_ledger(settings(stage))) == set()


async def test_a_read_only_file_system(stage: Stage) -> None:
    """One that is so even for root: the kernel's own."""
    assert ids(await of_ledger(settings(stage, database={"url": "sqlite:////sys/receiver.db"}))) == {
        "database.unusable"
    }


async def test_handlers_that_cannot_work(stage: Stage, tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("in the way")
    handlers = [{"use": "storage", "options": {"url": str(file)}}]
    found = await examine(settings(stage, handlers=handlers), ca=stage.ca)
    assert {"handler.broken", "public.missing"} <= ids(found)
    assert found[0].illness.severity is Severity.ERROR


@pytest.mark.parametrize(
    ("flora", "workspaces", "wanted"),
    [
        ({"api_key": "whsec_x", "webhook_secrets": ["sk_live_x"]}, [], "secrets.swapped"),
        ({}, [{"id": "ws_1", "secrets": ["whsec_1"]}, {"id": "ws_2", "secrets": ["whsec_1"]}], "secrets.shared"),
    ],
)
def test_secrets_in_the_wrong_place(stage: Stage, flora: Any, workspaces: Any, wanted: str) -> None:
    try:
        made = settings(stage, flora=flora, workspaces=workspaces)
    except ValueError as error:  # refused by the settings themselves: as good
        assert "secret" in str(error)  # noqa: PT017
        return
    assert wanted in ids(list(of_settings(made)))


def test_a_url_that_flora_refuses(stage: Stage) -> None:
    """Settings refuse it too; the doctor says it of what was built without them."""
    made = Settings.model_validate(
        {"public_url": "https://localhost", "flora": {"api_key": "sk_test_1", "webhook_secrets": ["whsec_1"]}}
    )
    assert ids(list(of_settings(made))) == {"public.refused_by_flora"}


@pytest.mark.parametrize("kind", ILLNESSES)
def test_every_finding_is_documented(kind: str) -> None:
    row = f"| {ILLNESSES[kind].means} | `{kind}` | {ILLNESSES[kind].cure} |"
    assert row in README, f"add to README.md: {row}"
