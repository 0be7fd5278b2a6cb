"""The shipped nginx and Caddy files before the real service: callbacks come through, and nothing else does."""

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.lives import Served, served
from tests.support.patience import PATIENCE_SECONDS
from tests.support.proxies import KINDS, caddy, nginx, proxy
from tests.support.stage import Stage, eventually, free_port, run_stage

SLOW: dict[str, Any] = {"reconcile": {"first_poll_seconds": 60, "callback_window_seconds": 120}}
"""Polling comes too late to help: what is settled was told by its callback."""


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """A stage whose receivers speak plain HTTP: TLS is the proxy's."""
    async with run_stage(tmp_path) as made:
        made.plain = True
        yield made


@contextlib.asynccontextmanager
async def behind(
    kind: str, stage: Stage, port: int | Path, log: str = "receiver.log"
) -> AsyncIterator[Served]:
    """Run a receiver on a port, or on a Unix socket, behind a proxy that runs already."""
    published = stage.port
    host: dict[str, Any] = {"public": {"host": f"unix:{port}"}} if isinstance(port, Path) else {}
    stage.port = published if isinstance(port, Path) else port
    with (stage.directory / log).open("wb") as file:
        async with served(stage, stdout=file.fileno(), **SLOW, **host) as life:
            stage.port = published
            yield life


@pytest.mark.parametrize("kind", KINDS)
async def test_callbacks_and_health_come_through_and_nothing_else(kind: str, stage: Stage) -> None:
    """Signed bytes arrive as they were sent, on both spellings and with a query; the rest ends at the proxy."""
    receiver = free_port()
    async with (
        proxy(kind, stage, [receiver]) as stage.port,
        behind(kind, stage, receiver) as life,
        stage.client() as client,
    ):
        await life.ready(client)
        run_id = stage.start()
        await stage.over(run_id)
        stage.check_files(run_id)
        origin = f"https://127.0.0.1:{stage.port}"
        for place in ("/callbacks/flora/", "/callbacks/flora?start=abc"):
            body = stage.body(run_id)
            answer = await client.post(origin + place, content=body, headers=_signed(stage, body))
            assert (answer.status_code, answer.json()) == (200, {"status": "accepted"}), place
        odd = b'{ "id" : "whd_odd", "type":"run.paused",\n\t"data":{"run_id":"run_x", "x":"\xc3\xa9\xe2\x80\xa8"} }  '
        answer = await client.post(f"{origin}/callbacks/flora", content=odd, headers=_signed(stage, odd))
        assert answer.json() == {"status": "ignored"}, "the body was altered on the way"
        assert (await client.get(f"{origin}/healthz")).json() == {"status": "ok"}
        for method, path, status in (
            ("GET", "/callbacks/flora", 405),
            ("GET", "/api/runs", 404),
            ("GET", "/metrics", 404),
            ("POST", "/callbacks/flora/x", 404),
            ("GET", "/", 404),
        ):
            assert (await client.request(method, origin + path)).status_code == status, path
        with contextlib.suppress(httpx.TransportError):  # closed, or refused
            answer = await client.get(f"{origin}/healthz", headers={"X-Large": "x" * 40_000})
            assert answer.status_code in {400, 431, 494}


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_large_or_broken_keeps_nobody_else_out(kind: str, stage: Stage) -> None:
    """The receiver's own limit holds to the byte; and whatever a stranger sends, the next callback is accepted at once."""
    receiver = free_port()
    async with (
        proxy(kind, stage, [receiver]) as stage.port,
        behind(kind, stage, receiver) as life,
        stage.client() as client,
    ):
        await life.ready(client)

        async def of(size: int) -> tuple[int, bytes]:
            body = stage.body("run_x", more="").replace(b'"more":""', b'"more":"%b"')
            body = body.replace(b"%b", b"x" * (size - len(body) + 2))
            assert len(body) == size
            answer = await client.post(stage.url, content=body, headers=_signed(stage, body))
            return answer.status_code, answer.content

        assert (await of(65_536))[0] == 200
        status, told = await of(65_537)
        assert (status, json.loads(told)["error"]["code"]) == (413, "body_too_large")
        allowed = {413} if kind == "nginx" else {413, 502}  # Caddy before 2.7 has no word for it
        assert (await of(90_000))[0] in allowed
        assert (await of(300))[0] == 200
        head = b"POST /callbacks/flora HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        for broken in (
            b"Content-Length: 500\r\n\r\n{",
            b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n\r\n",
            b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        ):
            await _said(stage, head + broken)
            assert (await of(300))[0] == 200, broken
        said = await _said(stage, head + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}")
        assert said.startswith(b"HTTP/1.1 100 ")
        assert b'"missing_signature"' in said


_INNER = b"POST /callbacks/flora HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
_BOTH = b"Content-Length: %d\r\n\r\n0\r\n\r\n" % (5 + len(_INNER)) + _INNER
HIDDEN = {
    "both": b"Transfer-Encoding: chunked\r\n" + _BOTH,
    "space": b"Transfer-Encoding : chunked\r\n" + _BOTH,
    "unknown": b"Transfer-Encoding: xchunked\r\n" + _BOTH,
    "twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n" + _BOTH,
    "folded": b"Transfer-Encoding:\r\n chunked\r\n" + _BOTH,
    "tab": b"Transfer-Encoding: \x0bchunked\r\n" + _BOTH,
    "underscore": b"Transfer_Encoding: chunked\r\n" + _BOTH,
    "bare newline": b"X: y\nTransfer-Encoding: chunked\n" + _BOTH,
    "short": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
    % (len(_INNER), _INNER),
    "two lengths": b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n%b" % (len(_INNER), _INNER),
    "signed length": b"Content-Length: +%d\r\n\r\n%b" % (len(_INNER), _INNER),
    "dropped length": b"Connection: content-length\r\nContent-Length: %d\r\n\r\n%b" % (len(_INNER), _INNER),
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_INNER), _INNER),
}
"""One request, or a bad one, by every reading that we can think of; by a wrong one, there is another in its body."""


@pytest.mark.parametrize("kind", KINDS)
async def test_no_request_hides_in_another(kind: str, stage: Stage) -> None:
    """Else a stranger's answer could be taken for FLORA's: a 200 without a commit. Each makes one answer at most."""
    receiver = free_port()
    async with (
        proxy(kind, stage, [receiver]) as stage.port,
        behind(kind, stage, receiver) as life,
        stage.client() as client,
    ):
        await life.ready(client)
        log = stage.directory / "receiver.log"
        for name, rest in HIDDEN.items():
            before = log.read_text().count("callback.refused")
            said = await _said(
                stage, b"POST /callbacks/flora HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" + rest
            )
            assert said.count(b"HTTP/1.1 ") <= 1, name
            for number in range(3):  # on the proxy's own connection, which the one before may have spoilt
                body = stage.body(f"run_{number}")
                answer = await client.post(stage.url, content=body, headers=_signed(stage, body))
                assert (answer.status_code, answer.json()) == (200, {"status": "accepted"}), name
            assert log.read_text().count("callback.refused") - before <= 1, name


async def _said(stage: Stage, request: bytes) -> bytes:
    """Send bytes as they are, say no more, and return what is said until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.port, ssl=stage.tls())
    heard = b""
    try:
        writer.write(request)
        async with asyncio.timeout(1.5):
            while some := await reader.read(65536):
                heard += some
    except (OSError, TimeoutError):
        pass  # it waits for more, or has closed
    finally:
        writer.transport.abort()
    return heard


HTTP2 = """
const [, origin, ca, signature, body] = process.argv;
const session = require("http2").connect(origin, { ca: require("fs").readFileSync(ca) });
const headers = { ":method": "POST", ":path": "/callbacks/flora", "flora-signature": signature };
const request = session.request(headers);
let heard = "";
request.on("response", (answer) => { heard = `${session.alpnProtocol} ${answer[":status"]} `; });
request.on("data", (some) => { heard += some; });
request.on("end", () => { console.log(heard); session.close(); });
request.end(body);
"""


@pytest.mark.parametrize("kind", KINDS)
async def test_callbacks_come_over_http2_too(kind: str, stage: Stage) -> None:
    """Outside it is the proxy's affair; inside it is the same request."""
    receiver = free_port()
    async with (
        proxy(kind, stage, [receiver]) as stage.port,
        behind(kind, stage, receiver) as life,
        stage.client() as client,
    ):
        await life.ready(client)
        body = stage.body("run_x")
        command = [
            "node",
            "-e",
            HTTP2,
            f"https://127.0.0.1:{stage.port}",
            str(stage.ca),
            stage.signature(body),
            body.decode(),
        ]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
        )
        assert done.stdout.strip() == 'h2 200 {"status":"accepted"}', done.stderr


@pytest.mark.parametrize("kind", KINDS)
async def test_who_called_is_told_by_the_proxy_alone(kind: str, stage: Stage) -> None:
    """What a caller says of itself is thrown away."""
    receiver = free_port()
    async with (
        proxy(kind, stage, [receiver]) as stage.port,
        behind(kind, stage, receiver) as life,
        stage.client() as client,
    ):
        await life.ready(client)
        headers = {"X-Forwarded-For": "203.0.113.66", "Flora-Signature": "t=1,v1=" + "0" * 64}
        assert (await client.post(stage.url, content=b"{}", headers=headers)).status_code == 401

        async def told() -> list[dict[str, Any]]:
            lines = (stage.directory / "receiver.log").read_text().splitlines()
            return [line for line in map(json.loads, lines) if line["event"] == "callback.refused"]

        [refused] = await eventually(told)
    assert refused["remote"] == "127.0.0.1"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_proxy_may_speak_on_a_unix_socket(kind: str, stage: Stage) -> None:
    """Nothing has to be said of it: who speaks there is on this machine, and is believed about who called."""
    path = stage.directory / "public.sock"
    async with (
        proxy(kind, stage, [path]) as stage.port,
        behind(kind, stage, path) as life,
        stage.client() as client,
    ):
        await life.ready(client)
        body = stage.body("run_x")
        answer = await client.post(stage.url, content=body, headers=_signed(stage, body))
        assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})
        forged = {"Flora-Signature": "t=1,v1=" + "0" * 64}
        assert (await client.post(stage.url, content=b"{}", headers=forged)).status_code == 401
        refused = await eventually(lambda: _logged(stage, "callback.refused"))
        assert [each["remote"] for each in refused] == ["127.0.0.1"]
        assert await life.stop() == 0
    assert not path.exists()


async def _logged(stage: Stage, event: str) -> list[dict[str, Any]]:
    lines = (stage.directory / "receiver.log").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_restart_behind_a_proxy_loses_nothing(kind: str, stage: Stage) -> None:
    """FLORA hears 502 meanwhile and repeats: every callback is accepted, none has to be made up for by polling."""
    receiver = free_port()
    async with proxy(kind, stage, [receiver]) as stage.port, stage.client() as client:
        async with behind(kind, stage, receiver) as life:
            await life.ready(client)
            run_ids = [stage.start() for _ in range(20)]
            await eventually(lambda: _any_settled(stage))
            assert await life.stop() == 0
        run_ids += [stage.start() for _ in range(10)]
        async with behind(kind, stage, receiver, "again.log") as life:
            await life.ready(client)
            await stage.over(*run_ids)
    for run_id in run_ids:
        stage.check_files(run_id)
    assert {row["verdict"] for row in stage.rows("SELECT verdict FROM runs")} == {"matched"}


@pytest.mark.parametrize("kind", KINDS)
async def test_one_of_two_is_killed_behind_a_proxy(kind: str, stage: Stage, postgres_url: str) -> None:
    """The other one takes what comes; what the dead one had not answered FLORA repeats."""
    stage.postgres = postgres_url
    ports = [free_port(), free_port()]
    async with contextlib.AsyncExitStack() as stack:
        stage.port = await stack.enter_async_context(proxy(kind, stage, ports))
        client = await stack.enter_async_context(stage.client())
        one = await stack.enter_async_context(behind(kind, stage, ports[0], "one.log"))
        await one.ready(client)  # it has read its settings, which the next one overwrites
        two = await stack.enter_async_context(behind(kind, stage, ports[1], "two.log"))
        await two.ready(client)
        run_ids = [stage.start() for _ in range(30)]
        await eventually(lambda: _any_settled(stage))
        one.process.kill()
        await one.process.wait()
        run_ids += [stage.start() for _ in range(20)]
        await stage.over(*run_ids)
    for run_id in run_ids:
        stage.check_files(run_id)
    assert {row["verdict"] for row in stage.rows("SELECT verdict FROM runs")} == {"matched"}


async def test_the_files_pass_their_programs_own_checks(stage: Stage) -> None:
    """`nginx -t` and `caddy validate`, of what is shipped."""
    command = nginx(stage, 8443, [8080, 8081])
    done = await asyncio.to_thread(
        subprocess.run, [*command, "-t"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    command, environ = caddy(stage, 8443, [8080, 8081])
    validate = [command[0], "validate", *command[2:]]
    done = await asyncio.to_thread(
        subprocess.run, validate, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


async def _any_settled(stage: Stage) -> bool:
    return bool(stage.rows("SELECT run_id FROM runs WHERE settled_at IS NOT NULL"))


def _signed(stage: Stage, body: bytes) -> dict[str, str]:
    return {"Content-Type": "application/json", "Flora-Signature": stage.signature(body)}
