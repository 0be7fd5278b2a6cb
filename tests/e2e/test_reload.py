"""Keys, secrets and certificates are replaced under a running `serve`: nothing is refused, and nothing is half new."""

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import ssl
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver.flora.signature import sign
from receiver.net import certificates
from tests.support.lives import COMMAND, Served, served
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, eventually, free_port, toml

OLD, NEW = "whsec_" + "0" * 32, "whsec_" + "1" * 32


def signed(stage: Stage, body: bytes, secret: str) -> str:
    stamp = int(stage.signature(body).partition(",")[0].removeprefix("t="))
    return sign(body, secret, timestamp=stamp)


async def send(stage: Stage, client: httpx.AsyncClient, secret: str) -> int:
    """Send a callback about a run of its own; return the status."""
    body = stage.body(f"run_{os.urandom(6).hex()}")
    return (await stage.send(client, body, signed(stage, body, secret))).status_code


async def accepted(stage: Stage, client: httpx.AsyncClient, secret: str) -> None:
    async def look() -> bool:
        return await send(stage, client, secret) == 200

    await eventually(look, what="a callback with the new secret")


async def refused_from_now_on(stage: Stage, client: httpx.AsyncClient, secret: str) -> None:
    async def look() -> bool:
        return await send(stage, client, secret) == 401

    await eventually(look, what="a refusal of the old secret")


def events(log: Path, name: str) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines()
    return [line for text in lines if text.startswith("{") and (line := json.loads(text))["event"] == name]


async def logged(log: Path, name: str, number: int = 1) -> list[dict[str, Any]]:
    async def look() -> list[dict[str, Any]]:
        found = events(log, name)
        return found if len(found) >= number else []

    return await eventually(look, what=name)


async def served_certificate(stage: Stage) -> bytes:
    """Return the certificate that a new connection gets, as DER."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", stage.port, ssl=context)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return bytes(found)


def renew(stage: Stage, directory: Path) -> tuple[bytes, bytes]:
    """Return a new pair by a CA that joins the trusted one in the stage's file."""
    authority = certificates.make_authority()
    issued = certificates.issue(authority)
    stage.ca.write_bytes(stage.ca.read_bytes() + authority.pem)
    return issued.certificate, issued.key


async def metrics(stage: Stage) -> str:
    token = (stage.directory / "ops-token").read_text().strip()
    port = stage.extra["operations"]["port"]
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(
            f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {token}"}
        )
    return answer.text


async def test_a_certificate_is_renewed_under_load(stage: Stage, tmp_path: Path) -> None:
    """New connections get it within a minute without a signal; no callback is refused meanwhile."""
    stage.extra["operations"] = {"port": free_port()}
    cert, key = renew(stage, tmp_path)
    log = tmp_path / "serve.log"
    statuses: list[int] = []
    with log.open("wb") as stdout:
        async with served(stage, stdout=stdout.fileno()) as receiver, stage.client() as client:
            await receiver.ready(client)
            before = await served_certificate(stage)
            is_over = asyncio.Event()

            async def load() -> None:
                while not is_over.is_set():
                    async with stage.client() as fresh:
                        statuses.extend(
                            [
                                await send(stage, fresh, stage.secret),
                                await send(stage, client, stage.secret),
                            ]
                        )

            loading = asyncio.create_task(load())
            stage.key.write_bytes(key)  # for a moment the two do not belong together
            stage.cert.write_bytes(cert)

            async def look() -> bool:
                return await served_certificate(stage) == ssl.PEM_cert_to_DER_cert(cert.decode())

            assert before != ssl.PEM_cert_to_DER_cert(cert.decode())
            await eventually(look)
            is_over.set()
            await loading
            assert set(statuses) == {200}
            found = re.search(r'certificate_seconds{listener="public"} ([\d.]+)', await metrics(stage))
            assert found is not None
            assert 6 < float(found[1]) / 86_400 < 7
            assert await receiver.stop() == 0
    assert events(log, "tls.renewed")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda stage, cert, _: stage.cert.write_bytes(cert), "does not fit the certificate"),
        (lambda stage, *_: stage.cert.write_text("nothing"), "holds no certificate"),
        (lambda stage, *_: stage.key.write_bytes(b""), "holds no private key"),
    ],
    ids=["other key", "no certificate", "empty key"],
)
async def test_an_unusable_pair_leaves_the_old_one_in_place(
    stage: Stage, tmp_path: Path, spoil: Callable[[Stage, bytes, bytes], object], reason: str
) -> None:
    """It is said once, with the reason; the old pair is served; a usable one is taken up later."""
    cert, key = renew(stage, tmp_path)
    old = stage.cert.read_bytes()
    log = tmp_path / "serve.log"
    with log.open("wb") as stdout:
        async with served(stage, stdout=stdout.fileno()) as receiver, stage.client() as client:
            await receiver.ready(client)
            spoil(stage, cert, key)
            [line] = await logged(log, "tls.kept")
            assert reason in line["reason"]
            assert await served_certificate(stage) == ssl.PEM_cert_to_DER_cert(old.decode())
            stage.cert.write_bytes(cert)
            stage.key.write_bytes(key)
            await logged(log, "tls.renewed")
            assert await served_certificate(stage) == ssl.PEM_cert_to_DER_cert(cert.decode())
    assert len(events(log, "tls.kept")) == 1


async def test_a_secret_in_a_file_is_rotated(stage: Stage, tmp_path: Path) -> None:
    """By a symlink swap, as Kubernetes does it: both while both are listed, then the new one alone."""
    versions = {"1": OLD, "2": f"{OLD}\n{NEW}", "3": NEW}
    for name, text in versions.items():
        (tmp_path / f"..{name}").mkdir()
        (tmp_path / f"..{name}" / "secret").write_text(text)
    data = tmp_path / "..data"
    data.symlink_to("..1")
    (tmp_path / "secret").symlink_to("..data/secret")

    def swap(name: str) -> None:
        (tmp_path / "..new").symlink_to(f"..{name}")
        (tmp_path / "..new").replace(data)

    environ = {"FLORA_WEBHOOK_SECRET_FILE": str(tmp_path / "secret")}
    async with served(stage, environ=environ) as receiver, stage.client() as client:
        await receiver.ready(client)
        assert (await send(stage, client, OLD), await send(stage, client, NEW)) == (200, 401)
        swap("2")
        await accepted(stage, client, NEW)
        assert await send(stage, client, OLD) == 200
        swap("3")
        await refused_from_now_on(stage, client, OLD)
        assert await send(stage, client, NEW) == 200
        assert await receiver.stop() == 0


async def test_a_secret_in_receiver_toml_is_rotated_by_sighup(stage: Stage, tmp_path: Path) -> None:
    """The file counts at the signal; what needs a restart is named; a wrong file changes nothing."""
    log, config = tmp_path / "serve.log", stage.directory / "receiver.toml"

    def write(*secrets: str, **sections: Any) -> None:
        config.write_text(toml(stage.document(**{"flora": {"webhook_secrets": list(secrets)}, **sections})))

    with log.open("wb") as stdout:
        start = served(
            stage, stdout=stdout.fileno(), secrets_in_file=True, flora={"webhook_secrets": [OLD]}
        )
        async with start as receiver, stage.client() as client:
            await receiver.ready(client)
            write(OLD, NEW, retention={"bodies_days": 3})
            assert await send(stage, client, NEW) == 401
            receiver.process.send_signal(signal.SIGHUP)
            await accepted(stage, client, NEW)
            assert await send(stage, client, OLD) == 200
            [done] = await logged(log, "settings.reloaded")
            assert done["changed"] == ["flora.webhook_secrets"]
            [waiting] = await logged(log, "settings.need_restart")
            assert waiting["settings"] == ["retention.bodies_days"]

            write(NEW, log={"level": "loud"})
            receiver.process.send_signal(signal.SIGHUP)
            [refused] = await logged(log, "settings.not_reloaded")
            assert refused["reasons"][0].startswith("log.level: ")
            assert (await send(stage, client, OLD), await send(stage, client, NEW)) == (200, 200)

            write(NEW, log={"level": "warning"})
            receiver.process.send_signal(signal.SIGHUP)
            await refused_from_now_on(stage, client, OLD)
            assert await send(stage, client, NEW) == 200
            assert await receiver.stop() == 0
    assert OLD not in log.read_text()
    assert NEW not in log.read_text()
    assert not events(log, "service.stopped")  # an event of level info


async def test_a_certificate_that_cannot_be_used_keeps_the_secrets_of_a_reload(
    stage: Stage, tmp_path: Path
) -> None:
    """All of a reload or nothing: SIGHUP with a new secret and a broken pair changes neither."""
    log, config = tmp_path / "serve.log", stage.directory / "receiver.toml"
    other, _ = renew(stage, tmp_path)
    wrong = tmp_path / "other.pem"
    wrong.write_bytes(other)
    with log.open("wb") as stdout:
        start = served(
            stage, stdout=stdout.fileno(), secrets_in_file=True, flora={"webhook_secrets": [OLD]}
        )
        async with start as receiver, stage.client() as client:
            await receiver.ready(client)
            tls = {"cert": str(wrong), "key": str(stage.key)}
            config.write_text(toml(stage.document(flora={"webhook_secrets": [NEW]}, tls=tls)))
            receiver.process.send_signal(signal.SIGHUP)
            [line] = await logged(log, "settings.not_reloaded")
            assert line["reasons"] == ["tls.key: does not fit the certificate in tls.cert"]
            assert (await send(stage, client, OLD), await send(stage, client, NEW)) == (200, 401)


async def test_an_api_key_in_a_file_is_rotated(stage: Stage, tmp_path: Path) -> None:
    """A run that a refused key could not read is read with the new one, and the next runs too."""
    key, log = tmp_path / "key", tmp_path / "serve.log"
    key.write_text("sk_test_revoked\n")
    environ = {"FLORA_API_KEY_FILE": str(key)}
    with log.open("wb") as stdout:
        async with (
            served(stage, stdout=stdout.fileno(), environ=environ) as receiver,
            stage.client() as client,
        ):
            await receiver.ready(client)
            first = stage.start()
            await logged(log, "flora.key_refused")
            key.write_text(f"{stage.emulator.settings.api_key}\n")
            await stage.over(first)
            second = stage.start()
            await stage.over(second)
            assert await receiver.stop() == 0
    [line] = events(log, "settings.reloaded")
    assert line["changed"] == ["flora.api_key"]
    stage.check_files(first)
    stage.check_files(second)


async def test_a_key_file_that_is_emptied_changes_nothing(stage: Stage, tmp_path: Path) -> None:
    """It is said, once, and the secret of before is used on."""
    secret, log = tmp_path / "secret", tmp_path / "serve.log"
    secret.write_text(OLD)
    with log.open("wb") as stdout:
        environ = {"FLORA_WEBHOOK_SECRET_FILE": str(secret)}
        async with (
            served(stage, stdout=stdout.fileno(), environ=environ) as receiver,
            stage.client() as client,
        ):
            await receiver.ready(client)
            secret.write_text("")
            await logged(log, "settings.not_reloaded")
            assert await send(stage, client, OLD) == 200
            secret.write_text(NEW)
            await accepted(stage, client, NEW)
    assert len(events(log, "settings.not_reloaded")) == 1


def take_terminal(terminal: int) -> None:
    """Make it the terminal of this process, as a login does."""
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


async def test_a_terminal_that_is_closed_ends_serve(stage: Stage) -> None:
    """SIGHUP of a terminal that is gone is no request to reload: it ends in order."""
    stage.port = free_port()
    (stage.directory / "receiver.toml").write_text(toml(stage.document()))
    leader, follower = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        COMMAND, "serve", cwd=stage.directory, stdin=follower, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL, preexec_fn=lambda: take_terminal(follower),
    )  # fmt: skip
    os.close(follower)
    try:
        async with stage.client() as client:
            await Served(stage, process).ready(client)
        os.close(leader)
        assert await asyncio.wait_for(process.wait(), PATIENCE_SECONDS) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
