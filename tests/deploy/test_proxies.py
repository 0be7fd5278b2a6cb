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

from tests.deploy.proxies import KINDS, caddy, nginx, proxy
from tests.e2e.lives import Served, served
from tests.e2e.stage import Stage, eventually, free_port, staged

SLOW: dict[str, Any] = {"reconcile": {"first_poll_seconds": 60, "callback_window_seconds": 120}}
"""Polling comes too late to help: what is settled was told by its callback."""


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """A stage whose receivers speak plain HTTP: TLS is the proxy's."""
    async with staged(tmp_path) as made:
        made.plain = True
        yield made


@contextlib.asynccontextmanager
async def behind(kind: str, stage: Stage, port: int, log: str = "receiver.log") -> AsyncIterator[Served]:
    """Run a receiver on a port behind a proxy that runs already."""
    published, stage.port = stage.port, port
    with (stage.directory / log).open("wb") as file:
        async with served(stage, stdout=file.fileno(), **SLOW) as life:
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
        large = await client.post(f"{origin}/callbacks/flora", content=b"x" * 70_000, headers=_signed(stage, b""))
        assert large.status_code in ({413} if kind == "nginx" else {413, 502})  # Caddy before 2.7 has no word for it
        with contextlib.suppress(httpx.TransportError):  # closed, or refused
            answer = await client.get(f"{origin}/healthz", headers={"X-Large": "x" * 40_000})
            assert answer.status_code in {400, 431, 494}


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
            await stage.over(*run_ids, within=60)
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
        await stage.over(*run_ids, within=90)
    for run_id in run_ids:
        stage.check_files(run_id)
    assert {row["verdict"] for row in stage.rows("SELECT verdict FROM runs")} == {"matched"}


async def test_the_files_pass_their_programs_own_checks(stage: Stage) -> None:
    """`nginx -t` and `caddy validate`, of what is shipped."""
    command = nginx(stage, 8443, [8080, 8081])
    done = await asyncio.to_thread(subprocess.run, [*command, "-t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command, environ = caddy(stage, 8443, [8080, 8081])
    validate = [command[0], "validate", *command[2:]]
    done = await asyncio.to_thread(subprocess.run, validate, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def _any_settled(stage: Stage) -> bool:
    return bool(stage.rows("SELECT run_id FROM runs WHERE settled_at IS NOT NULL"))


def _signed(stage: Stage, body: bytes) -> dict[str, str]:
    return {"Content-Type": "application/json", "Flora-Signature": stage.signature(body)}
